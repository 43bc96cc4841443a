"""Servers that share one store: a session is served by one at a time, and goes on at the next one as if nothing had been."""

from __future__ import annotations

import threading
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from obstore.store import MemoryStore, ObjectStore

from actors import Events, Runtime, SessionHandle
from runtime.durable import SharedStore, SlabIdentity
from runtime.durable.objects import Objects
from runtime.errors import (
    HistoryMismatch,
    InvariantViolation,
    SessionMoved,
    SessionNotFound,
    SnapshotNotFound,
    StorageFailed,
)
from runtime.events import Done, Overflow, StopReason, Token
from runtime.metrics import Metrics
from runtime.sessions import SessionInfo
from tests.actors.engines import SKIPS_A_LAYER, LedgerEngine, generated, open_lab, sample
from tests.actors.test_durable import ENGINE, MODEL, OTHER_ENGINE, PROMPT
from tests.runtime.durable.buckets import Fault, FaultyObjects
from tests.runtime.durable.test_session_log import of_a_newer_format

FOR_EVER = 1e9


@asynccontextmanager
async def open_server(
    bucket: ObjectStore | Objects,
    engine: SlabIdentity = ENGINE,
    *,
    lease_s: float = FOR_EVER,
    group_s: float = 0.0,
    metrics: Metrics | None = None,
    lab: LedgerEngine | None = None,
    **settings: Any,
) -> AsyncIterator[Runtime]:
    """A runtime on a ledger engine that shares a bucket."""
    objects = bucket if isinstance(bucket, Objects) else Objects(bucket)
    store = SharedStore(objects, MODEL, engine, lease_s=lease_s, group_s=group_s)
    async with open_lab(lab or LedgerEngine(), metrics, store, **settings) as runtime:
        yield runtime


def token_of(event: object) -> int:
    assert isinstance(event, Token)
    return event.token_id


async def hear(events: Events, told: list[int]) -> None:
    async for event in events:
        told.append(token_of(event))


async def taken_by(runtime: Runtime, session_id: str) -> SessionInfo:
    """Has a server take a session whose holder may be writing just now, which writes no more once nobody takes its tokens."""
    while True:
        try:
            return await runtime.find_session(session_id).info()
        except SessionMoved:
            continue


async def test_a_session_goes_on_at_another_server_after_a_stop_and_reads_nothing_again(bucket: ObjectStore) -> None:
    async with open_server(bucket) as runtime:
        session = await runtime.create_session(label="moves")
        await session.append(PROMPT)
        before = await generated(session, 7)
    lab, metrics = LedgerEngine(), Metrics()
    async with open_server(bucket, lab=lab, metrics=metrics) as runtime:
        again = runtime.find_session(session.id)
        after = await generated(again, 7)

        assert before + after == LedgerEngine().continued(PROMPT, 14)
        # The last token was drawn, and not read.
        assert sum(len(batch.rows) for batch in lab.batches) == len(after)
        assert sample(metrics, "session_moved_here_total", slab="slab") == 1
        assert [one.label for one in runtime.list_sessions()] == ["moves"]


async def test_a_server_that_is_gone_is_found_out_by_its_lease_and_nothing_that_it_told_is_lost(
    bucket: ObjectStore,
) -> None:
    metrics = Metrics()
    async with open_server(bucket) as gone, open_server(bucket, lease_s=0, metrics=metrics) as runtime:
        session = await gone.create_session()
        await session.append(PROMPT)
        told = await generated(session, 5)

        appended = await runtime.find_session(session.id).append([3], len(PROMPT) + 5)
        tokens = await generated(runtime.find_session(session.id), 5)

        history = [*PROMPT, *told, 3]
        assert tokens == LedgerEngine().continued(history, 5)
        assert appended.reread_token_count == len(PROMPT) + 5
        assert sample(metrics, "session_moved_here_total", slab="nothing") == 1
        assert sample(metrics, "reread_tokens_total", slab="nothing") == len(PROMPT) + 5


