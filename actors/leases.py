"""Who comes back to the executor with more rows, and whom of them a forward waits for."""

from __future__ import annotations

# A wait costs those that wait an eighth of a forward at most, and who misses a forward waits for a whole one.
_SHARE_OF_A_FORWARD = 1 / 8
# About what a busy event loop takes to run every task once, so that sessions share forwards on the smallest model too.
_LEAST_S = 0.001


class Leases:
    """The holders of leases, who ask for rows again and again. A forward waits a while for each holder that is away and not late.

    A holder is away while it neither waits for rows nor is held up by somebody else. It is late once a forward has waited
    for it in vain; a busy event loop makes no holder late that asks as soon as it can.
    """

    def __init__(self) -> None:
        self._away_since: dict[object, float | None] = {}
        self._due: set[object] = set()
        self._late: set[object] = set()
        self._patience_s = _LEAST_S

    @property
    def patience_s(self) -> float:
        """How long a forward waits for the holders that are due, in seconds."""
        return self._patience_s

    @property
    def is_anyone_due(self) -> bool:
        return bool(self._due)

    def measure(self, forward_s: float) -> None:
        """Records how long a forward took, in seconds."""
        self._patience_s = max(_LEAST_S, forward_s * _SHARE_OF_A_FORWARD)

    def begin(self, holder: object) -> None:
        """Adds a holder. No forward waits for its first rows."""
        self._away_since[holder] = None

    def expect(self, holder: object, now: float) -> None:
        """From now on the holder is away. Without effect for one that holds no lease."""
        if holder in self._away_since:
            self._away_since[holder] = now
            if holder not in self._late:
                self._due.add(holder)

    def arrive(self, holder: object, now: float) -> bool:
        """The holder asks. Returns whether it was expected; one that was late and is in time now is waited for again."""
        since = self._away_since.get(holder)
        if since is not None and now - since <= self._patience_s:
            self._late.discard(holder)
        self.excuse(holder)
        return since is not None

    def excuse(self, holder: object) -> None:
        """The holder is not away any more, because it asks or is held up."""
        if holder in self._away_since:
            self._away_since[holder] = None
            self._due.discard(holder)

    def end(self, holder: object) -> None:
        """Removes a holder."""
        del self._away_since[holder]
        self._due.discard(holder)
        self._late.discard(holder)

    def give_up(self) -> None:
        """Marks the holders that are due as late: no forward waits for them until they have come in time again."""
        self._late |= self._due
        self._due.clear()
