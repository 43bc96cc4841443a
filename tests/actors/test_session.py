"""One session as its user meets it: append, generate, info, close; and what cancelling each of them leaves behind."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from actors import SessionHandle
from runtime import Done, Event, HistoryTruncated, Overflow, Sampling, StopReason, Token
from runtime.errors import (
    HistoryMismatch,
    InvalidRequest,
    InvariantViolation,
    SessionFailed,
    SessionNotFound,
    SlabOverflow,
)
from runtime.metrics import TurnTime
from runtime.sessions import SessionInfo
from tests.actors.engines import (
    GOES_BACK,
    SKIPS_A_LAYER,
    VOCABULARY,
    LedgerEngine,
    generated,
    open_lab,
    sample,
)


@pytest.fixture
def engine() -> LedgerEngine:
    """Sees 16 tokens: 2 sinks and a window of 14; a forward takes 8 rows."""
    return LedgerEngine(sink=2, window=14, row_tile=8)


def digest_of(history: Sequence[int]) -> bytes:
    return hashlib.blake2b(struct.pack(f"<{len(history)}I", *history)).digest()


def row_counts(engine: LedgerEngine) -> list[int]:
    return [len(batch.rows) for batch in engine.batches]


async def events_of(session: SessionHandle, max_tokens: int) -> list[Event]:
    async with session.generate(max_tokens) as events:
        return [event async for event in events]


async def state_of(session: SessionHandle) -> tuple[int, bytes]:
    info = await session.info()
    return info.history_length, info.history_digest


async def leave_append_in_its_first_forward(engine: LedgerEngine, session: SessionHandle, tokens: list[int]) -> None:
    """Appends, and is cancelled in the first forward, which then ends."""
    engine.hold()
    leaving = trio.CancelScope()

    async def append_and_leave() -> None:
        with leaving:
            await session.append(tokens)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(append_and_leave)
        await engine.begun()
        leaving.cancel()
        engine.open()


class TestAppend:
    async def test_tells_the_length_and_the_digest_of_the_history(self, engine: LedgerEngine) -> None:
        async with open_lab(engine) as runtime:
            session = await runtime.create_session()
            await session.append([1, 2, 3])
            appended = await session.append([4, 5])
        assert (appended.history_length, appended.history_digest) == (5, digest_of([1, 2, 3, 4, 5]))

    async def test_tells_how_many_tokens_are_out_of_sight(self, engine: LedgerEngine) -> None:
        async with open_lab(engine) as runtime:
            session = await runtime.create_session()
            counts = [(await session.append([1] * count)).evicted_token_count for count in (16, 1, 30)]
        assert counts == [0, 1, 31]

    async def test_feeds_a_long_history_in_full_tiles(self, engine: LedgerEngine) -> None:
        async with open_lab(engine) as runtime:
            session = await runtime.create_session()
            await session.append(range(20))
        assert row_counts(engine) == [8, 8, 4]

    async def test_of_nothing_is_legal_and_runs_no_forward(self, engine: LedgerEngine) -> None:
        async with open_lab(engine) as runtime:
            session = await runtime.create_session()
            appended = await session.append([])
        assert (appended.history_length, engine.batches) == (0, [])

    async def test_at_the_length_that_its_asker_expects_is_taken(self, engine: LedgerEngine) -> None:
        async with open_lab(engine) as runtime:
            session = await runtime.create_session()
            await session.append([1, 2], expected_history_length=0)
            appended = await session.append([3], expected_history_length=2)
        assert appended.history_length == 3

    async def test_at_another_length_changes_nothing_and_says_what_it_is(self, engine: LedgerEngine) -> None:
        async with open_lab(engine) as runtime:
            session = await runtime.create_session()
            await session.append([1, 2])
            with pytest.raises(HistoryMismatch, match="2"):
                await session.append([3], expected_history_length=1)
            assert await state_of(session) == (2, digest_of([1, 2]))

    @pytest.mark.parametrize("wrong", [-1, VOCABULARY, 2**32])
    async def test_of_an_id_outside_the_vocabulary_changes_nothing(self, engine: LedgerEngine, wrong: int) -> None:
        async with open_lab(engine) as runtime:
            session = await runtime.create_session()
            await session.append([1, 2])
            with pytest.raises(InvalidRequest) as refused:
                await session.append([3, wrong, 4])
            assert refused.value.param == "token_ids"
            assert await state_of(session) == (2, digest_of([1, 2]))

    async def test_that_would_evict_is_refused_where_the_session_is_not_to_forget(self, engine: LedgerEngine) -> None:
        async with open_lab(engine) as runtime:
            session = await runtime.create_session(overflow=Overflow.ERROR)
            await session.append([1] * 15)
            with pytest.raises(SlabOverflow):
                await session.append([2, 3])
            assert (await session.append([2])).history_length == 16

    async def test_withdrawn_before_it_is_taken_leaves_no_trace(
        self, engine: LedgerEngine, nursery: trio.Nursery
    ) -> None:
        leaving = trio.CancelScope()

        async def append_and_leave(session: SessionHandle) -> None:
            with leaving:
                await session.append([9])

        engine.hold()
        async with open_lab(engine) as runtime:
            session = await runtime.create_session()
            nursery.start_soon(session.append, [1, 2])
            await engine.begun()
            nursery.start_soon(append_and_leave, session)
            await wait_all_tasks_blocked()
            leaving.cancel()
            await wait_all_tasks_blocked()
            engine.open()
            assert await state_of(session) == (2, digest_of([1, 2]))

    async def test_cancelled_half_way_has_happened(self, engine: LedgerEngine) -> None:
        async with open_lab(engine) as runtime:
            session = await runtime.create_session()
            await leave_append_in_its_first_forward(engine, session, list(range(20)))
            assert await state_of(session) == (20, digest_of(range(20)))

    async def test_cancelled_half_way_runs_no_further_forward(self, engine: LedgerEngine) -> None:
        async with open_lab(engine) as runtime:
            session = await runtime.create_session()
            await leave_append_in_its_first_forward(engine, session, list(range(20)))
            await session.info()
        assert row_counts(engine) == [8]

    async def test_cancelled_half_way_is_fed_to_its_end_by_the_next_generation(self, engine: LedgerEngine) -> None:
        async with open_lab(engine) as runtime:
            session = await runtime.create_session()
            await leave_append_in_its_first_forward(engine, session, list(range(20)))
            tokens = await generated(session, 4)
        assert tokens == engine.continued(range(20), 4)
        assert row_counts(engine) == [8, 8, 4, 1, 1, 1]

    async def test_cancelled_in_a_full_forward_may_go_on_in_a_crowded_one(self, engine: LedgerEngine) -> None:
        # What the cancelled forward wrote counts: the slab is further than the few rows of the next forward reach.
        async with open_lab(engine) as runtime, trio.open_nursery() as askers:
            session = await runtime.create_session()
            neighbours = [await runtime.create_session() for _ in range(7)]
            for neighbour in neighbours:
                await neighbour.append([1])
            await leave_append_in_its_first_forward(engine, session, list(range(20)))
            engine.hold()
            for neighbour in neighbours:
                askers.start_soon(generated, neighbour, 9)
            await wait_all_tasks_blocked()
            askers.start_soon(session.append, [])
            await wait_all_tasks_blocked()
            engine.open()
            assert await generated(session, 3) == engine.continued(range(20), 3)


class TestGenerate:
    async def test_gives_tokens_and_one_last_word(self, engine: LedgerEngine) -> None:
        async with open_lab(engine) as runtime:
            session = await runtime.create_session()
            await session.append([1, 2, 3])
            events = await events_of(session, 5)
        assert events[:-1] == [Token(token_id) for token_id in engine.continued([1, 2, 3], 5)]
        assert isinstance(events[-1], Done)
        assert (events[-1].stop_reason, events[-1].generated_token_count) == (StopReason.MAX_TOKENS, 5)

    async def test_runs_one_forward_a_token_and_only_the_last_row_again(self, engine: LedgerEngine) -> None:
        async with open_lab(engine) as runtime:
            session = await runtime.create_session()
            await session.append([1, 2, 3])
            await generated(session, 4)
        assert row_counts(engine) == [3, 1, 1, 1, 1]

    async def test_adds_its_tokens_to_the_history(self, engine: LedgerEngine) -> None:
        async with open_lab(engine) as runtime:
            session = await runtime.create_session()
            await session.append([1, 2, 3])
            tokens = await generated(session, 4)
            assert await state_of(session) == (7, digest_of([1, 2, 3, *tokens]))

    async def test_ends_at_an_eos_token_which_joins_the_history(self, engine: LedgerEngine) -> None:
        expected = engine.continued([1, 2, 3], 6)
        eos = next(token_id for token_id in expected[2:] if token_id not in expected[:2])
        async with open_lab(engine) as runtime:
            session = await runtime.create_session(eos_token_ids=(eos,))
            await session.append([1, 2, 3])
            events = await events_of(session, 100)
            count = expected.index(eos) + 1
            assert events[:-1] == [Token(token_id) for token_id in expected[:count]]
            assert isinstance(events[-1], Done)
            assert (events[-1].stop_reason, events[-1].generated_token_count) == (StopReason.EOS, count)
            assert await state_of(session) == (3 + count, digest_of([1, 2, 3, *expected[:count]]))

    async def test_goes_on_after_an_eos_token_when_asked_again(self, engine: LedgerEngine) -> None:
        expected = engine.continued([1, 2, 3], 5)
        async with open_lab(engine) as runtime:
            session = await runtime.create_session(eos_token_ids=expected[:1])
            await session.append([1, 2, 3])
            first = await generated(session, 1)
            second = await generated(session, 1)
        assert first + second == expected[:2]

    async def test_is_a_function_of_the_seed_when_it_samples(self, engine: LedgerEngine) -> None:
        sampling = Sampling(temperature=1.0, seed=7)
        async with open_lab(engine) as runtime:
            session = await runtime.create_session()
            await session.append([1, 2, 3])
            tokens = await generated(session, 5, temperature=1.0, seed=7)
        assert tokens == engine.continued([1, 2, 3], 5, sampling)

    async def test_draws_a_seed_where_none_is_given(self, engine: LedgerEngine) -> None:
        async with open_lab(engine) as runtime:
            for _ in range(2):
                session = await runtime.create_session()
                await session.append([1, 2, 3])
                await generated(session, 1, temperature=1.0)
        seeds = [row.draw.sampling.seed for batch in engine.batches for row in batch.rows if row.draw]
        assert len(set(seeds)) == 2

    async def test_says_first_and_once_how_many_tokens_are_out_of_sight(self, engine: LedgerEngine) -> None:
        async with open_lab(engine) as runtime:
            session = await runtime.create_session()
            await session.append(range(20))
            events = await events_of(session, 5)
        assert events[0] == HistoryTruncated(4)
        assert [type(event) for event in events[1:]] == [Token] * 5 + [Done]

    async def test_says_nothing_of_truncation_while_the_history_fits(self, engine: LedgerEngine) -> None:
        async with open_lab(engine) as runtime:
            session = await runtime.create_session()
            await session.append([1] * 16)
            events = await events_of(session, 2)
        assert [type(event) for event in events] == [Token, Token, Done]

    async def test_past_the_window_sees_the_sinks_and_the_most_recent_tokens(self, engine: LedgerEngine) -> None:
        async with open_lab(engine) as runtime:
            session = await runtime.create_session()
            await session.append([1, 2, 3])
            tokens = await generated(session, 100)
        assert tokens == engine.continued([1, 2, 3], 100)

    async def test_ends_truncated_when_the_slab_is_full_where_the_session_is_not_to_forget(
        self, engine: LedgerEngine
    ) -> None:
        async with open_lab(engine) as runtime:
            session = await runtime.create_session(overflow=Overflow.ERROR)
            await session.append([1] * 13)
            events = await events_of(session, 100)
            assert events[:-1] == [Token(token_id) for token_id in engine.continued([1] * 13, 3)]
            assert isinstance(events[-1], Done)
            assert events[-1].stop_reason is StopReason.TRUNCATED
            assert (await session.info()).evicted_token_count == 0

    async def test_of_no_tokens_is_refused(self, engine: LedgerEngine) -> None:
        async with open_lab(engine) as runtime:
            session = await runtime.create_session()
            await session.append([1])
            with pytest.raises(InvalidRequest) as refused:
                await generated(session, 0)
            assert refused.value.param == "max_tokens"
            assert (await session.info()).history_length == 1

    async def test_without_a_history_is_refused(self, engine: LedgerEngine) -> None:
        async with open_lab(engine) as runtime:
            session = await runtime.create_session()
            with pytest.raises(InvalidRequest, match="no history"):
                await generated(session, 1)
            assert (await session.append([1])).history_length == 1

    async def test_with_a_sampling_out_of_range_is_refused_before_it_is_asked_for(self, engine: LedgerEngine) -> None:
        async with open_lab(engine) as runtime:
            session = await runtime.create_session()
            await session.append([1])
            with pytest.raises(InvalidRequest) as refused:
                await generated(session, 1, temperature=-1.0)
        assert refused.value.param == "temperature"

    async def test_twice_on_one_session_is_served_in_order(self, engine: LedgerEngine) -> None:
        streams: list[list[int]] = []

        async def record(session: SessionHandle) -> None:
            streams.append(await generated(session, 3))

        engine.hold()
        async with open_lab(engine) as runtime, trio.open_nursery() as askers:
            session = await runtime.create_session()
            askers.start_soon(session.append, [1, 2, 3])
            await engine.begun()
            for _ in range(2):
                askers.start_soon(record, session)
                await wait_all_tasks_blocked()
            engine.open()
        assert streams[0] + streams[1] == engine.continued([1, 2, 3], 6)

    async def test_after_an_append_in_between_continues_the_whole_history(self, engine: LedgerEngine) -> None:
        async with open_lab(engine) as runtime:
            session = await runtime.create_session()
            await session.append([1, 2, 3])
            first = await generated(session, 3)
            await session.append([4, 5])
            second = await generated(session, 3)
        assert second == engine.continued([1, 2, 3, *first, 4, 5], 3)


class TestLeavingAGeneration:
    async def test_cancels_it_within_the_forward_under_way(self, engine: LedgerEngine) -> None:
        async with open_lab(engine) as runtime:
            session = await runtime.create_session()
            await session.append([1, 2, 3])
            engine.hold()
            async with session.generate(100) as events:
                for _ in range(2):
                    await engine.begun()
                    engine.end()
                    await anext(events)
                await engine.begun()
            engine.open()
            await session.info()
        # The append's forward, two whose tokens were taken, and the one under way when the block was left.
        assert len(engine.batches) == 4

    async def test_keeps_the_tokens_received_and_no_other(self, engine: LedgerEngine) -> None:
        async with open_lab(engine) as runtime:
            session = await runtime.create_session()
            await session.append([1, 2, 3])
            async with session.generate(100) as events:
                received = [await anext(events) for _ in range(3)]
                await wait_all_tasks_blocked()
            tokens = [event.token_id for event in received if isinstance(event, Token)]
            assert await state_of(session) == (6, digest_of([1, 2, 3, *tokens]))

    async def test_leaves_a_session_that_goes_on_as_if_nothing_had_been_left(self, engine: LedgerEngine) -> None:
        expected = engine.continued([1, 2, 3], 10)
        async with open_lab(engine) as runtime:
            session = await runtime.create_session()
            await session.append([1, 2, 3])
            async with session.generate(100) as events:
                received = [await anext(events) for _ in range(4)]
            rest = await generated(session, 6)
        assert [*received, *map(Token, rest)] == list(map(Token, expected))

    async def test_before_its_first_event_leaves_the_history_as_it_was(self, engine: LedgerEngine) -> None:
        async with open_lab(engine) as runtime:
            session = await runtime.create_session()
            await session.append([1, 2, 3])
            async with session.generate(100):
                pass
            assert (await session.info()).history_length == 3
            assert await generated(session, 5) == engine.continued([1, 2, 3], 5)

    async def test_while_it_waits_for_its_turn_withdraws_it(self, engine: LedgerEngine, nursery: trio.Nursery) -> None:
        leaving = trio.CancelScope()

        async def generate_and_leave(session: SessionHandle) -> None:
            with leaving:
                await generated(session, 100)

        async with open_lab(engine) as runtime:
            session = await runtime.create_session()
            engine.hold()
            nursery.start_soon(session.append, [1, 2, 3])
            await engine.begun()
            nursery.start_soon(generate_and_leave, session)
            await wait_all_tasks_blocked()
            leaving.cancel()
            await wait_all_tasks_blocked()
            engine.open()
            assert (await session.info()).history_length == 3
        assert len(engine.batches) == 1

    async def test_by_an_error_of_the_consumer_cancels_it_too(self, engine: LedgerEngine) -> None:
        async with open_lab(engine) as runtime:
            session = await runtime.create_session()
            await session.append([1, 2, 3])
            with pytest.raises(ZeroDivisionError):
                await divide_by_zero_after_a_token(session)
            assert (await session.info()).history_length == 4

    async def test_past_the_window_goes_on_as_if_nothing_had_been_left(self, engine: LedgerEngine) -> None:
        async with open_lab(engine) as runtime:
            session = await runtime.create_session()
            await session.append([1, 2, 3])
            received: list[int] = []
            for _ in range(12):
                async with session.generate(100) as events:
                    async for event in events:
                        if isinstance(event, Token):
                            received.append(event.token_id)
                        if len(received) % 5 == 4:
                            break
                received += await generated(session, 1)
        assert received == engine.continued([1, 2, 3], len(received))


async def divide_by_zero_after_a_token(session: SessionHandle) -> None:
    async with session.generate(100) as events:
        await anext(events)
        _ = 1 / 0


async def test_a_slow_consumer_pauses_only_itself(engine: LedgerEngine) -> None:
    async with open_lab(engine) as runtime:
        slow, quick = await runtime.create_session(), await runtime.create_session()
        await slow.append([1, 2, 3])
        await quick.append([4, 5, 6])
        async with slow.generate(50) as events:
            received = [await anext(events)]
            tokens = await generated(quick, 30)
            drawn_for_slow = sum(len(batch.rows) for batch in engine.batches) - (3 + 3 + 30)
            received += [event async for event in events if isinstance(event, Token)]
    assert tokens == engine.continued([4, 5, 6], 30)
    # One token that was taken, and the next one that waits.
    assert drawn_for_slow <= 2
    assert received == [Token(token_id) for token_id in engine.continued([1, 2, 3], 50)]


async def test_info_says_what_the_session_holds(engine: LedgerEngine) -> None:
    async with open_lab(engine, idle_ttl_s=0) as runtime:
        session = await runtime.create_session()
        await session.append(range(20))
        info = await session.info()
    assert info == SessionInfo(
        history_length=20,
        kv_live_bytes=16 * engine.spec.token_bytes,
        kv_ceiling_bytes=engine.spec.ceiling_bytes,
        evicted_token_count=4,
        sink=2,
        window=14,
        idle_seconds=info.idle_seconds,
        history_digest=digest_of(range(20)),
    )


async def test_idle_seconds_run_from_the_last_append_or_generation_and_not_from_the_last_info(
    engine: LedgerEngine, mock_clock: MockClock
) -> None:
    idle: list[float] = []
    async with open_lab(engine) as runtime:
        session = await runtime.create_session()
        for use in (
            lambda: session.append([1]),
            session.info,
            lambda: session.append([]),
            lambda: generated(session, 1),
        ):
            mock_clock.jump(5)
            await use()
            idle.append((await session.info()).idle_seconds)
    assert idle == [0, 5, 0, 0]


async def test_closing_returns_the_length_of_the_history(engine: LedgerEngine) -> None:
    async with open_lab(engine) as runtime:
        session = await runtime.create_session()
        await session.append([1, 2, 3])
        await generated(session, 2)
        assert await session.close() == 5


async def test_closing_waits_for_the_generation_before_it(engine: LedgerEngine, nursery: trio.Nursery) -> None:
    lengths: list[int] = []

    async def close(session: SessionHandle) -> None:
        lengths.append(await session.close())

    async with open_lab(engine) as runtime:
        session = await runtime.create_session()
        await session.append([1, 2, 3])
        async with session.generate(5) as events:
            await anext(events)
            nursery.start_soon(close, session)
            await wait_all_tasks_blocked()
            assert not lengths
            rest = [event async for event in events]
        await wait_all_tasks_blocked()
    assert len(rest) == 5
    assert lengths == [8]


async def test_a_closed_session_is_not_found_by_those_who_hold_it_nor_by_those_who_wait(
    engine: LedgerEngine, nursery: trio.Nursery
) -> None:
    refused: list[type[Exception]] = []

    async def append(session: SessionHandle) -> None:
        with pytest.raises(SessionNotFound) as caught:
            await session.append([4])
        refused.append(caught.type)

    async with open_lab(engine) as runtime:
        session = await runtime.create_session()
        engine.hold()
        nursery.start_soon(session.append, [1])
        await engine.begun()
        nursery.start_soon(session.close)
        await wait_all_tasks_blocked()
        nursery.start_soon(append, session)
        await wait_all_tasks_blocked()
        engine.open()
        await wait_until_not_found(session)
        await append(session)
        with pytest.raises(SessionNotFound):
            await generated(session, 1)
        with pytest.raises(SessionNotFound):
            await session.close()
    assert len(refused) == 2


async def wait_until_not_found(session: SessionHandle) -> None:
    with pytest.raises(SessionNotFound):
        await session.info()


async def test_turn_metrics_count_each_generation_once(engine: LedgerEngine) -> None:
    async with open_lab(engine) as runtime:
        session = await runtime.create_session()
        await session.append([1, 2, 3])
        await generated(session, 4)
        await generated(session, 2)
    assert sample(runtime.metrics, "generated_tokens_total") == 6
    assert sample(runtime.metrics, "time_to_first_token_seconds_count") == 2
    assert sample(runtime.metrics, "generate_prefill_duration_seconds_count") == 2
    assert sample(runtime.metrics, "inter_token_seconds_count") == 3 + 1


class TestABrokenInvariant:
    @pytest.mark.parametrize(("fault", "kind"), [(SKIPS_A_LAYER, "inv1"), (GOES_BACK, "inv2")])
    async def test_fails_the_session_with_its_name_and_is_counted(
        self, engine: LedgerEngine, fault: int, kind: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with open_lab(engine) as runtime:
            session = await runtime.create_session()
            await session.append([1, 2])
            with pytest.raises(InvariantViolation) as violation:
                await session.append([fault])
            with pytest.raises(SessionNotFound):
                await session.info()
            assert violation.value.kind == kind
            assert sample(runtime.metrics, "cache_invariant_violations_total", kind=kind) == 1
            assert sample(runtime.metrics, "session_total", outcome="failed") == 1
            assert sample(runtime.metrics, "slab_in_use") == 0

    async def test_leaves_the_neighbours_as_they_were(self, engine: LedgerEngine) -> None:
        async with open_lab(engine) as runtime:
            neighbour, session = await runtime.create_session(), await runtime.create_session()
            await neighbour.append([1, 2, 3])
            async with neighbour.generate(20) as events:
                received = [await anext(events) for _ in range(5)]
                with pytest.raises(InvariantViolation):
                    await session.append([1, 2, SKIPS_A_LAYER])
                received += [event async for event in events if isinstance(event, Token)]
            assert received == [Token(token_id) for token_id in engine.continued([1, 2, 3], 20)]

    async def test_ends_a_generation_with_an_error_and_not_with_a_last_word(self, engine: LedgerEngine) -> None:
        async with open_lab(engine) as runtime:
            session = await runtime.create_session()
            await leave_append_in_its_first_forward(engine, session, [*range(8), SKIPS_A_LAYER])
            with pytest.raises(InvariantViolation):
                await events_of(session, 3)

    async def test_tells_those_who_wait_behind_that_the_session_is_gone(
        self, engine: LedgerEngine, nursery: trio.Nursery
    ) -> None:
        async def append_and_fail(session: SessionHandle) -> None:
            with pytest.raises(InvariantViolation):
                await session.append([SKIPS_A_LAYER])

        async with open_lab(engine) as runtime:
            session = await runtime.create_session()
            engine.hold()
            nursery.start_soon(append_and_fail, session)
            await engine.begun()
            nursery.start_soon(wait_until_not_found, session)
            await wait_all_tasks_blocked()
            engine.open()

    async def test_fails_the_session_also_when_its_asker_has_left_in_that_forward(self, engine: LedgerEngine) -> None:
        async with open_lab(engine) as runtime:
            session = await runtime.create_session()
            await leave_append_in_its_first_forward(engine, session, [1, SKIPS_A_LAYER])
            await wait_until_not_found(session)
            assert sample(runtime.metrics, "cache_invariant_violations_total", kind="inv1") == 1
            assert sample(runtime.metrics, "slab_in_use") == 0

    async def test_fails_the_session_also_when_a_slow_consumer_leaves_without_taking_the_error(
        self, engine: LedgerEngine
    ) -> None:
        async with open_lab(engine) as runtime:
            session = await runtime.create_session()
            await leave_append_in_its_first_forward(engine, session, [*range(20), SKIPS_A_LAYER])
            engine.hold()
            async with session.generate(3) as events:
                assert isinstance(await anext(events), HistoryTruncated)
                await engine.begun()
                engine.end()
                await engine.begun()
                engine.open()
                # What asks while that forward runs is answered by a later one.
                await (await runtime.create_session()).append([1])
                await wait_all_tasks_blocked()
            await wait_until_not_found(session)
            assert sample(runtime.metrics, "cache_invariant_violations_total", kind="inv1") == 1


async def test_a_bug_in_a_handler_is_told_as_a_failed_session(engine: LedgerEngine) -> None:
    async with open_lab(engine) as runtime:
        session = await runtime.create_session()
        await session.append([5])
        with pytest.raises(SessionFailed):
            await session.fork_into(None)  # type: ignore[arg-type] # The bug.
        assert sample(runtime.metrics, "session_total", outcome="failed") == 1


@pytest.mark.parametrize("token_ids", [["5"], [5.0], [None], [-1], [2**32]])
async def test_what_is_no_token_id_is_refused_and_the_session_lives(token_ids: list[Any]) -> None:
    async with open_lab(LedgerEngine()) as runtime:
        session = await runtime.create_session()

        with pytest.raises(InvalidRequest):
            await session.append(token_ids)

        assert (await session.append([5])).history_length == 1


async def test_a_turn_is_kept_with_what_it_took_from_its_first_append_to_its_first_token(
    engine: LedgerEngine, mock_clock: MockClock
) -> None:
    async with open_lab(engine) as runtime:
        session = await runtime.create_session(label="ours")
        await session.append([1, 2])
        mock_clock.jump(2)
        await session.append([3])
        mock_clock.jump(3)
        await generated(session, 4)
        await generated(session, 1)
    assert runtime.metrics.turns == (TurnTime("ours", 3, 5.0), TurnTime("ours", 7, 0.0))
    assert sample(runtime.metrics, "time_to_first_token_seconds_sum") == 5


async def test_a_turn_without_a_first_token_is_not_kept(engine: LedgerEngine) -> None:
    async with open_lab(engine) as runtime:
        session = await runtime.create_session()
        await session.append([1, 2])
        with pytest.raises(InvalidRequest):
            await generated(session, 0)
    assert runtime.metrics.turns == ()


@pytest.mark.parametrize("row_tile", [1, 2])
async def test_streams_leave_a_prompt_its_turn_however_few_rows_a_forward_has(row_tile: int) -> None:
    engine = LedgerEngine(row_tile=row_tile)
    is_read = trio.Event()
    async with open_lab(engine) as runtime:
        streams = [await runtime.create_session() for _ in range(2)]
        prompt = await runtime.create_session()

        async def read() -> None:
            await prompt.append([5] * 50)
            is_read.set()

        async def generate(session: SessionHandle) -> None:
            await session.append([1, 2, 3])
            async with session.generate(3_000) as events:
                async for _ in events:
                    if is_read.is_set():
                        break

        async with trio.open_nursery() as askers:
            for session in streams:
                askers.start_soon(generate, session)
            askers.start_soon(read)
        lengths = [(await session.info()).history_length for session in streams]
        assert max(lengths) < 3_000