async def test_a_session_that_another_server_holds_is_refused(bucket: ObjectStore) -> None:
    async with open_server(bucket) as holder, open_server(bucket, capacity=1) as other:
        session = await holder.create_session()
        await session.append(PROMPT)
        kept = await other.create_session()
        await kept.append(PROMPT)

        for call in (other.find_session(session.id).info, lambda: other.find_session(session.id).append([1])):
            with pytest.raises(SessionMoved, match=r"^moved"):
                await call()

        # No slab was taken from anybody for it.
        assert sample(other.metrics, "session_active") == 1
        assert await generated(session, 3) == LedgerEngine().continued(PROMPT, 3)


async def test_a_session_or_a_fork_that_was_made_at_one_server_may_begin_at_another(bucket: ObjectStore) -> None:
    async with open_server(bucket) as maker, open_server(bucket) as other:
        made = await maker.create_session()
        await other.find_session(made.id).append(PROMPT)
        fork = await other.fork_session(made.id)

        assert await generated(maker.find_session(fork.id), 5) == LedgerEngine().continued(PROMPT, 5)
        assert await generated(other.find_session(made.id), 5) == LedgerEngine().continued(PROMPT, 5)
        with pytest.raises(SessionMoved):
            await made.append([1])


async def test_who_lost_a_session_is_told_so_and_answers_nothing_more_of_it(bucket: ObjectStore) -> None:
    metrics = Metrics()
    async with open_server(bucket, metrics=metrics) as slow, open_server(bucket, lease_s=0) as quick:
        calls: list[Callable[[SessionHandle], Awaitable[object]]] = [
            lambda session: session.append([2]),
            lambda session: session.append([2], expected_history_length=5),
            lambda session: generated(session, 3),
            lambda session: session.info(),
            lambda session: session.close(),
        ]
        for call in calls:
            session = await slow.create_session()
            await session.append(PROMPT)
            taken = quick.find_session(session.id)
            await taken.append([1], len(PROMPT))

            with pytest.raises(SessionMoved, match=r"^moved"):
                await call(session)

            assert await generated(taken, 5) == LedgerEngine().continued([*PROMPT, 1], 5)
        assert sample(metrics, "session_moved_away_total") == 5
        assert sample(metrics, "slab_in_use") == 0


async def test_a_stream_ends_where_its_server_lost_the_session_and_what_it_gave_is_kept(bucket: ObjectStore) -> None:
    async with open_server(bucket) as slow, open_server(bucket, lease_s=0) as quick:
        session = await slow.create_session()
        await session.append(PROMPT[:3])
        told: list[int] = []
        async with session.generate(12) as events:
            while len(told) < 3:
                told.append(token_of(await anext(events)))
            taken = await taken_by(quick, session.id)
            with pytest.raises(SessionMoved):
                await hear(events, told)

        # The token on its way when the session was taken had been recorded, and was told.
        assert taken.history_length - 3 >= 3
        assert len(told) == taken.history_length - 3
        assert told == LedgerEngine().continued(PROMPT[:3], len(told))


async def test_a_session_may_come_back(bucket: ObjectStore) -> None:
    async with open_server(bucket, lease_s=0) as one, open_server(bucket, lease_s=0) as two:
        session_id = (await one.create_session()).id
        history: list[int] = []
        for number in range(6):
            runtime = (one, two)[number % 2]
            session = runtime.find_session(session_id)
            try:
                await session.append([number], len(history))
            except SessionMoved:
                # It had it before; who asks again has it take the session again.
                await session.append([number], len(history))
            history.append(number)
            history += await generated(session, 1)

        assert history[-1:] == LedgerEngine().continued(history[:-1], 1)


async def test_on_another_kernel_class_the_history_is_read_again_and_the_answer_says_so(bucket: ObjectStore) -> None:
    async with open_server(bucket) as runtime:
        session = await runtime.create_session()
        await session.append(PROMPT)
        told = await generated(session, 3)
    metrics = Metrics()
    async with open_server(bucket, OTHER_ENGINE, metrics=metrics) as runtime:
        async with runtime.find_session(session.id).generate(4) as events:
            seen = [event async for event in events]
        more = await runtime.find_session(session.id).append([1])

    done = seen[-1]
    assert isinstance(done, Done)
    assert done.reread_token_count == len(PROMPT) + 3
    assert more.reread_token_count == 0
    assert told + [event.token_id for event in seen[:-1] if isinstance(event, Token)] == (
        LedgerEngine().continued(PROMPT, 7)
    )
    assert sample(metrics, "session_moved_here_total", slab="other_engine") == 1
    assert sample(metrics, "reread_tokens_total", slab="other_engine") == len(PROMPT) + 3


