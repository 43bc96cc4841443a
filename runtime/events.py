"""The parameters and the events of a generation."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from runtime.checks import check_whole, is_number, short_repr
from runtime.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is drawn from logits: greedy unless `temperature` > 0; then `top_k`, `top_p` and `seed` apply.

    `top_k` 0 keeps every token. Raises InvalidRequest naming the field that is out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (is_number(self.temperature) and 0.0 <= self.temperature <= 100.0):
            raise InvalidRequest(
                f"temperature must be from 0 to 100, got {short_repr(self.temperature)}", "temperature"
            )
        if not (is_number(self.top_p) and 0.0 < self.top_p <= 1.0):
            raise InvalidRequest(f"top_p must be over 0 and at most 1, got {short_repr(self.top_p)}", "top_p")
        check_whole("top_k", self.top_k, 0)
        check_whole("seed", self.seed, 0, 2**64 - 1)


class StopReason(Enum):
    """Why a generation ended."""

    MAX_TOKENS = "max_tokens"
    EOS = "eos"
    TRUNCATED = "truncated"


class Overflow(Enum):
    """What a session does when tokens do not fit into its slab."""

    EVICT = "evict"
    ERROR = "error"


def checked_overflow(overflow: Overflow) -> Overflow:
    """Raises InvalidRequest."""
    if not isinstance(overflow, Overflow):
        raise InvalidRequest(f"overflow must be an Overflow, got {short_repr(overflow)}", "overflow")
    return overflow


@dataclass(frozen=True, slots=True)
class HistoryTruncated:
    """Sent first, and only if tokens of the history are out of the model's sight."""

    dropped_token_count: int


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Natural logarithms of the model's own probabilities, whatever the sampling: of the token, and of the likeliest tokens."""

    chosen: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token, already part of the history when the next event comes."""

    token_id: int
    logprobs: Logprobs | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """The last event of every generation. Durations are in seconds; the prefill ends with the first token.

    A proposer suggested `proposed_token_count` tokens, of which `accepted_token_count` were accepted. `reread_token_count`
    tokens of the history were read again because the session woke, or moved here, without its whole slab.
    """

    stop_reason: StopReason
    generated_token_count: int
    prefill_duration_s: float
    total_duration_s: float
    proposed_token_count: int = 0
    accepted_token_count: int = 0
    reread_token_count: int = 0


Event = HistoryTruncated | Token | Done
