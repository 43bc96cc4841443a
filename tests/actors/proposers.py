"""Proposers that do what a test wants of them."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Sequence

import trio

from actors import Runtime
from actors.proposers import Proposer
from actors.proposing import Proposals
from runtime import Sampling
from runtime.proposers.budget import Budget, Experience
from tests.actors.engines import LedgerEngine, generated

PROMPT = [5, 6, 7, *range(20, 50)]
SAMPLINGS = {"greedy": Sampling(), "sampled": Sampling(temperature=1.0, seed=11)}
Making = Callable[[list[int], int], Sequence[int]]


def asked(sampling: Sampling) -> dict[str, float]:
    return {"temperature": sampling.temperature, "seed": sampling.seed}


class Scripted:
    """Proposes what a function makes of the history."""

    def __init__(self, make: Making) -> None:
        self._make = make

    def extend(self, token_ids: Sequence[int]) -> None:
        pass

    def rewind(self, length: int) -> None:
        pass

    async def propose(self, history: array[int], count: int, sampling: Sampling) -> Sequence[int]:
        return self._make([*history], count)

    def close(self) -> None:
        pass


class Eager(Proposals):
    """Proposals at full length, whatever they bring."""

    def learn(self, proposed: int, accepted: int, seconds: float) -> None:
        super().learn(proposed, proposed, 1e-9 if proposed else 1.0)


def eager(proposer: Proposer, most: int, vocabulary: int) -> Eager:
    """Proposals at full length from the first one on."""
    known = Experience(seconds={0: 1.0} | dict.fromkeys(range(1, most + 1), 1e-9))
    return Eager(proposer, Budget(most, known), vocabulary)


def erring(make: Making, wrong: float) -> Scripted:
    """Proposes what `make` does but for a share of `wrong` tokens."""
    chance = random.Random(3)

    def err(history: list[int], count: int) -> list[int]:
        return [(token + 1) % 90 if chance.random() < wrong else token for token in make(history, count)]

    return Scripted(err)


async def converse_as_without(runtime: Runtime, engine: LedgerEngine, sampling: Sampling, sessions: int = 8) -> None:
    """Several turns past the window in sessions side by side; what they come to has to be what the engine makes of it alone."""
    found: dict[int, list[int]] = {}

    async def converse(number: int) -> None:
        session = await runtime.create_session()
        history = [*PROMPT, number]
        await session.append(history)
        for turn in range(3):
            history += await generated(session, 25, **asked(sampling))
            await session.append([turn])
            history.append(turn)
        found[number] = history

    async with trio.open_nursery() as askers:
        for number in range(sessions):
            askers.start_soon(converse, number)

    for number in range(sessions):
        expected = [*PROMPT, number]
        for turn in range(3):
            expected += [*engine.continued(expected, 25, sampling), turn]
        assert found[number] == expected
