"""Every message with the type of its replies: the protocol between actors on one page."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from actors.mailbox import Message
from runtime.checks import check_whole, shown
from runtime.durable import Terms
from runtime.errors import InvalidRequest
from runtime.events import Event, Sampling, Token
from runtime.grammar import Grammar
from runtime.rows import Row
from runtime.sessions import Appended, Saved, SessionInfo
from runtime.slab import Slab


@dataclass(frozen=True, slots=True)
class Load:
    """What is taken of slabs and of permits for completions, and how many completions wait for permits."""

    slab_total: int
    slab_in_use: int
    completions_running: int
    completions_waiting: int


@dataclass(frozen=True, slots=True)
class Ran:
    """How many of the rows asked for took part in the forward, and the tokens that those drew."""

    row_count: int
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Append(Message[Appended]):
    """Raises InvalidRequest for a length that is none."""

    token_ids: tuple[int, ...]
    expected_history_length: int | None = None

    def __post_init__(self) -> None:
        if self.expected_history_length is not None:
            check_whole("expected_history_length", self.expected_history_length, 0)


@dataclass(frozen=True, slots=True)
class Generate(Message[Event]):
    """Raises InvalidRequest for a count that is out of range whatever the model, and for a grammar that is none."""

    max_tokens: int
    sampling: Sampling
    top_logprobs: int | None = None
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        check_whole("max_tokens", self.max_tokens, 1)
        if self.top_logprobs is not None:
            check_whole("top_logprobs", self.top_logprobs, 0)
        if not (self.grammar is None or isinstance(self.grammar, Grammar)):
            raise InvalidRequest(f"grammar must be one that Runtime.text made, got {shown(self.grammar)}", "grammar")


@dataclass(frozen=True, slots=True)
class Info(Message[SessionInfo]):
    pass


@dataclass(frozen=True, slots=True)
class Rewound:
    """How long a history is now, and how much of it the slab holds."""

    length: int
    read: int


@dataclass(frozen=True, slots=True)
class Rewind(Message[Rewound]):
    """Takes back the history from the first token on that `history` does not have there too."""

    history: array[int]


@dataclass(frozen=True, slots=True)
class Close(Message[int]):
    """Ends the session; the reply is the length of its history."""


@dataclass(frozen=True, slots=True)
class Evict(Message[None]):
    """Ends the session to make room; offered only to one that is idle."""


@dataclass(frozen=True, slots=True)
class Forward(Message[Ran]):
    """Rows of one slab for the next forward, or as many of the first of them as fit. `is_prefill`: tokens that were given."""

    rows: tuple[Row, ...]
    is_prefill: bool


@dataclass(frozen=True, slots=True)
class Branch:
    """What a fork begins with besides its slab."""

    terms: Terms
    history: array[int]


@dataclass(frozen=True, slots=True)
class Fork(Message[Branch]):
    """Copies the session's slab into `target`, which is the asker's."""

    target: Slab


@dataclass(frozen=True, slots=True)
class Save(Message[Saved]):
    """Writes a snapshot of the session; for one that is on disk itself."""


SessionMessage = Append | Generate | Info | Fork | Save | Rewind | Close | Evict
