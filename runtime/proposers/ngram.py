"""Prompt lookup: proposes what followed the last tokens before (as in github.com/apoorvumang/prompt-lookup-decoding)."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Lengths of matches. A longer match predicts better; a match of one token predicts nothing.
LONGEST, SHORTEST = 4, 2
MOST_TOKENS = 2**16
# Tokens are forgotten in batches, because each time the others are moved.
_SHARE_FORGOTTEN = 1 / 8


class PromptLookup:
    """Searches the last `most_tokens` tokens: that takes tens of microseconds, and needs no index that takes seconds to build."""

    def __init__(self, longest: int = LONGEST, shortest: int = SHORTEST, most_tokens: int = MOST_TOKENS) -> None:
        self._longest, self._shortest = longest, shortest
        self._most_tokens = most_tokens
        self._tokens = array("I")

    @staticmethod
    def ceiling_bytes(most_tokens: int = MOST_TOKENS) -> int:
        """The most bytes that a lookup can hold: a growing array takes an eighth more than it needs."""
        return int(most_tokens * (1 + _SHARE_FORGOTTEN) ** 2) * array("I").itemsize

    def extend(self, token_ids: Sequence[int]) -> None:
        """Records that these tokens were added to the history."""
        self._tokens.extend(token_ids[-self._most_tokens :])
        if len(self._tokens) > self._most_tokens * (1 + _SHARE_FORGOTTEN):
            self._tokens = self._tokens[-self._most_tokens :]

    def propose(self, count: int) -> Sequence[int]:
        """`count` tokens that may follow the history; none if its last tokens never occurred before."""
        tokens = np.frombuffer(self._tokens, np.uint32)[-self._most_tokens :]
        follows = self._follows(tokens)
        if follows is None:
            return []
        # If the match reaches the end of the history, the repetition is continued.
        period = len(tokens) - follows
        return [int(tokens[follows + index % period]) for index in range(count)]

    def _follows(self, tokens: NDArray[np.uint32]) -> int | None:
        """The place after the latest earlier occurrence of the longest ending of `tokens` that has one."""
        end = len(tokens)
        if end <= self._shortest:
            return None
        # Places after an occurrence of the ending: of the shortest ending first, then of ever longer ones while there are
        # any.
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
