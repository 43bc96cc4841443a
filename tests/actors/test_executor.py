"""What runs in the next forward, on which thread, and what becomes of those who wait when the engine fails."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from actors.engine_thread import EngineThread
from actors.executor import ModelExecutor
from actors.mailbox import ActorFailed, ActorStopped
from actors.messages import Forward, Ran
from runtime.engine import EngineFacts
from runtime.errors import EngineFailed
from runtime.events import Token
from runtime.metrics import Metrics
from runtime.rows import Row, RowBatch
from runtime.slab import Slab, SlabPool
from tests.actors.engines import BREAKS, BREAKS_BADLY, DRAWS_NOTHING, GREEDY, BrokenBadly, LedgerEngine, sample

Answers = dict[str, Ran | type[Exception]]


@pytest.fixture
def engine() -> LedgerEngine:
    return LedgerEngine(row_tile=8)


@pytest.fixture
def slabs(engine: LedgerEngine) -> SlabPool:
    return engine.new_pool(20)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@dataclass(frozen=True)
class Lab:
    """An executor, and a nursery for those who ask it."""

    engine: LedgerEngine
    executor: ModelExecutor
    askers: trio.Nursery

    async def ask_in_order(self, messages: dict[str, Forward], answers: Answers | None = None) -> None:
        for name, message in messages.items():
            self.askers.start_soon(answer, self.executor, message, name, {} if answers is None else answers)
            await wait_all_tasks_blocked()

    async def hold_a_forward(self, slab: Slab) -> None:
        self.engine.hold()
        self.askers.start_soon(self.executor.lease().ask, decode(slab))
        await self.engine.begun()


@asynccontextmanager
async def open_lab(engine: LedgerEngine, metrics: Metrics) -> AsyncIterator[Lab]:
    """Lets every forward go on when the block ends, and waits until all askers have their answers."""
    with EngineThread() as thread:
        executor = ModelExecutor(engine, thread, metrics)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(executor.run)
            async with trio.open_nursery() as askers:
                try:
                    yield Lab(engine, executor, askers)
                finally:
                    engine.open()
            nursery.cancel_scope.cancel()


def drawn(engine: LedgerEngine, history: list[int]) -> tuple[Token, ...]:
    """The token that follows a history."""
    (token_id,) = engine.continued(history, 1)
    return (Token(token_id),)


def decode(slab: Slab, token_id: int = 1) -> Forward:
    return Forward((Row(slab, 0, token_id, GREEDY),), is_prefill=False)


def prefill(slab: Slab, count: int, start: int = 0) -> Forward:
    return Forward(tuple(Row(slab, position, 1) for position in range(start, start + count)), is_prefill=True)


async def answer(executor: ModelExecutor, message: Forward, name: str, answers: Answers) -> None:
    try:
        answers[name] = await executor.lease().ask(message)
    except (ActorStopped, ActorFailed) as error:
        answers[name] = type(error)


def named(batch: RowBatch, slabs: dict[str, Slab]) -> list[str]:
    """The owner of each row, in row order."""
    return [next(name for name, slab in slabs.items() if slab is row.slab) for row in batch.rows]


async def batch_after_a_held_one(
    engine: LedgerEngine, metrics: Metrics, spare: Slab, messages: Sequence[Forward]
) -> tuple[RowBatch, Answers]:
    """The forward that follows one during which `messages` came in this order, and what each was answered."""
    answers: Answers = {}
    async with open_lab(engine, metrics) as lab:
        await lab.hold_a_forward(spare)
        await lab.ask_in_order({str(index): message for index, message in enumerate(messages)}, answers)
        engine.end()
        batch = await engine.begun()
    return batch, answers


async def test_one_forward_takes_decode_and_prefill_rows_of_several_sessions(
    engine: LedgerEngine, metrics: Metrics, slabs: SlabPool
) -> None:
    a, b, c, spare = (slabs.acquire() for _ in range(4))
    batch, _ = await batch_after_a_held_one(engine, metrics, spare, [decode(a), decode(b), prefill(c, 5)])
    assert named(batch, {"a": a, "b": b, "c": c}) == ["a", "b", *"ccccc"]


async def test_decode_rows_run_before_prefill_rows_that_came_first(
    engine: LedgerEngine, metrics: Metrics, slabs: SlabPool
) -> None:
    a, b, spare = (slabs.acquire() for _ in range(3))
    batch, _ = await batch_after_a_held_one(engine, metrics, spare, [prefill(a, 8), decode(b)])
    assert named(batch, {"a": a, "b": b}) == ["b", *"aaaaaaa"]


async def test_a_quarter_of_the_tile_is_kept_for_prefill(
    engine: LedgerEngine, metrics: Metrics, slabs: SlabPool
) -> None:
    decoding, prefilling, spare = [slabs.acquire() for _ in range(9)], slabs.acquire(), slabs.acquire()
    messages = [*map(decode, decoding), prefill(prefilling, 8)]
    batch, _ = await batch_after_a_held_one(engine, metrics, spare, messages)
    assert [row.slab is prefilling for row in batch.rows] == [False] * 6 + [True] * 2


async def test_decode_rows_fill_the_tile_where_nothing_is_prefilled(
    engine: LedgerEngine, metrics: Metrics, slabs: SlabPool
) -> None:
    decoding, spare = [slabs.acquire() for _ in range(10)], slabs.acquire()
    batch, _ = await batch_after_a_held_one(engine, metrics, spare, [decode(slab) for slab in decoding])
    assert [row.slab for row in batch.rows] == decoding[:8]


async def test_prefill_gets_all_that_decode_leaves(engine: LedgerEngine, metrics: Metrics, slabs: SlabPool) -> None:
    a, b, c, spare = (slabs.acquire() for _ in range(4))
    batch, _ = await batch_after_a_held_one(engine, metrics, spare, [decode(a), prefill(b, 4), prefill(c, 8)])
    assert named(batch, {"a": a, "b": b, "c": c}) == ["a", *"bbbb", *"ccc"]


@pytest.mark.parametrize(("streams", "prompt_rows"), [(0, 64), (1, 32), (20, 32), (40, 24), (60, 8)])
async def test_a_prompt_takes_a_large_tile_alone_and_a_share_beside_streams(
    metrics: Metrics, streams: int, prompt_rows: int
) -> None:
    engine = LedgerEngine(window=100, row_tile=64)
    slabs = engine.new_pool(streams + 2)
    prefilling, spare = slabs.acquire(), slabs.acquire()
    messages = [*(decode(slabs.acquire()) for _ in range(streams)), prefill(prefilling, 64)]
    batch, _ = await batch_after_a_held_one(engine, metrics, spare, messages)
    assert [row.slab is prefilling for row in batch.rows].count(True) == prompt_rows


class PaddingEngine(LedgerEngine):
    """Pads a forward's rows to a multiple of eight."""

    @property
    def facts(self) -> EngineFacts:
        return replace(super().facts, row_step=8)


