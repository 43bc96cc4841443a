"""The times and counts of one generation, reported to the metrics as they grow."""

from __future__ import annotations

import trio

from runtime.metrics import Metrics, TurnTime


class TurnClock:
    """Times the tokens of one generation."""

    def __init__(self, metrics: Metrics, label: str, turn_began: float | None) -> None:
        """`turn_began` is the time of the turn's first append, in trio's time; without it the turn begins now."""
        self._metrics = metrics
        self._label = label
        self._began = trio.current_time()
        self._turn_began = self._began if turn_began is None else turn_began
        self._first: float | None = None
        self._last = self._began

    def tick(self, history_length: int) -> None:
        """Records that a token was drawn after `history_length` tokens."""
        now = trio.current_time()
        if self._first is None:
            self._first = now
            self._metrics.generate_prefill_duration_seconds.observe(now - self._began)
            self._metrics.record_turn(TurnTime(self._label, history_length, now - self._turn_began))
        else:
            self._metrics.inter_token_seconds.observe(now - self._last)
        self._last = now

    def seconds(self) -> tuple[float, float]:
        """The seconds up to the first token, and in all."""
        now = trio.current_time()
        return (now if self._first is None else self._first) - self._began, now - self._began


class Tally:
    """Counts the tokens of one generation."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._generated = self._proposed = self._accepted = 0

    @property
    def generated(self) -> int:
        """The number of tokens that were taken."""
        return self._generated

    @property
    def proposed(self) -> int:
        """The number of proposed tokens that were checked."""
        return self._proposed

    @property
    def accepted(self) -> int:
        """The number of tokens that were taken and had been proposed."""
        return self._accepted

    def check(self, proposed: int) -> None:
        """Records that a forward checked `proposed` proposed tokens."""
        self._proposed += proposed
        self._metrics.proposed_tokens_total.inc(proposed)

    def take(self, *, was_proposed: bool) -> None:
        """Records that a token was taken."""
        self._generated += 1
        self._metrics.generated_tokens_total.inc()
        if was_proposed:
            self._accepted += 1
            self._metrics.accepted_tokens_total.inc()
