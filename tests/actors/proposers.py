"""Proposers that do what a test wants of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from actors.proposing import AtOnce, Proposals
from runtime.proposers import Proposer

Making = Callable[[list[int], int], Sequence[int]]


class Scripted:
    """Proposes what a function makes of the history."""

    def __init__(self, make: Making) -> None:
        self._make = make
        self.history: list[int] = []

    def extend(self, token_ids: Sequence[int]) -> None:
        self.history += token_ids

    def propose(self, count: int) -> Sequence[int]:
        return self._make(self.history, count)


class Eager(Proposals):
    """Proposals at full length, whatever they bring."""

    def learn(self, proposed: int, accepted: int, seconds: float) -> None:
        super().learn(proposed, proposed, 1e-9 if proposed else 1.0)


def eager(proposer: Proposer, most: int, vocabulary: int) -> Eager:
    """Eager ones, of a proposer that needs no forward."""
    return Eager(AtOnce(proposer), most, vocabulary)


def erring(make: Making, wrong: float) -> Scripted:
    """Proposes what `make` does but for a share of `wrong` tokens."""
    chance = random.Random(3)

    def err(history: list[int], count: int) -> list[int]:
        return [(token + 1) % 90 if chance.random() < wrong else token for token in make(history, count)]

    return Scripted(err)
