"""Who comes back to the executor with more rows, and whom of them a forward waits for."""

from __future__ import annotations

# A wait costs those that wait an eighth of a forward at most, and who misses a forward waits for a whole one.
_SHARE_OF_A_FORWARD = 1 / 8
# What some steps of a busy event loop take: sessions of the smallest model share forwards too.
_LEAST_S = 0.001


class Leases:
    """Their holders ask for rows again and again. A forward waits a while for each that is away, unless it was late before.

    A holder is away when it neither asks nor is held up by somebody else, and late when a forward waited for it in vain:
    an event loop that is busy makes nobody late who comes as soon as it can.
    """

    def __init__(self) -> None:
        self._away_since: dict[object, float | None] = {}
        self._due: set[object] = set()
        self._late: set[object] = set()
        self._patience_s = _LEAST_S

    @property
    def patience_s(self) -> float:
        """How long a forward waits for those that are due."""
        return self._patience_s

    @property
    def is_anyone_due(self) -> bool:
        return bool(self._due)

    def measure(self, forward_s: float) -> None:
        """Takes how long a forward took."""
        self._patience_s = max(_LEAST_S, forward_s * _SHARE_OF_A_FORWARD)

    def begin(self, holder: object) -> None:
        """The holder will ask. Nobody waits for its first rows."""
        self._away_since[holder] = None

    def expect(self, holder: object, now: float) -> None:
        """From now on the holder is away; one without a lease is not expected."""
        if holder in self._away_since:
            self._away_since[holder] = now
            if holder not in self._late:
                self._due.add(holder)

    def arrive(self, holder: object, now: float) -> bool:
        """The holder asks, and is waited for again where it was late and came in time now. Says whether it was expected."""
        since = self._away_since.get(holder)
        if since is not None and now - since <= self._patience_s:
            self._late.discard(holder)
        self.excuse(holder)
        return since is not None

    def excuse(self, holder: object) -> None:
        """The holder asks, or is held up."""
        if holder in self._away_since:
            self._away_since[holder] = None
            self._due.discard(holder)

    def end(self, holder: object) -> None:
        """The holder asks no more."""
        del self._away_since[holder]
        self._due.discard(holder)
        self._late.discard(holder)

    def give_up(self) -> None:
        """Those that are due are late: no forward waits for them until they have been in time again."""
        self._late |= self._due
        self._due.clear()
