"""Drafts of a smaller model: nothing of them is seen but speed, and what they cost is bounded."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import trio

from actors.engine_thread import EngineThread
from actors.executor import ModelExecutor
from actors.proposers import DraftProposer
from actors.proposing import NewProposals
from runtime import Done, Sampling, Token
from runtime.metrics import Metrics
from runtime.proposers.budget import Budget, Experience
from runtime.slab import SlabPool
from tests.actors.engines import VOCABULARY, LedgerEngine, generated, open_lab, sample
from tests.actors.proposers import PROMPT, SAMPLINGS, Eager, converse_as_without

BLOCK = 5


@dataclass(frozen=True)
class Draft:
    """A model that drafts, and the slabs that drafts are written into."""

    engine: LedgerEngine
    slabs: SlabPool
    new_proposals: NewProposals

    @property
    def rows(self) -> int:
        return sum(len(batch.rows) for batch in self.engine.batches)


@asynccontextmanager
async def drafting(engine: LedgerEngine, slabs: int = 8) -> AsyncIterator[Draft]:
    """Drafts at full length by a model, in no more than so many sessions."""
    pool = engine.new_pool(slabs)
    with EngineThread() as thread:
        executor = ModelExecutor(engine, thread, Metrics())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(executor.run)
            yield Draft(
                engine, pool, lambda: Eager(DraftProposer(pool, executor), Budget(BLOCK, Experience()), VOCABULARY)
            )
            nursery.cancel_scope.cancel()


@pytest.fixture
def engine() -> LedgerEngine:
    return LedgerEngine()


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("window", [14, 5], ids=["that thinks alike", "that sees less"])
async def test_tokens_are_those_without_a_draft_past_the_window_and_beside_others(
    engine: LedgerEngine, window: int, sampling: Sampling
) -> None:
    metrics = Metrics()
    async with (
        drafting(LedgerEngine(window=window)) as draft,
        open_lab(engine, metrics, new_proposals=draft.new_proposals) as runtime,
    ):
        await converse_as_without(runtime, engine, sampling)

    proposed, accepted = (sample(metrics, f"{kind}_tokens_total") for kind in ("proposed", "accepted"))
    assert proposed > 0
    assert (accepted == proposed) == (window == 14)


async def test_drafts_of_several_sessions_run_in_one_forward() -> None:
    async with (
        drafting(LedgerEngine()) as draft,
        open_lab(LedgerEngine(), new_proposals=draft.new_proposals) as runtime,
    ):
        sessions = [await runtime.create_session() for _ in range(4)]
        for session in sessions:
            await session.append(PROMPT)
        async with trio.open_nursery() as askers:
            for session in sessions:
                askers.start_soon(generated, session, 40)

    assert max(len({id(row.slab) for row in batch.rows}) for batch in draft.engine.batches) > 1


@pytest.mark.parametrize("taken", range(1, 10))
async def test_a_generation_that_was_left_in_the_middle_of_a_draft_goes_on(engine: LedgerEngine, taken: int) -> None:
    async with drafting(LedgerEngine()) as draft, open_lab(engine, new_proposals=draft.new_proposals) as runtime:
        session = await runtime.create_session()
        await session.append(PROMPT)
        got = []
        async with session.generate(100) as events:
            async for event in events:
                if isinstance(event, Token):
                    got.append(event.token_id)
                if len(got) == taken:
                    break
        length = (await session.info()).history_length
        async with session.generate(20) as events:
            rest = [event async for event in events]

    history = engine.continued(PROMPT, 60)
    assert got == history[:taken]
    assert [event.token_id for event in rest if isinstance(event, Token)] == history[length - len(PROMPT) :][:20]
    done = rest[-1]
    assert isinstance(done, Done)
    assert done.accepted_token_count == done.proposed_token_count > 0


async def test_a_fork_of_a_long_session_drafts_from_its_sinks_and_window_alone(engine: LedgerEngine) -> None:
    long = [token % 90 for token in range(500)]
    async with drafting(LedgerEngine()) as draft, open_lab(engine, new_proposals=draft.new_proposals) as runtime:
        session = await runtime.create_session()
        await session.append(long)
        fork = await runtime.fork_session(session.id)
        before = draft.rows

        # The first token is not drafted: what one costs without has to be known first.
        assert await generated(fork, 2 + BLOCK) == engine.continued(long, 2 + BLOCK)

        spec = draft.engine.spec
        assert 0 < draft.rows - before <= spec.visible + 2 * BLOCK


async def test_slabs_of_drafts_are_free_again_however_a_session_ends(engine: LedgerEngine) -> None:
    async with (
        drafting(LedgerEngine(), slabs=2) as draft,
        open_lab(engine, new_proposals=draft.new_proposals, capacity=1, max_concurrent=1) as runtime,
    ):
        for _ in range(4):
            # Each evicts the one before.
            session = await runtime.create_session()
            await session.append(PROMPT)
            await generated(session, 10)
        assert draft.slabs.in_use == 1
        await session.close()
        assert draft.slabs.in_use == 0
