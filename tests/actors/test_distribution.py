"""What is drawn follows the model's own probabilities, proposed or not."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
import trio
from torch import Tensor

from actors.proposing import NewProposals
from runtime import Token
from runtime.rows import RowBatch
from runtime.sampling import draw_token
from tests.actors.engines import LedgerEngine, generated, open_lab
from tests.actors.proposers import Scripted, eager

TOKENS = 3
DRAWS, SESSIONS = 20_000, 8
TEMPERATURE = 0.7
# Logits of the next token behind each of the three.
LOGITS = torch.tensor([[0.3, -0.5, 1.1], [2.0, 0.0, -2.0], [0.0, 0.0, 0.0]])
# One time in a thousand, by chance, the statistic of 3 x 2 degrees of freedom is larger. The seed is fixed, so it is not.
LARGEST = 22.46


class ChainEngine(LedgerEngine):
    """A model of three tokens that knows the last one only."""

    def forward(self, batch: RowBatch) -> tuple[Token, ...]:
        for row in batch.rows:
            self._write(row)
        return tuple(
            draw_token(LOGITS[row.token_id], row.draw, row.position + 1) for row in batch.rows if row.draw is not None
        )


def always_the_first(history: list[int], count: int) -> Sequence[int]:
    return [0] * count


PROPOSALS: dict[str, NewProposals] = {
    "none": lambda: None,
    "the first": lambda: eager(Scripted(always_the_first), 2, TOKENS),
}


def statistic(found: Sequence[Sequence[int]], probabilities: Tensor) -> float:
    """Pearson's chi-squared of what follows each token against its probabilities."""
    counts = torch.zeros(TOKENS, TOKENS, dtype=torch.float64)
    for tokens in found:
        for before, after in pairwise(tokens):
            counts[before, after] += 1
    expected = counts.sum(dim=1, keepdim=True) * probabilities
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("new_proposals", PROPOSALS.values(), ids=PROPOSALS)
async def test_twenty_thousand_draws_follow_the_probabilities(new_proposals: NewProposals) -> None:
    found: list[list[int]] = []

    async def generate(seed: int) -> None:
        session = await runtime.create_session()
        await session.append([0])
        found.append(await generated(session, DRAWS // SESSIONS, temperature=TEMPERATURE, seed=seed))

    async with open_lab(ChainEngine(layers=1), new_proposals=new_proposals) as runtime, trio.open_nursery() as askers:
        for seed in range(SESSIONS):
            askers.start_soon(generate, seed)

    assert sum(map(len, found)) == DRAWS
    assert statistic(found, torch.softmax(LOGITS.double() / TEMPERATURE, dim=1)) < LARGEST
    assert statistic(found, torch.softmax(LOGITS.double() / (TEMPERATURE + 0.1), dim=1)) > LARGEST
