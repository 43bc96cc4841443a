"""Which sessions there are, who gets a slab, and what becomes of one that ends."""

from __future__ import annotations

import logging
from array import array

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from actors import SessionHandle
from runtime import Done, Overflow
from runtime.errors import CapacityExhausted, InvariantViolation, SessionFailed, SessionNotFound
from tests.actors.engines import SKIPS_A_LAYER, LedgerEngine, generated, open_lab, sample


@pytest.fixture
def engine() -> LedgerEngine:
    return LedgerEngine(sink=2, window=14, row_tile=8)


async def is_alive(session: SessionHandle) -> bool:
    try:
        await session.info()
    except SessionNotFound:
        return False
    return True


async def test_ids_are_too_long_to_be_guessed_and_all_different(engine: LedgerEngine) -> None:
    async with open_lab(engine, capacity=100) as runtime:
        ids = {(await runtime.create_session()).id for _ in range(100)}
    assert len(ids) == 100
    # 128 bits take 22 characters of base64.
    assert min(map(len, ids)) >= 22


async def test_a_session_is_found_by_its_id(engine: LedgerEngine) -> None:
    async with open_lab(engine) as runtime:
        session = await runtime.create_session()
        await runtime.find_session(session.id).append([1, 2, 3])
        assert (await session.info()).history_length == 3


async def test_an_id_unknown_closed_or_evicted_is_refused_in_the_same_words(engine: LedgerEngine) -> None:
    words: set[str] = set()
    async with open_lab(engine, capacity=1) as runtime:
        closed = await runtime.create_session()
        await closed.close()
        evicted = await runtime.create_session()
        await runtime.create_session()
        for session_id in ("never made", closed.id, evicted.id):
            with pytest.raises(SessionNotFound) as refused:
                runtime.find_session(session_id)
            words.add(str(refused.value))
    assert len(words) == 1


class TestCapacity:
    async def test_the_session_idle_longest_makes_room(self, engine: LedgerEngine, mock_clock: MockClock) -> None:
        async with open_lab(engine, capacity=3) as runtime:
            sessions = []
            for _ in range(3):
                sessions.append(await runtime.create_session())
                mock_clock.jump(1)
            await sessions[0].append([1])
            mock_clock.jump(1)
            # Looking at a session is no use of it.
            await sessions[1].info()
            await runtime.create_session()
            assert [await is_alive(session) for session in sessions] == [True, False, True]
            assert sample(runtime.metrics, "session_evicted_total", reason="lru") == 1
            assert sample(runtime.metrics, "session_total", outcome="evicted") == 1

    async def test_a_session_at_work_is_passed_over_however_long_ago_it_was_used(
        self, engine: LedgerEngine, mock_clock: MockClock
    ) -> None:
        async with open_lab(engine, capacity=2) as runtime, trio.open_nursery() as askers:
            working = await runtime.create_session()
            mock_clock.jump(1)
            idle = await runtime.create_session()
            engine.hold()
            askers.start_soon(working.append, [1])
            await engine.begun()
            await runtime.create_session()
            engine.open()
            assert [await is_alive(session) for session in (working, idle)] == [True, False]

    async def test_a_session_whose_consumer_is_slow_is_at_work(self, engine: LedgerEngine) -> None:
        async with open_lab(engine, capacity=1) as runtime:
            session = await runtime.create_session()
            await session.append([1])
            async with session.generate(5) as events:
                await anext(events)
                await wait_all_tasks_blocked()
                with pytest.raises(CapacityExhausted):
                    await runtime.create_session()
                rest = [event async for event in events]
        assert len(rest) == 5

    async def test_when_all_are_at_work_nobody_is_evicted_and_the_newcomer_is_refused(
        self, engine: LedgerEngine
    ) -> None:
        async with open_lab(engine, capacity=2) as runtime, trio.open_nursery() as askers:
            sessions = [await runtime.create_session() for _ in range(2)]
            engine.hold()
            for session in sessions:
                askers.start_soon(session.append, [1])
            await engine.begun()
            await wait_all_tasks_blocked()
            with pytest.raises(CapacityExhausted):
                await runtime.create_session()
            engine.open()
            assert [await is_alive(session) for session in sessions] == [True, True]

    async def test_a_session_that_was_left_can_make_room_once_its_forward_has_ended(self, engine: LedgerEngine) -> None:
        async with open_lab(engine, capacity=1) as runtime:
            session = await runtime.create_session()
            await session.append([1])
            async with session.generate(100) as events:
                await anext(events)
            await session.info()
            assert await is_alive(await runtime.create_session())

    async def test_a_session_makes_room_the_moment_it_has_said_its_last_word(self, engine: LedgerEngine) -> None:
        async with open_lab(engine, capacity=1) as runtime:
            for _ in range(10):
                session = await runtime.create_session()
                await session.append([1])
                async with session.generate(3) as events:
                    async for event in events:
                        if isinstance(event, Done):
                            await runtime.create_session()

    async def test_a_closed_session_makes_room_without_an_eviction(self, engine: LedgerEngine) -> None:
        async with open_lab(engine, capacity=2) as runtime:
            neighbour = await runtime.create_session()
            for _ in range(30):
                session = await runtime.create_session()
                await session.close()
                assert sample(runtime.metrics, "slab_in_use") == 1
            assert await is_alive(neighbour)

    async def test_sessions_made_just_now_make_room_too(self, engine: LedgerEngine) -> None:
        async with open_lab(engine, capacity=2) as runtime:
            async with trio.open_nursery() as creators:
                for _ in range(4):
                    creators.start_soon(runtime.create_session)
            await wait_all_tasks_blocked()
            assert sample(runtime.metrics, "session_evicted_total", reason="lru") == 2

    async def test_an_evicted_slab_starts_empty_with_its_next_session(self, engine: LedgerEngine) -> None:
        async with open_lab(engine, capacity=1) as runtime:
            first = await runtime.create_session()
            await first.append(range(40))
            second = await runtime.create_session()
            assert (await second.info()).kv_live_bytes == 0
            await second.append([1, 2, 3])
            assert await generated(second, 5) == engine.continued([1, 2, 3], 5)

    async def test_completions_evict_nobody_and_are_not_evicted(self, engine: LedgerEngine) -> None:
        async with open_lab(engine, capacity=1, max_concurrent=1) as runtime:
            session = await runtime.create_session()
            async with runtime.completion((), Overflow.ERROR) as completion:
                completing, _ = completion.open(array("I", [1]))
                await runtime.create_session()
                assert not await is_alive(session)
                assert await is_alive(completing)


