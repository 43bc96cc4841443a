"""How much of a prompt runs beside streams, from how long forwards have taken."""

from __future__ import annotations

# A prompt beside a stream may double the time to the stream's next token. Forwards vary by a third, so the aim is below
# that.
_STRETCH = 1.5

# Prompt rows beside streams before anything was measured, and the least at any time, so that every prompt comes to its end.
_FIRST_ROWS, _LEAST_ROWS = 32, 4

# Weight of the newest forward in the running averages.
_NEWEST = 0.2


class Pace:
    """The prefill rows of a forward beside decode rows: as many as stretch it by no more than `_STRETCH`."""

    def __init__(self) -> None:
        self._decode_s: float | None = None
        self._prefill_row_s: float | None = None

    def rows_beside(self, decode_rows: int, step: int, tile: int) -> int:
        """How many rows a forward may have with these: the largest multiple of `step` that the prefill budget can fill."""
        most = min(decode_rows + self.prefill_rows, tile)
        full = most - most % step
        return full if full >= decode_rows + _LEAST_ROWS else most

    @property
    def prefill_rows(self) -> int:
        """The most prefill rows that a forward beside streams may have."""
        if not self._decode_s or not self._prefill_row_s:
            return _FIRST_ROWS
        return max(_LEAST_ROWS, int(self._decode_s * (_STRETCH - 1) / self._prefill_row_s))

    def record(self, decode_rows: int, prefill_rows: int, seconds: float) -> None:
        """Learns from a forward that has ended. A forward without decode rows says nothing about those beside streams."""
        if not decode_rows:
            return
        if not prefill_rows:
            self._decode_s = _moving_average(self._decode_s, seconds)
        elif self._decode_s is not None:
            self._prefill_row_s = _moving_average(
                self._prefill_row_s, max(0.0, seconds - self._decode_s) / prefill_rows
            )


def _moving_average(before: float | None, newest: float) -> float:
    return newest if before is None else before + _NEWEST * (newest - before)