@pytest.mark.parametrize(("streams", "prompt_rows"), [(0, 64), (1, 31), (14, 26), (40, 24), (56, 8)])
async def test_a_prompt_fills_what_a_forward_is_padded_to_anyway_and_pads_no_further(
    metrics: Metrics, streams: int, prompt_rows: int
) -> None:
    engine = PaddingEngine(window=100, row_tile=64)
    slabs = engine.new_pool(streams + 2)
    prefilling, spare = slabs.acquire(), slabs.acquire()
    messages = [*(decode(slabs.acquire()) for _ in range(streams)), prefill(prefilling, 64)]
    batch, _ = await batch_after_a_held_one(engine, metrics, spare, messages)
    assert [row.slab is prefilling for row in batch.rows].count(True) == prompt_rows


async def test_an_asker_is_told_how_many_of_its_rows_ran(
    engine: LedgerEngine, metrics: Metrics, slabs: SlabPool
) -> None:
    a, b, spare = (slabs.acquire() for _ in range(3))
    _, answers = await batch_after_a_held_one(engine, metrics, spare, [prefill(a, 6), prefill(b, 6)])
    assert answers == {"0": Ran(6, ()), "1": Ran(2, ())}


async def test_an_asker_gets_the_tokens_that_its_own_rows_drew(
    engine: LedgerEngine, metrics: Metrics, slabs: SlabPool
) -> None:
    a, b, spare = (slabs.acquire() for _ in range(3))
    messages = [decode(a, 11), Forward((Row(b, 0, 22), Row(b, 1, 33, GREEDY)), is_prefill=True)]
    _, answers = await batch_after_a_held_one(engine, metrics, spare, messages)
    assert answers == {
        "0": Ran(1, drawn(engine, [11])),
        "1": Ran(2, drawn(engine, [22, 33])),
    }


