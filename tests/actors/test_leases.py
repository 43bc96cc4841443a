"""For whom a forward waits, and for how long. Time stands still unless a test lets it pass."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from actors.engine_thread import EngineThread
from actors.executor import Lease, ModelExecutor
from actors.messages import Forward
from actors.tree import open_sessions
from runtime import Settings
from runtime.metrics import Metrics
from runtime.rows import Row
from runtime.slab import Slab, SlabPool
from tests.actors.engines import GREEDY, VOCABULARY, LedgerEngine, generated, open_lab, tiny_text
from tests.actors.proposers import Scripted, eager

LONG_S = 1e6


@pytest.fixture
def engine(mock_clock: MockClock) -> LedgerEngine:
    return LedgerEngine(row_tile=8)


@pytest.fixture
def slabs(engine: LedgerEngine) -> SlabPool:
    return engine.new_pool(8)


@pytest.fixture
async def executor(engine: LedgerEngine, nursery: trio.Nursery) -> AsyncIterator[ModelExecutor]:
    with EngineThread() as thread:
        executor = ModelExecutor(engine, thread, Metrics())
        nursery.start_soon(executor.run)
        yield executor


def row_counts(engine: LedgerEngine) -> list[int]:
    return [len(batch.rows) for batch in engine.batches]


async def decode(lease: Lease, slab: Slab) -> None:
    await lease.ask(Forward((Row(slab, 0, 1, GREEDY),), is_prefill=False))


async def test_who_asks_at_once_shares_a_forward(
    executor: ModelExecutor, engine: LedgerEngine, slabs: SlabPool
) -> None:
    async with trio.open_nursery() as askers:
        for _ in range(4):
            askers.start_soon(decode, executor.lease(), slabs.acquire())
    assert row_counts(engine) == [4]


@dataclass(frozen=True)
class Pair:
    """Two who hold leases, and have been in one forward."""

    one: Lease
    other: Lease
    slabs: dict[Lease, Slab]

    async def ask(self, *leases: Lease) -> None:
        """Has them ask, each when those before it wait."""
        async with trio.open_nursery() as askers:
            for lease in leases:
                askers.start_soon(decode, lease, self.slabs[lease])
                await wait_all_tasks_blocked()


@pytest.fixture
async def pair(executor: ModelExecutor, engine: LedgerEngine, slabs: SlabPool) -> AsyncIterator[Pair]:
    with executor.lease() as one, executor.lease() as other:
        pair = Pair(one, other, {one: slabs.acquire(), other: slabs.acquire()})
        async with trio.open_nursery() as askers:
            for lease, slab in pair.slabs.items():
                askers.start_soon(decode, lease, slab)
        engine.batches.clear()
        yield pair


async def test_a_forward_waits_for_who_is_away(pair: Pair, engine: LedgerEngine) -> None:
    await pair.ask(pair.one, pair.other)
    assert row_counts(engine) == [2]


async def test_no_forward_waits_for_who_is_held_up(pair: Pair, engine: LedgerEngine) -> None:
    with pair.other.held_up():
        await pair.ask(pair.one)
    assert row_counts(engine) == [1]


async def test_no_forward_waits_for_who_has_not_asked_yet(
    pair: Pair, executor: ModelExecutor, engine: LedgerEngine
) -> None:
    with executor.lease():
        await pair.ask(pair.one, pair.other)
    assert row_counts(engine) == [2]


async def test_no_forward_waits_for_who_will_ask_no_more(
    executor: ModelExecutor, engine: LedgerEngine, slabs: SlabPool
) -> None:
    mine, others = slabs.acquire(), slabs.acquire()
    with executor.lease() as one:
        async with trio.open_nursery() as askers:
            with executor.lease() as other:
                async with trio.open_nursery() as both:
                    both.start_soon(decode, one, mine)
                    both.start_soon(decode, other, others)
                askers.start_soon(decode, one, mine)
                await wait_all_tasks_blocked()
                assert row_counts(engine) == [2]
    assert row_counts(engine) == [2, 1]


async def test_who_is_late_is_waited_for_once_and_again_when_it_was_in_time(
    pair: Pair, engine: LedgerEngine, mock_clock: MockClock
) -> None:
    async with trio.open_nursery() as askers:
        askers.start_soon(pair.ask, pair.one)
        await wait_all_tasks_blocked()
        assert row_counts(engine) == []
        mock_clock.jump(LONG_S)
    await pair.ask(pair.other, pair.one)
    assert row_counts(engine) == [1, 2]
    await pair.ask(pair.one)
    assert row_counts(engine) == [1, 2, 1]
    await pair.ask(pair.other, pair.one)
    await pair.ask(pair.one, pair.other)
    assert row_counts(engine) == [1, 2, 1, 2, 2]


async def test_streams_stay_in_one_forward(engine: LedgerEngine) -> None:
    async with open_lab(engine) as runtime:
        sessions = [await runtime.create_session() for _ in range(3)]
        for session in sessions:
            await session.append([1])
        async with trio.open_nursery() as readers:
            for session in sessions:
                readers.start_soon(generated, session, 10)
    assert row_counts(engine) == [*[1] * 3, *[3] * 10]


async def test_streams_that_draw_several_tokens_at_once_stay_in_one_forward(engine: LedgerEngine) -> None:
    def right(history: list[int], count: int) -> list[int]:
        return engine.continued(history, count)

    async with open_lab(engine, new_proposals=lambda: eager(Scripted(right), 3, VOCABULARY)) as runtime:
        sessions = [await runtime.create_session() for _ in range(2)]
        for session in sessions:
            await session.append([1, 2, 3])
        async with trio.open_nursery() as readers:
            for session in sessions:
                readers.start_soon(generated, session, 24)
    assert row_counts(engine) == [3, 3, *[8] * 6]


async def test_a_stream_goes_on_beside_one_whose_reader_has_stopped(engine: LedgerEngine) -> None:
    async with open_lab(engine) as runtime:
        sessions = [await runtime.create_session() for _ in range(2)]
        for session in sessions:
            await session.append([1, 2, 3])
        async with sessions[0].generate(10) as events:
            await anext(events)
            await generated(sessions[1], 10)


class CountingThread(EngineThread):
    """Counts the forwards that were begun on it."""

    begun = 0

    def begin(self, end: Callable[[Any], None], function: Callable[..., Any], *args: Any) -> None:
        self.begun += 1
        super().begin(end, function, *args)


async def test_a_reader_has_its_token_when_the_next_forward_has_begun(engine: LedgerEngine) -> None:
    with CountingThread() as thread:
        async with open_sessions(Settings(), engine, thread, tiny_text(), Metrics()) as runtime:
            session = await runtime.create_session()
            await session.append([1])
            async with session.generate(10) as events:
                begun = [thread.begun async for _ in events]
    # One for the prompt, and after the last token none.
    assert begun == [*range(3, 12), 11, 11]
