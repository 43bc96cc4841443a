"""Plain values about sessions, for the doors and their client. They depend on no actor and no engine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Appended:
    """`reread_token_count` tokens of the history were read again for this call: the session had come without its whole slab."""

    history_length: int
    evicted_token_count: int
    history_digest: bytes
    reread_token_count: int = 0


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """Facts about a session. `history_digest` is BLAKE2b over the history as little-endian uint32."""

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
    """What is the same for every session of an engine, and all that doors need to know of the engine.

    A token sees the `sink` first tokens and the `window` most recent. A session holds `token_bytes` for each token in its
    slab and `kept_bytes` for its recurrent layers, at most `ceiling_bytes`.
    """

    sink: int
    window: int
    token_bytes: int
    kept_bytes: int
    ceiling_bytes: int
    is_bit_exact: bool

    @property
    def visible(self) -> int:
        """The most tokens that one token attends to."""
        return self.sink + self.window


@dataclass(frozen=True, slots=True)
class SessionSummary:
    """A session, as operators see it."""

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
    """What a client needs to know to make tokens for a model. `tokenizer_digest` is that of `runtime.text.Text`.

    Servers of one `kernel_class` compute the same bits.
    """

    model: str
    vocabulary: int
    tokenizer_digest: bytes
    eos_token_ids: frozenset[int]
    kernel_class: str = ""
