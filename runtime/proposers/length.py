"""How long a proposal should be: as long as it pays, measured, and never so long that a stream could lose much by it."""

from __future__ import annotations

from dataclasses import dataclass, field

# Weight of the newest measurement in a running mean.
_NEWEST = 0.1
_NEWEST_OF_ALL = 0.01
# What was not chosen for so many forwards is tried once more, for what it costs and brings may have changed.
_STALE_FORWARDS = 64
# A stream may take so many times as long as without proposals, and one forward more.
_ALLOWED = 1.02


@dataclass
class Experience:
    """What all sessions of a server have seen of proposals: a new one begins with it, or it would pay for each lesson anew."""

    acceptance: float = 0.5
    seconds: dict[int, float] = field(default_factory=dict)  # Of a forward, by how many tokens were proposed for it.


class ProposalLength:
    """Picks 0 to `most` tokens, from how many were accepted so far and what a forward of so many rows takes.

    With each token accepted with probability p, a forward of k proposed rows brings (1 - p^(k+1)) / (1 - p) tokens
    (arXiv 2211.17192). The length with the most tokens a second is chosen, of those that the stream can afford if not
    one token holds: it lives on what proposals have won so far and on a small share of its own time.
    """

    def __init__(self, most: int, experience: Experience | None = None) -> None:
        self._most = most
        self._experience = experience or Experience()
        self._acceptance = self._experience.acceptance
        self._seconds = self._experience.seconds
        self._since_plain = self._since_tried = 0
        self._spent_s = 0.0
        self._made = 0

    def choose(self) -> int:
        """The length for the next proposal; 0 where one would make the stream slower."""
        if 0 not in self._seconds or self._since_plain >= _STALE_FORWARDS:
            return 0
        affordable = [length for length in range(self._most + 1) if self._can_afford(length)]
        best = max(affordable, key=self._tokens_a_second)
        return 1 if best == 0 and self._since_tried >= _STALE_FORWARDS and 1 in affordable else best

    def learn(self, proposed: int, accepted: int, seconds: float) -> None:
        """Takes what a forward with so many `proposed` tokens came to."""
        self._spent_s += seconds
        self._made += accepted + 1
        before = self._seconds.get(proposed)
        self._seconds[proposed] = seconds if before is None else before + _NEWEST * (seconds - before)
        # Those behind the first rejected one were not judged.
        for index in range(min(accepted + 1, proposed)):
            self._acceptance += _NEWEST * ((index < accepted) - self._acceptance)
        self._experience.acceptance += _NEWEST_OF_ALL * proposed * (self._acceptance - self._experience.acceptance)
        self._since_plain = self._since_plain + 1 if proposed else 0
        self._since_tried = 0 if proposed else self._since_tried + 1

    def _can_afford(self, length: int) -> bool:
        plain = self._seconds[0]
        left = plain * (_ALLOWED * self._made + 1) - self._spent_s
        # Of a length far beyond those that were tried nobody knows what it takes.
        is_known = length <= max(1, 2 * max(self._seconds))
        return length == 0 or (is_known and self._forward_seconds(length) - plain <= left)

    def _tokens_a_second(self, length: int) -> float:
        p = min(self._acceptance, 0.999)
        return (1 - p ** (length + 1)) / (1 - p) / self._forward_seconds(length)

    def _forward_seconds(self, length: int) -> float:
        """What was measured at this length, else what the nearest shorter one that was lets expect."""
        shorter = max(tried for tried in self._seconds if tried <= length)
        known = self._seconds[shorter]
        a_token = max(0.0, known - self._seconds[0]) / shorter if shorter else 0.0
        return known + (length - shorter) * a_token
