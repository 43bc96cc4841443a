"""What the doors and their client say of sessions: plain values, free of actors and engines."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Appended:
    """`reread_token_count` tokens were in the history when the session came here without a slab, and were read for this call."""

    history_length: int
    evicted_token_count: int
    history_digest: bytes
    reread_token_count: int = 0


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
class SessionShape:
    """What is the same for every session of an engine, and all that doors need to know of one.

    A token sees the `sink` first tokens and the `window` most recent. Each that is held takes `token_bytes`, and all together
    `kept_bytes` more, however many they are; `ceiling_bytes` is the most that a session can ever hold.
    """

    sink: int
    window: int
    token_bytes: int
    kept_bytes: int
    ceiling_bytes: int
    is_bit_exact: bool

    @property
    def visible(self) -> int:
        """The most tokens that one token sees."""
        return self.sink + self.window


@dataclass(frozen=True, slots=True)
class SessionSummary:
    """What an operator sees of a session."""

    label: str
    history_length: int
    evicted_token_count: int
    kv_live_bytes: int
    idle_seconds: float


@dataclass(frozen=True, slots=True)
class Saved:
    """A snapshot that was written."""

    snapshot_id: str
    size_bytes: int
    history_length: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A session that was saved. `saved_at` is in seconds since 1970."""

    snapshot_id: str
    label: str
    history_length: int
    size_bytes: int
    saved_at: float


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is to be known to make tokens for a model. `tokenizer_digest` is that of `runtime.text.Text`.

    Servers of one `kernel_class` give each other's bits.
    """

    model: str
    vocabulary: int
    tokenizer_digest: bytes
    eos_token_ids: frozenset[int]
    kernel_class: str = ""