async def test_rows_that_found_no_room_run_before_those_that_came_later(
    engine: LedgerEngine, metrics: Metrics, slabs: SlabPool
) -> None:
    waiting, later = [slabs.acquire() for _ in range(10)], slabs.acquire()
    async with open_lab(engine, metrics) as lab:
        await lab.hold_a_forward(slabs.acquire())
        await lab.ask_in_order({str(index): decode(slab) for index, slab in enumerate(waiting)})
        engine.end()
        await engine.begun()
        await lab.ask_in_order({"later": decode(later)})
        engine.end()
        batch = await engine.begun()
    assert [row.slab for row in batch.rows] == [*waiting[8:], later]


async def test_long_prefills_take_turns(engine: LedgerEngine, metrics: Metrics, slabs: SlabPool) -> None:
    held = {"a": slabs.acquire(), "b": slabs.acquire()}
    owners: list[str] = []

    async def feed(executor: ModelExecutor, slab: Slab) -> None:
        for start in range(0, 24, 8):
            await executor.lease().ask(prefill(slab, 8, start))

    async with open_lab(engine, metrics) as lab:
        await lab.hold_a_forward(slabs.acquire())
        for slab in held.values():
            lab.askers.start_soon(feed, lab.executor, slab)
            await wait_all_tasks_blocked()
        for _ in range(6):
            engine.end()
            owners.append("".join(set(named(await engine.begun(), held))))
    assert owners == ["a", "b", "a", "b", "a", "b"]


async def test_sessions_once_in_one_forward_stay_in_one_forward(
    engine: LedgerEngine, metrics: Metrics, slabs: SlabPool
) -> None:
    async def decode_five(executor: ModelExecutor, slab: Slab) -> None:
        with executor.lease() as lease:
            for position in range(5):
                await lease.ask(Forward((Row(slab, position, 1, GREEDY),), is_prefill=False))

    async with open_lab(engine, metrics) as lab:
        await lab.hold_a_forward(slabs.acquire())
        for _ in range(2):
            lab.askers.start_soon(decode_five, lab.executor, slabs.acquire())
        await wait_all_tasks_blocked()
    assert [len(batch.rows) for batch in engine.batches] == [1, *[2] * 5]


@pytest.mark.parametrize("leaver", [0, 9], ids=["before it is taken", "after it found no room"])
async def test_an_asker_that_left_is_passed_over(
    engine: LedgerEngine, metrics: Metrics, slabs: SlabPool, leaver: int
) -> None:
    held = [slabs.acquire() for _ in range(10)]
    leaving = trio.CancelScope()

    async def ask(executor: ModelExecutor, index: int) -> None:
        with leaving if index == leaver else trio.CancelScope():
            await executor.lease().ask(decode(held[index]))

    async with open_lab(engine, metrics) as lab:
        await lab.hold_a_forward(slabs.acquire())
        for index in range(10):
            lab.askers.start_soon(ask, lab.executor, index)
            await wait_all_tasks_blocked()
        if leaver == 9:
            engine.end()
            await engine.begun()
        leaving.cancel()
        await wait_all_tasks_blocked()
    ran = [row.slab for batch in engine.batches[1:] for row in batch.rows]
    assert ran == [slab for index, slab in enumerate(held) if index != leaver]


async def test_an_executor_whose_only_asker_left_waits_for_others(
    engine: LedgerEngine, metrics: Metrics, slabs: SlabPool
) -> None:
    leaving = trio.CancelScope()

    async def ask_and_leave(executor: ModelExecutor) -> None:
        with leaving:
            await executor.lease().ask(decode(slabs.acquire()))

    async with open_lab(engine, metrics) as lab:
        await lab.hold_a_forward(slabs.acquire())
        lab.askers.start_soon(ask_and_leave, lab.executor)
        await wait_all_tasks_blocked()
        leaving.cancel()
        await wait_all_tasks_blocked()
        engine.open()
        await lab.executor.lease().ask(decode(slabs.acquire()))
    assert len(engine.batches) == 2


async def test_forwards_are_counted_with_their_rows(engine: LedgerEngine, metrics: Metrics, slabs: SlabPool) -> None:
    async with open_lab(engine, metrics) as lab:
        await lab.executor.lease().ask(prefill(slabs.acquire(), 8))
        await lab.executor.lease().ask(decode(slabs.acquire()))
    assert sample(metrics, "forward_rows_count") == 2
    assert sample(metrics, "forward_rows_sum") == 9
    assert sample(metrics, "forward_duration_seconds_count") == 2


