"""Prompt lookup: what followed the last tokens when they came before (as in github.com/apoorvumang/prompt-lookup-decoding)."""

from __future__ import annotations

from collections.abc import Sequence

# What follows a longer match is surer. One token alone recurs everywhere and says nothing.
LONGEST, SHORTEST = 4, 2
MOST_TOKENS = 2**16


class NgramProposer:
    """An index of the last `most_tokens` tokens by the n-grams that they follow; a token costs a few look-ups."""

    def __init__(self, longest: int = LONGEST, shortest: int = SHORTEST, most_tokens: int = MOST_TOKENS) -> None:
        self._lengths = range(longest, shortest - 1, -1)
        self._most_tokens = most_tokens
        self._ring: list[int] = []  # The token at a position lies at the position modulo `most_tokens`.
        self._count = 0
        self._after: dict[tuple[int, ...], int] = {}  # For each n-gram, the position that last followed it.

    @property
    def size(self) -> int:
        """Entries held, in tokens and n-grams."""
        return len(self._ring) + len(self._after)

    def extend(self, token_ids: Sequence[int]) -> None:
        for token_id in token_ids:
            for length in self._lengths:
                if gram := self._gram(self._count - length, length):
                    self._after[gram] = self._count
            if self._count < self._most_tokens:
                self._ring.append(token_id)
            else:
                self._forget_oldest()
                self._ring[self._count % self._most_tokens] = token_id
            self._count += 1

    def propose(self, count: int) -> Sequence[int]:
        for length in self._lengths:
            gram = self._gram(self._count - length, length)
            if gram and (begin := self._after.get(gram)) is not None:
                # Where the match reaches the end of the history, what repeats goes on repeating.
                period = self._count - begin
                return [self._token(begin + index % period) for index in range(count)]
        return []

    def _token(self, position: int) -> int:
        return self._ring[position % self._most_tokens]

    def _gram(self, begin: int, length: int) -> tuple[int, ...]:
        """The n-gram at `begin`; empty where it is not held any more, or not yet."""
        if begin < max(0, self._count - self._most_tokens):
            return ()
        return tuple(self._token(position) for position in range(begin, begin + length))

    def _forget_oldest(self) -> None:
        oldest = self._count - self._most_tokens
        for length in self._lengths:
            gram = self._gram(oldest, length)
            if self._after.get(gram) == oldest + length:
                del self._after[gram]