class TestTimeToLive:
    async def test_a_session_idle_longer_is_evicted(self, engine: LedgerEngine, mock_clock: MockClock) -> None:
        async with open_lab(engine, idle_ttl_s=10) as runtime:
            session = await runtime.create_session()
            await session.append([1])
            await wait_all_tasks_blocked()
            mock_clock.jump(11)
            await wait_all_tasks_blocked()
            assert not await is_alive(session)
            assert sample(runtime.metrics, "session_evicted_total", reason="ttl") == 1
            assert sample(runtime.metrics, "slab_in_use") == 0

    async def test_each_use_starts_the_time_again(self, engine: LedgerEngine, mock_clock: MockClock) -> None:
        async with open_lab(engine, idle_ttl_s=10) as runtime:
            session = await runtime.create_session()
            for _ in range(5):
                mock_clock.jump(9)
                await wait_all_tasks_blocked()
                await session.append([])
            assert await is_alive(session)

    async def test_looking_at_a_session_does_not_keep_it(self, engine: LedgerEngine, mock_clock: MockClock) -> None:
        async with open_lab(engine, idle_ttl_s=10) as runtime:
            session = await runtime.create_session()
            mock_clock.jump(9)
            await session.info()
            await wait_all_tasks_blocked()
            mock_clock.jump(2)
            await wait_all_tasks_blocked()
            assert not await is_alive(session)

    async def test_zero_means_never(self, engine: LedgerEngine, mock_clock: MockClock) -> None:
        async with open_lab(engine, idle_ttl_s=0) as runtime:
            session = await runtime.create_session()
            await wait_all_tasks_blocked()
            mock_clock.jump(1e9)
            await wait_all_tasks_blocked()
            assert await is_alive(session)

    @pytest.mark.parametrize("taken_before", [0, 1, 2], ids=["in a forward", "before a token", "before the last word"])
    async def test_a_session_at_work_is_not_idle_however_long_it_takes(
        self, engine: LedgerEngine, mock_clock: MockClock, taken_before: int
    ) -> None:
        async with open_lab(engine, idle_ttl_s=10) as runtime:
            session = await runtime.create_session()
            await session.append([1])
            if taken_before == 0:
                engine.hold()
            async with session.generate(2) as events:
                received = [await anext(events) for _ in range(taken_before)]
                if taken_before == 0:
                    await engine.begun()
                await wait_all_tasks_blocked()
                mock_clock.jump(1000)
                await wait_all_tasks_blocked()
                engine.open()
                received += [event async for event in events]
            await wait_all_tasks_blocked()
            assert isinstance(received[-1], Done)
            assert await is_alive(session)

    async def test_a_completion_never_grows_old(self, engine: LedgerEngine, mock_clock: MockClock) -> None:
        async with open_lab(engine, idle_ttl_s=10) as runtime, runtime.completion((), Overflow.ERROR) as completion:
            session, _ = completion.open(array("I", [1]))
            await wait_all_tasks_blocked()
            mock_clock.jump(1000)
            await wait_all_tasks_blocked()
            assert await is_alive(session)


