"""Every message with the type of its replies: the protocol between actors on one page."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from actors.mailbox import Message
from runtime.checks import check_whole, short_repr
from runtime.durable import Terms
from runtime.errors import InvalidRequest
from runtime.events import Event, Sampling, Token
from runtime.grammar import Grammar
from runtime.rows import Row
from runtime.sessions import Appended, Saved, SessionInfo
from runtime.slab import Slab


@dataclass(frozen=True, slots=True)
class Load:
    """How many slabs there are and are in use, how many completions run, and how many wait for permits."""

    slab_total: int
    slab_in_use: int
    completions_running: int
    completions_waiting: int


@dataclass(frozen=True, slots=True)
class Ran:
    """How many of the rows asked for were in the forward, and the tokens drawn from those rows."""

    row_count: int
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Append(Message[Appended]):
    """Adds tokens to the history. Raises InvalidRequest for an expected length that is not a whole number from 0 on."""

    token_ids: tuple[int, ...]
    expected_history_length: int | None = None

    def __post_init__(self) -> None:
        if self.expected_history_length is not None:
            check_whole("expected_history_length", self.expected_history_length, 0)


@dataclass(frozen=True, slots=True)
class Generate(Message[Event]):
    """Draws tokens. Raises InvalidRequest for counts that no model could honour, and for a grammar of the wrong type."""

    max_tokens: int
    sampling: Sampling
    top_logprobs: int | None = None
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        check_whole("max_tokens", self.max_tokens, 1)
        if self.top_logprobs is not None:
            check_whole("top_logprobs", self.top_logprobs, 0)
        if not (self.grammar is None or isinstance(self.grammar, Grammar)):
            raise InvalidRequest(
                f"grammar must be one that Runtime.text made, got {short_repr(self.grammar)}", "grammar"
            )


@dataclass(frozen=True, slots=True)
class Info(Message[SessionInfo]):
    pass


@dataclass(frozen=True, slots=True)
class Rewound:
    """How long the history is now, and how much of it the slab has read."""

    length: int
    read: int


@dataclass(frozen=True, slots=True)
class Rewind(Message[Rewound]):
    """Cuts the session's history where it first differs from `history`."""

    history: array[int]


@dataclass(frozen=True, slots=True)
class Close(Message[int]):
    """Ends the session; the reply is the length of its history."""


@dataclass(frozen=True, slots=True)
class Evict(Message[None]):
    """Ends the session to make room; offered only to one that is idle."""


@dataclass(frozen=True, slots=True)
class Forward:
    """Rows of one slab for the next forward, which runs as many of the first as fit. `is_prefill`: they carry prompt tokens."""

    rows: tuple[Row, ...]
    is_prefill: bool


@dataclass(frozen=True, slots=True)
class Branch:
    """The terms and the history with which a fork begins, and whether it is kept in the store as its parent is."""

    terms: Terms
    history: array[int]
    is_kept: bool


@dataclass(frozen=True, slots=True)
class Fork(Message[Branch]):
    """Copies the session's slab into `target`, which the asker owns."""

    target: Slab


@dataclass(frozen=True, slots=True)
class Save(Message[Saved]):
    """Writes a snapshot of the session, which must itself be durable."""


SessionMessage = Append | Generate | Info | Fork | Save | Rewind | Close | Evict