async def test_a_session_that_was_closed_is_closed_everywhere(bucket: ObjectStore) -> None:
    async with open_server(bucket, lease_s=0) as one, open_server(bucket, lease_s=0) as two:
        session = await one.create_session()
        await session.append(PROMPT)
        await two.find_session(session.id).close()

        with pytest.raises(SessionMoved):
            await session.append([1])
        for runtime in (one, two):
            with pytest.raises(SessionNotFound):
                await runtime.find_session(session.id).append([1])


@pytest.mark.parametrize("session_id", ["", "..", "../../x", "a" * 32, "a" * 300, "sessions/" + "a" * 20, "é" * 32])
async def test_an_id_that_was_not_issued_finds_no_session_and_costs_nobody_a_slab(session_id: str) -> None:
    async with open_server(MemoryStore(), capacity=1) as runtime:
        kept = await runtime.create_session()

        with pytest.raises(SessionNotFound):
            await runtime.find_session(session_id).append([1])

        assert sample(runtime.metrics, "session_active") == 1
        await kept.append([1])


async def test_more_sessions_than_slabs_sleep_in_the_store(bucket: ObjectStore) -> None:
    async with open_server(bucket, capacity=2) as runtime:
        sessions = [await runtime.create_session() for _ in range(5)]
        for number, session in enumerate(sessions):
            await session.append([number, *PROMPT])

        for number, session in enumerate(sessions):
            assert await generated(session, 5) == LedgerEngine().continued([number, *PROMPT], 5)


@pytest.mark.parametrize("fault", Fault)
async def test_an_append_that_the_store_does_not_answer_says_so_and_its_retry_is_safe(fault: Fault) -> None:
    objects = FaultyObjects()
    async with open_server(objects) as runtime:
        session = await runtime.create_session()
        await session.append(PROMPT)
        objects.fail_next(fault)
        with pytest.raises(StorageFailed, match="does not answer"):
            await session.append([1, 2], len(PROMPT))
        objects.arrive()

        assert (await session.info()).history_length == len(PROMPT)
        assert (await session.append([1, 2], len(PROMPT))).history_length == len(PROMPT) + 2
        with pytest.raises(HistoryMismatch):
            await session.append([1, 2], len(PROMPT))
    async with open_server(objects.store) as runtime:
        again = runtime.find_session(session.id)
        assert await generated(again, 5) == LedgerEngine().continued([*PROMPT, 1, 2], 5)


async def test_a_token_that_was_not_taken_is_not_there_at_the_next_server() -> None:
    bucket = MemoryStore()
    async with open_server(bucket) as runtime:
        session = await runtime.create_session()
        await session.append(PROMPT[:3])
        async with session.generate(10) as events:
            taken = [(await anext(events)) for _ in range(2)]
        assert (await session.info()).history_length == 3 + len(taken)
        async with open_server(bucket, lease_s=0) as other:
            assert (await other.find_session(session.id).info()).history_length == 3 + len(taken)


async def test_snapshots_are_every_servers(bucket: ObjectStore) -> None:
    async with open_server(bucket) as one, open_server(bucket) as two:
        session = await one.create_session()
        await session.append(PROMPT)
        saved = await one.save_session(session.id)

        restored = await two.restore_session(saved.snapshot_id)

        assert await generated(restored, 5) == LedgerEngine().continued(PROMPT, 5)
        assert [each.snapshot_id for each in one.list_snapshots()] == [saved.snapshot_id]
        await two.delete_snapshot(saved.snapshot_id)
        with pytest.raises(SnapshotNotFound):
            await one.restore_session(saved.snapshot_id)


async def test_a_conversation_costs_the_store_nothing() -> None:
    objects = FaultyObjects()
    async with open_server(objects) as runtime:
        session = await runtime.create_session(is_kept=False)
        await session.append(PROMPT)
        fork = await runtime.fork_session(session.id)

        assert await generated(fork, 5) == LedgerEngine().continued(PROMPT, 5)
    assert objects.operations == []


