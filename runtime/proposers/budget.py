"""How long a proposal should be: as long as it pays, measured, and never so long that a stream could lose much by it."""

from __future__ import annotations

from collections.abc import Mapping

# Weight of the newest measurement in a running mean.
_NEWEST = 0.1
_NEWEST_OF_ALL = 0.01
# What was not chosen for so many forwards is tried once more, for what it costs and brings may have changed.
_STALE_FORWARDS = 64
# A stream may take so many times as long as without proposals, and one forward more.
_ALLOWED = 1.02


class Experience:
    """What all sessions of a server have seen of proposals: a new one begins with it, or it would pay for each lesson anew."""

    def __init__(self, acceptance: float = 0.5, seconds: Mapping[int, float] | None = None) -> None:
        """The share of proposed tokens that were accepted, and the seconds of a forward by how many were proposed for it."""
        self._acceptance = acceptance
        self._seconds = dict(seconds or {})

    @property
    def acceptance(self) -> float:
        """The share of proposed tokens that were accepted."""
        return self._acceptance

    @property
    def longest(self) -> int | None:
        """The most tokens that were ever proposed for a forward; none where no forward was timed without a proposal."""
        return max(self._seconds) if 0 in self._seconds else None

    def forward_seconds(self, length: int) -> float:
        """What a forward takes with so many proposed tokens: measured, or expected from the nearest shorter proposal."""
        shorter = max(tried for tried in self._seconds if tried <= length)
        known = self._seconds[shorter]
        a_token = max(0.0, known - self._seconds[0]) / shorter if shorter else 0.0
        return known + (length - shorter) * a_token

    def learn(self, proposed: int, seconds: float, acceptance: float) -> None:
        """Takes how long a forward with so many `proposed` tokens took, and what its session has seen accepted lately."""
        before = self._seconds.get(proposed)
        self._seconds[proposed] = seconds if before is None else before + _NEWEST * (seconds - before)
        self._acceptance += _NEWEST_OF_ALL * proposed * (acceptance - self._acceptance)


class Budget:
    """Picks 0 to `most` tokens, from how many were accepted so far and what a forward of so many rows takes.

    With each token accepted with probability p, a forward of k proposed rows brings (1 - p^(k+1)) / (1 - p) tokens
    (arXiv 2211.17192). The length with the most tokens a second is chosen, of those that the stream can afford if not
    one token holds: it may spend only the time that proposals have saved it, and 2 % of its own.
    """

    def __init__(self, most: int, experience: Experience) -> None:
        self._most = most
        self._experience = experience
        self._acceptance = experience.acceptance
        self._since_plain = self._since_tried = 0
        self._spent_s = 0.0
        self._made = 0

    def choose(self) -> int:
        """The length for the next proposal; 0 where one would make the stream slower."""
        longest = self._experience.longest
        if longest is None or self._since_plain >= _STALE_FORWARDS:
            return 0
        # Nobody knows what a length takes that is far beyond those that were tried.
        known = range(min(self._most, max(1, 2 * longest)) + 1)
        affordable = [length for length in known if self._can_afford(length)]
        best = max(affordable, key=self._tokens_a_second)
        return 1 if best == 0 and self._since_tried >= _STALE_FORWARDS and 1 in affordable else best

    def learn(self, proposed: int, accepted: int, seconds: float) -> None:
        """Takes what a forward with so many `proposed` tokens came to."""
        self._spent_s += seconds
        self._made += accepted + 1
        # Those behind the first rejected one were not judged.
        for index in range(min(accepted + 1, proposed)):
            self._acceptance += _NEWEST * ((index < accepted) - self._acceptance)
        self._experience.learn(proposed, seconds, self._acceptance)
        self._since_plain = self._since_plain + 1 if proposed else 0
        self._since_tried = 0 if proposed else self._since_tried + 1

    def _can_afford(self, length: int) -> bool:
        if length == 0:
            return True
        plain = self._experience.forward_seconds(0)
        left = plain * (_ALLOWED * self._made + 1) - self._spent_s
        return self._experience.forward_seconds(length) - plain <= left

    def _tokens_a_second(self, length: int) -> float:
        p = min(self._acceptance, 0.999)
        return (1 - p ** (length + 1)) / (1 - p) / self._experience.forward_seconds(length)
