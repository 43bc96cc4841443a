"""Prompt lookup: what followed the last tokens when they came before (as in github.com/apoorvumang/prompt-lookup-decoding)."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# What follows a longer match is surer. One token alone recurs everywhere and says nothing.
LONGEST, SHORTEST = 4, 2
MOST_TOKENS = 2**16
# Tokens are forgotten in batches, for each time those that stay are moved.
_SHARE_FORGOTTEN = 1 / 8


class PromptLookup:
    """Searches the last `most_tokens` tokens: tens of microseconds a proposal, and no index that takes seconds to make."""

    def __init__(self, longest: int = LONGEST, shortest: int = SHORTEST, most_tokens: int = MOST_TOKENS) -> None:
        self._longest, self._shortest = longest, shortest
        self._most_tokens = most_tokens
        self._tokens = array("I")

    @staticmethod
    def ceiling_bytes(most_tokens: int = MOST_TOKENS) -> int:
        """Bytes that a look-up can ever hold: an array that grows takes an eighth more than it needs."""
        return int(most_tokens * (1 + _SHARE_FORGOTTEN) ** 2) * array("I").itemsize

    @property
    def size_bytes(self) -> int:
        """Bytes held."""
        return len(self._tokens) * self._tokens.itemsize

    def extend(self, token_ids: Sequence[int]) -> None:
        """Takes what was added to the history."""
        self._tokens.extend(token_ids[-self._most_tokens :])
        if len(self._tokens) > self._most_tokens * (1 + _SHARE_FORGOTTEN):
            self._tokens = self._tokens[-self._most_tokens :]

    def propose(self, count: int) -> Sequence[int]:
        """`count` tokens that may follow the history; none where its last tokens never came before."""
        tokens = np.frombuffer(self._tokens, np.uint32)[-self._most_tokens :]
        follows = self._follows(tokens)
        if follows is None:
            return []
        # Where the match reaches the end of the history, what repeats goes on repeating.
        period = len(tokens) - follows
        return [int(tokens[follows + index % period]) for index in range(count)]

    def _follows(self, tokens: NDArray[np.uint32]) -> int | None:
        """Where that begins which last followed the longest ending of `tokens` that came before."""
        end = len(tokens)
        if end <= self._shortest:
            return None
        # Each place that follows what looks like the ending, from the shortest to the longest that there is.
        candidates = end - self._shortest
        matches = tokens[:candidates] == tokens[candidates]
        for offset in range(1, self._shortest):
            matches &= tokens[offset : offset + candidates] == tokens[candidates + offset]
        places = np.flatnonzero(matches) + self._shortest
        for length in range(self._shortest + 1, self._longest + 1):
            longer = places[places >= length]
            longer = longer[tokens[longer - length] == tokens[end - length]]
            if not len(longer):
                break
            places = longer
        return int(places[-1]) if len(places) else None