class NotedObjects(Objects):
    """Notes in which threads the store is asked."""

    def __init__(self) -> None:
        super().__init__(MemoryStore())
        self.threads: set[int] = set()

    def __getattribute__(self, name: str) -> Any:
        if name in ("create", "put", "read", "has", "list", "delete"):
            object.__getattribute__(self, "threads").add(threading.get_ident())
        return super().__getattribute__(name)


async def test_the_store_is_never_waited_for_on_the_loop() -> None:
    objects = NotedObjects()
    async with open_server(objects, capacity=1) as runtime:
        session = await runtime.create_session()
        await session.append(PROMPT)
        await generated(session, 3)
        saved = await runtime.save_session(session.id)
        other = await runtime.create_session()
        await runtime.restore_session(saved.snapshot_id)
        await session.append([1])
        await session.close()
        await runtime.delete_snapshot(saved.snapshot_id)
        await other.info()

    assert objects.threads
    assert threading.get_ident() not in objects.threads


async def test_two_askers_of_a_session_that_has_to_be_taken_have_it_taken_once(bucket: ObjectStore) -> None:
    async with open_server(bucket) as one:
        session = await one.create_session()
        await session.append(PROMPT)
    async with open_server(bucket) as two, trio.open_nursery() as nursery:
        for token in range(8):
            nursery.start_soon(two.find_session(session.id).append, [token])
    async with open_server(bucket) as three:
        assert (await three.find_session(session.id).info()).history_length == len(PROMPT) + 8


async def test_tokens_that_are_drawn_within_a_while_are_written_together_but_the_first() -> None:
    objects = FaultyObjects()
    async with open_server(objects, group_s=FOR_EVER) as runtime:
        session = await runtime.create_session()
        await session.append(PROMPT)
        before = objects.count("create")
        tokens = await generated(session, 1 + 3 * 8)

        assert tokens == LedgerEngine().continued(PROMPT, 25)
        # The engine's tile is 8 rows: no more tokens than that can be taken back.
        assert objects.count("create") - before == 1 + 3
    async with open_server(objects.store) as runtime:
        assert await generated(runtime.find_session(session.id), 3) == LedgerEngine().continued([*PROMPT, *tokens], 3)


@pytest.mark.parametrize("taken", range(1, 11))
async def test_of_tokens_written_together_those_that_were_not_taken_are_taken_back(taken: int) -> None:
    bucket = MemoryStore()
    async with open_server(bucket, group_s=FOR_EVER) as runtime:
        session = await runtime.create_session()
        await session.append(PROMPT[:3])
        async with session.generate(12) as events:
            told = [token_of(await anext(events)) for _ in range(taken)]

        assert (await session.info()).history_length == 3 + taken
        after = await generated(session, 5)
        assert told + after == LedgerEngine().continued(PROMPT[:3], taken + 5)
    async with open_server(bucket) as other:
        assert (await other.find_session(session.id).info()).history_length == 3 + taken + 5


@pytest.mark.parametrize("at", range(6))
async def test_a_group_ends_with_what_ends_the_generation(at: int) -> None:
    expected = LedgerEngine().continued(PROMPT[:3], 7)
    async with open_server(MemoryStore(), group_s=FOR_EVER) as runtime:
        session = await runtime.create_session([expected[at]])
        await session.append(PROMPT[:3])

        tokens = await generated(session, 30)

        assert tokens == expected[: expected.index(expected[at]) + 1]
        assert (await session.info()).history_length == 3 + len(tokens)


async def test_a_group_that_cannot_be_written_is_told_to_nobody() -> None:
    objects = FaultyObjects()
    async with open_server(objects, group_s=FOR_EVER) as runtime:
        session = await runtime.create_session()
        await session.append(PROMPT[:3])
        async with session.generate(12) as events:
            told = [token_of(await anext(events))]
            objects.fail_next(Fault.UNHEARD)
            with pytest.raises(StorageFailed):
                told.append(token_of(await anext(events)))

        assert (await session.info()).history_length == 4
        assert told + await generated(session, 5) == LedgerEngine().continued(PROMPT[:3], 6)


