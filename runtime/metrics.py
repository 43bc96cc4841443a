"""Every metric of the contract, declared once. Each runtime has a registry of its own."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

# How many of the last turns are kept for operators.
RECENT_TURNS = 500

_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 120)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class TurnTime:
    """The time from a turn's first append to its first token, which was drawn after `history_length` tokens."""

    label: str
    history_length: int
    time_to_first_token_s: float


class Metrics:
    """Counters and histograms to add to, and the last turns; gauges that read their owner's state when asked."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._turns: deque[TurnTime] = deque(maxlen=RECENT_TURNS)

        def counter(name: str, words: str, *labels: str) -> Counter:
            return Counter(f"perennial_{name}", words, labels, registry=self.registry)

        def gauge(name: str, words: str) -> Gauge:
            return Gauge(f"perennial_{name}", words, registry=self.registry)

        def histogram(name: str, words: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"perennial_{name}", words, labels, buckets=buckets, registry=self.registry)

        self.session_active = gauge("session_active", "Sessions held, long-lived and HTTP")
        self.session_total = counter("session_total", "Sessions ended, by how", "outcome")
        self.session_evicted_total = counter("session_evicted_total", "Sessions ended, by why", "reason")
        self.session_moved_here_total = counter(
            "session_moved_here_total", "Sessions taken over from another server, by what was kept of the slab", "slab"
        )
        self.session_moved_away_total = counter("session_moved_away_total", "Sessions that another server has taken")
        self.reread_tokens_total = counter(
            "reread_tokens_total", "Tokens of woken sessions to be read again, by what was kept of the slab", "slab"
        )
        self.session_kv_live_bytes = gauge("session_kv_live_bytes", "Bytes of live keys and values in all slabs")
        self.session_history_tokens = gauge("session_history_tokens", "Tokens in all histories")
        self.slab_in_use = gauge("slab_in_use", "Slabs held by sessions")
        self.slab_total = gauge("slab_total", "Slabs there are")
        self.generate_prefill_tokens = histogram(
            "generate_prefill_tokens", "Tokens that a generation had to prefill first", _TOKENS
        )
        self.generate_prefill_duration_seconds = histogram(
            "generate_prefill_duration_seconds", "From a generation's start to its first token", _SECONDS
        )
        self.time_to_first_token_seconds = histogram(
            "time_to_first_token_seconds", "From a turn's first append to its first token", _SECONDS
        )
        self.inter_token_seconds = histogram("inter_token_seconds", "From one token to the next", _SECONDS)
        self.forward_duration_seconds = histogram("forward_duration_seconds", "One run of the model", _SECONDS)
        self.forward_rows = histogram("forward_rows", "Rows in one run of the model", _ROWS)
        self.generated_tokens_total = counter("generated_tokens_total", "Tokens generated")
        self.cache_invariant_violations_total = counter("cache_invariant_violations_total", "Broken invariants", "kind")
        self.admission_total = counter("admission_total", "HTTP completions that asked for a permit", "result")
        self.admission_pending = gauge("admission_pending", "HTTP completions waiting for a permit")
        self.http_requests_total = counter("http_requests_total", "HTTP requests", "method", "path", "status")
        self.http_request_duration_seconds = histogram(
            "http_request_duration_seconds", "HTTP requests, to the last byte", _SECONDS, "method", "path"
        )
        self.grpc_requests_total = counter("grpc_requests_total", "gRPC calls", "method", "code")
        self.completions_total = counter("completions_total", "HTTP completions ended", "finish_reason")
        self.proposed_tokens_total = counter("proposed_tokens_total", "Tokens that proposers suggested")
        self.accepted_tokens_total = counter("accepted_tokens_total", "Suggested tokens that held")
        for kind in ("inv1", "inv2"):
            self.cache_invariant_violations_total.labels(kind)

    @property
    def generated_token_count(self) -> int:
        """The value of `generated_tokens_total`."""
        return int(self.registry.get_sample_value("perennial_generated_tokens_total") or 0)

    @property
    def turns(self) -> tuple[TurnTime, ...]:
        """The last turns, the oldest first, `RECENT_TURNS` at most."""
        return tuple(self._turns)

    def record_turn(self, turn: TurnTime) -> None:
        """Counts a turn when its first token has been drawn."""
        self.time_to_first_token_seconds.observe(turn.time_to_first_token_s)
        self._turns.append(turn)