class TestSlabs:
    async def test_none_comes_back_while_a_forward_writes_to_it(
        self, engine: LedgerEngine, nursery: trio.Nursery
    ) -> None:
        leaving = trio.CancelScope()

        async def append_and_leave(session: SessionHandle) -> None:
            with leaving:
                await session.append([1, 2, 3])

        async with open_lab(engine) as runtime:
            session = await runtime.create_session()
            engine.hold()
            nursery.start_soon(append_and_leave, session)
            await engine.begun()
            leaving.cancel()
            nursery.start_soon(session.close)
            await wait_all_tasks_blocked()
            assert sample(runtime.metrics, "slab_in_use") == 1
            engine.open()
            assert not await is_alive(session)
            assert sample(runtime.metrics, "slab_in_use") == 0

    async def test_none_is_evicted_while_a_forward_writes_to_it(
        self, engine: LedgerEngine, nursery: trio.Nursery
    ) -> None:
        leaving = trio.CancelScope()

        async def append_and_leave(session: SessionHandle) -> None:
            with leaving:
                await session.append([1, 2, 3])

        async with open_lab(engine, capacity=1) as runtime:
            session = await runtime.create_session()
            engine.hold()
            nursery.start_soon(append_and_leave, session)
            await engine.begun()
            leaving.cancel()
            await wait_all_tasks_blocked()
            with pytest.raises(CapacityExhausted):
                await runtime.create_session()
            engine.open()


class TestAFailure:
    async def test_of_one_session_is_logged_once(self, engine: LedgerEngine, caplog: pytest.LogCaptureFixture) -> None:
        async with open_lab(engine) as runtime:
            session = await runtime.create_session()
            with pytest.raises(InvariantViolation):
                await session.append([SKIPS_A_LAYER])
            assert not await is_alive(session)
        assert [record.levelno for record in caplog.records] == [logging.ERROR]

    async def test_of_one_session_leaves_the_others(self, engine: LedgerEngine) -> None:
        async with open_lab(engine) as runtime:
            neighbour, session = await runtime.create_session(), await runtime.create_session()
            await neighbour.append([1, 2, 3])
            await session.append([5])
            with pytest.raises(SessionFailed):
                # A bug of ours, as a program that embeds the runtime may cause one.
                await session.fork_into(None)  # type: ignore[arg-type] # The bug.
            assert await generated(neighbour, 5) == engine.continued([1, 2, 3], 5)

    async def test_of_one_session_leaves_room_for_another(self, engine: LedgerEngine) -> None:
        async with open_lab(engine, capacity=1) as runtime:
            for _ in range(3):
                session = await runtime.create_session()
                with pytest.raises(InvariantViolation):
                    await session.append([SKIPS_A_LAYER])
            assert sample(runtime.metrics, "session_total", outcome="failed") == 3

    async def test_that_is_no_failure_is_not_logged(
        self, engine: LedgerEngine, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with open_lab(engine, capacity=1) as runtime:
            await runtime.create_session()
            session = await runtime.create_session()
            await session.close()
        assert caplog.records == []


async def test_gauges_say_what_is_held_just_now(engine: LedgerEngine) -> None:
    async with open_lab(engine, capacity=3, max_concurrent=2) as runtime:
        long, short = await runtime.create_session(), await runtime.create_session()
        await long.append(range(20))
        await short.append(range(3))
        gauges = {
            name: sample(runtime.metrics, name)
            for name in ("session_active", "slab_in_use", "slab_total", "session_history_tokens")
        }
        live_bytes = sample(runtime.metrics, "session_kv_live_bytes")
    assert gauges == {"session_active": 2, "slab_in_use": 2, "slab_total": 5, "session_history_tokens": 23}
    assert live_bytes == (16 + 3) * engine.spec.token_bytes


async def test_a_closed_session_is_counted_as_closed(engine: LedgerEngine) -> None:
    async with open_lab(engine) as runtime:
        session = await runtime.create_session()
        await session.close()
        assert sample(runtime.metrics, "session_total", outcome="closed") == 1
        assert sample(runtime.metrics, "session_evicted_total", reason="close") == 1
        assert sample(runtime.metrics, "session_active") == 0