async def fail(engine: LedgerEngine, metrics: Metrics, slabs: SlabPool, fault: int, answers: Answers) -> None:
    """Has a row fail with others beside it, some that found no room, and one that came during that forward."""
    with EngineThread() as thread:
        executor = ModelExecutor(engine, thread, metrics)
        # Those who ask outlive the executor, as the handlers of a server may.
        async with trio.open_nursery() as askers:
            lab = Lab(engine, executor, askers)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(executor.run)
                await lab.hold_a_forward(slabs.acquire())
                messages = {"fails": decode(slabs.acquire(), fault)}
                messages |= {f"beside {index}": decode(slabs.acquire()) for index in range(7)}
                messages |= {f"no room {index}": decode(slabs.acquire()) for index in range(2)}
                await lab.ask_in_order(messages, answers)
                engine.end()
                await engine.begun()
                await lab.ask_in_order({"late": decode(slabs.acquire())}, answers)
                engine.end()
                await trio.sleep_forever()


EVERYONE_IS_TOLD: Answers = {
    "fails": ActorFailed,
    **{f"beside {index}": ActorFailed for index in range(7)},
    **{f"no room {index}": ActorStopped for index in range(2)},
    "late": ActorStopped,
}


@pytest.mark.parametrize("fault", [BREAKS, DRAWS_NOTHING], ids=["raises", "draws too little"])
async def test_when_the_engine_fails_everyone_who_waits_is_told(
    engine: LedgerEngine, metrics: Metrics, slabs: SlabPool, fault: int
) -> None:
    answers: Answers = {}
    with pytest.RaisesGroup(EngineFailed, flatten_subgroups=True):
        await fail(engine, metrics, slabs, fault, answers)
    assert answers == EVERYONE_IS_TOLD


async def test_when_the_engine_raises_beside_every_exception_everyone_is_told_too(
    engine: LedgerEngine, metrics: Metrics, slabs: SlabPool
) -> None:
    answers: Answers = {}
    with pytest.RaisesGroup(BrokenBadly, flatten_subgroups=True):
        await fail(engine, metrics, slabs, BREAKS_BADLY, answers)
    assert answers == EVERYONE_IS_TOLD


async def test_an_executor_that_is_cancelled_answers_the_forward_under_way_and_tells_all_others(
    engine: LedgerEngine, metrics: Metrics, slabs: SlabPool
) -> None:
    answers: Answers = {}
    engine.hold()
    with EngineThread() as thread:
        executor = ModelExecutor(engine, thread, metrics)
        async with trio.open_nursery() as askers, trio.open_nursery() as nursery:
            nursery.start_soon(executor.run)
            lab = Lab(engine, executor, askers)
            await lab.ask_in_order({"under way": decode(slabs.acquire())}, answers)
            await engine.begun()
            await lab.ask_in_order({"waits": decode(slabs.acquire())}, answers)
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await wait_all_tasks_blocked()
                assert not answers
            engine.end()
    assert answers == {"under way": Ran(1, drawn(engine, [1])), "waits": ActorStopped}


async def test_every_call_of_the_engine_runs_on_one_thread_of_its_own(
    engine: LedgerEngine, metrics: Metrics, slabs: SlabPool
) -> None:
    async with open_lab(engine, metrics) as lab:
        for _ in range(5):
            await lab.executor.lease().ask(decode(slabs.acquire()))
    assert len(engine.threads) == 1
    assert threading.get_ident() not in engine.threads


async def test_the_engine_thread_returns_what_its_function_returns() -> None:
    with EngineThread() as thread:
        assert await thread.run(divmod, 7, 2) == (3, 1)


async def test_the_engine_thread_raises_what_its_function_raises() -> None:
    with EngineThread() as thread, pytest.raises(ZeroDivisionError):
        await thread.run(divmod, 1, 0)


async def test_a_cancelled_caller_of_the_engine_thread_waits_for_its_function() -> None:
    may_end = threading.Event()
    results: list[bool] = []

    async def call(thread: EngineThread) -> None:
        results.append(await thread.run(may_end.wait))

    with EngineThread() as thread, trio.CancelScope() as leaving:
        async with trio.open_nursery() as callers:
            callers.start_soon(call, thread)
            await wait_all_tasks_blocked()
            leaving.cancel()
            with trio.CancelScope(shield=True):
                await wait_all_tasks_blocked()
                assert not results
            may_end.set()
    assert results == [True]
