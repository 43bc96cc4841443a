"""The ways in which sessions that are pinned to slabs can block each other: each ends with all served or refused."""

from __future__ import annotations

import hashlib
import struct
from collections import Counter

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from api.client import Client, ClientSession, connect
from runtime import Token
from runtime.errors import CapacityExhausted, HistoryMismatch, NotServing, SessionNotFound
from tests.actors.engines import LedgerEngine, sample
from tests.api.doors import House, open_house

# The longest that a test waits for an end that comes at once where nothing blocks.
_NEVER_S = 100


async def tokens_of(session: ClientSession, count: int) -> list[int]:
    async with session.generate(count) as events:
        return [event.token_id async for event in events if isinstance(event, Token)]


def is_idle(house: House) -> bool:
    return sample(house.server.metrics, "slab_in_use") == 0


async def test_a_burst_above_capacity_ends_with_every_session_served_or_refused() -> None:
    ends: Counter[str] = Counter()

    async def one(client: Client, number: int) -> None:
        try:
            async with client.session() as session:
                await session.append([number % 90] * 20)
                expected = LedgerEngine().continued([number % 90] * 20, 5)
                ends["served" if await tokens_of(session, 5) == expected else "wrong"] += 1
        except (CapacityExhausted, SessionNotFound) as error:
            ends[type(error).__name__] += 1

    with trio.fail_after(_NEVER_S):
        async with open_house(capacity=3) as house, connect(house.grpc) as client:
            async with trio.open_nursery() as nursery:
                for number in range(60):
                    nursery.start_soon(one, client, number)

            assert is_idle(house)
    assert ends.total() == 60
    assert ends["wrong"] == 0
    assert ends["served"] >= 3


async def test_a_session_that_never_stops_lets_the_others_through() -> None:
    with trio.fail_after(_NEVER_S):
        async with open_house(capacity=2) as house, connect(house.grpc) as client:
            runaway, other = await client.create_session(), await client.create_session()
            await runaway.append([1])
            async with runaway.generate(2**31 - 1) as events:
                await anext(events)

                await other.append([2] * 50)
                tokens = await tokens_of(other, 10)

            assert tokens == LedgerEngine().continued([2] * 50, 10)


async def test_when_all_sessions_work_one_more_is_refused_and_none_is_evicted() -> None:
    with trio.fail_after(_NEVER_S):
        async with open_house(capacity=1) as house, connect(house.grpc) as client:
            runaway = await client.create_session()
            await runaway.append([1])
            async with runaway.generate(2**31 - 1) as events:
                await anext(events)

                with pytest.raises(CapacityExhausted):
                    await client.create_session()

            assert (await runaway.info()).history_length >= 2


async def test_a_close_in_the_middle_of_a_prefill_waits_for_it_and_frees_the_slab() -> None:
    with trio.fail_after(_NEVER_S):
        async with open_house() as house, connect(house.grpc) as client:
            session = await client.create_session()
            house.engine.hold()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(session.append, [3] * 100)
                await house.engine.begun()
                nursery.start_soon(session.close)
                await wait_all_tasks_blocked(0.05)
                house.engine.open()

            assert is_idle(house)
            with pytest.raises(SessionNotFound):
                await session.info()


async def test_a_turn_that_overlaps_another_whose_client_vanishes_is_served() -> None:
    with trio.fail_after(_NEVER_S):
        async with open_house() as house, connect(house.grpc) as stays:
            session = await stays.create_session()
            await session.append([4] * 10)
            overlapping: list[list[int]] = []

            async def overlap() -> None:
                overlapping.append(await tokens_of(session, 5))

            async with trio.open_nursery() as nursery:
                async with (
                    connect(house.grpc) as leaves,
                    leaves.find_session(session.id).generate(2**31 - 1) as events,
                ):
                    await anext(events)
                    house.engine.hold()
                    await house.engine.begun()
                    nursery.start_soon(overlap)
                    await wait_all_tasks_blocked(0.05)
                house.engine.open()

            assert len(overlapping[0]) == 5
            assert (await session.info()).history_length >= 16


async def test_a_client_that_loses_every_third_reply_ends_with_the_history_it_meant() -> None:
    meant: list[int] = []
    async with open_house() as house, connect(house.grpc) as client:
        session = await client.create_session()
        for number in range(60):
            chunk = [(number + place) % 90 for place in range(number % 7)]
            length = len(meant)
            for is_lost in (number % 3 == 0, False):
                try:
                    appended = await session.append(chunk, expected_history_length=length)
                except HistoryMismatch:
                    # The lost reply was of an append that had happened.
                    break
                if not is_lost:
                    break
            meant += chunk

        info = await session.info()

    assert info.history_length == len(meant)
    assert info.history_digest == hashlib.blake2b(struct.pack(f"<{len(meant)}I", *meant)).digest()
    assert appended.history_length == len(meant)


async def test_a_server_that_drains_refuses_new_calls_and_lets_streams_finish(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("api.server.DRAIN_S", 10**9)
    with trio.fail_after(_NEVER_S):
        async with open_house() as house, connect(house.grpc) as client:
            session = await client.create_session()
            await session.append([1])
            house.engine.hold()
            async with trio.open_nursery() as nursery:
                tokens: list[int] = []

                async def stream() -> None:
                    tokens.extend(await tokens_of(session, 5))

                nursery.start_soon(stream)
                await house.engine.begun()
                nursery.start_soon(house.server.drain)
                await wait_all_tasks_blocked(0.05)

                with pytest.raises(NotServing):
                    await client.create_session()

                house.engine.open()

            assert tokens == LedgerEngine().continued([1], 5)
