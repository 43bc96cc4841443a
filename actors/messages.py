"""Every message with the type of its replies: the protocol between actors on one page."""

from __future__ import annotations

from dataclasses import dataclass

from actors.mailbox import Message
from runtime.events import Event, Sampling
from runtime.rows import Row


@dataclass(frozen=True, slots=True)
class Appended:
    history_length: int
    evicted_token_count: int
    history_digest: bytes


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """What a session says of itself. `history_digest` is BLAKE2b over the history as little-endian uint32."""

    history_length: int
    kv_live_bytes: int
    kv_ceiling_bytes: int
    evicted_token_count: int
    sink: int
    window: int
    idle_seconds: float
    history_digest: bytes


@dataclass(frozen=True, slots=True)
class Ran:
    """How many of the rows asked for took part in the forward, and the tokens that those drew."""

    row_count: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Append(Message[Appended]):
    token_ids: tuple[int, ...]
    expected_history_length: int | None = None


@dataclass(frozen=True, slots=True)
class Generate(Message[Event]):
    max_tokens: int
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Info(Message[SessionInfo]):
    pass


@dataclass(frozen=True, slots=True)
class Close(Message[int]):
    """Ends the session; the reply is the length of its history."""


@dataclass(frozen=True, slots=True)
class Evict(Message[None]):
    """Ends the session to make room; offered only to one that is idle."""


@dataclass(frozen=True, slots=True)
class Forward(Message[Ran]):
    """Rows of one slab for the next forward, or as many of the first of them as fit. Given tokens are a prefill's."""

    rows: tuple[Row, ...]
    is_prefill: bool


SessionMessage = Append | Generate | Info | Close | Evict