async def test_a_group_never_passes_what_a_session_may_hold() -> None:
    async with open_server(MemoryStore(), group_s=FOR_EVER) as runtime:
        session = await runtime.create_session(overflow=Overflow.ERROR)
        await session.append(PROMPT[:3])
        async with session.generate(40) as events:
            seen = [event async for event in events]

        assert isinstance(seen[-1], Done)
        assert seen[-1].stop_reason is StopReason.TRUNCATED
        assert (await session.info()).history_length == LedgerEngine().spec.visible


async def test_a_store_that_does_not_answer_keeps_nobody_waiting_who_asks_it_nothing() -> None:
    answers = threading.Event()
    objects = FaultyObjects()
    threads = trio.to_thread.current_default_thread_limiter().total_tokens
    async with open_server(objects, capacity=2 * int(threads)) as runtime, trio.open_nursery() as nursery:
        objects.fault = lambda name, key: Fault.REFUSED if not answers.wait(250) else None
        try:
            for _ in range(2 * int(threads)):
                nursery.start_soon(runtime.create_session)
            await trio.testing.wait_all_tasks_blocked()

            with trio.fail_after(100):
                assert await trio.to_thread.run_sync(lambda: "done") == "done"
        finally:
            answers.set()


async def test_a_session_that_a_newer_server_has_taken_fails_alone() -> None:
    objects = FaultyObjects()
    async with open_server(objects) as runtime:
        session, other = await runtime.create_session(), await runtime.create_session()
        await session.append(PROMPT)
        await other.append(PROMPT)
        [*_, last] = sorted(one.key for one in objects.list(f"sessions/{session.id}/log/"))
        number = int(last.rpartition("/")[2]) + 1
        objects.put(f"sessions/{session.id}/log/{number:012d}", of_a_newer_format(objects.read(last)))

        with pytest.raises(SessionMoved, match=r"^moved"):
            await session.append([1])

        assert await generated(other, 3) == LedgerEngine().continued(PROMPT, 3)


async def test_who_asks_while_a_failed_session_gives_up_its_slab_is_answered(
    bucket: ObjectStore, nursery: trio.Nursery
) -> None:
    lab = LedgerEngine()

    async def fail(session: SessionHandle) -> None:
        with pytest.raises(InvariantViolation):
            await session.append([SKIPS_A_LAYER])

    async with open_server(bucket, lab=lab) as runtime:
        session = await runtime.create_session()
        await session.append(PROMPT)
        lab.hold()
        nursery.start_soon(fail, session)
        await lab.begun()
        async with trio.open_nursery() as askers:
            askers.start_soon(session.info)
            await trio.testing.wait_all_tasks_blocked()
            lab.open()

        assert (await session.info()).history_length == len(PROMPT) + 1


class HeldObjects(Objects):
    """Answers whether there is an object once the test lets it."""

    def __init__(self, bucket: ObjectStore) -> None:
        super().__init__(bucket)
        self.is_asked = trio.Event()
        self.gate = threading.Event()
        self.gate.set()

    def has(self, key: str) -> bool:
        if not self.gate.is_set():
            trio.from_thread.run_sync(self.is_asked.set)
            self.gate.wait()
        return super().has(key)


async def test_a_rewind_whose_asker_leaves_is_made_as_a_whole(bucket: ObjectStore, nursery: trio.Nursery) -> None:
    objects, lab = HeldObjects(bucket), LedgerEngine()
    leaving = trio.CancelScope()

    async def rewind(session: SessionHandle) -> None:
        with leaving:
            await session.rewind(array("I", PROMPT[:10]))

    async with open_server(bucket) as runtime:
        session = await runtime.create_session()
        await session.append(PROMPT)
    # Its slab lies in the store from then on.
    async with open_server(objects, lease_s=0, lab=lab) as runtime:
        session = runtime.find_session(session.id)
        await session.info()
        objects.gate.clear()
        nursery.start_soon(rewind, session)
        await objects.is_asked.wait()
        leaving.cancel()
        await trio.testing.wait_all_tasks_blocked()
        objects.gate.set()

        left = (await session.info()).history_length
        lab.hold()
        async with trio.open_nursery() as askers:
            askers.start_soon(generated, session, 4)
            await lab.begun()
            askers.cancel_scope.cancel()
            lab.open()
        await session.append([3])
    async with open_server(bucket) as runtime:
        assert (await runtime.find_session(session.id).info()).history_length == left + 1
