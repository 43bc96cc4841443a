"""What a program may pass to our client: each argument that makes no sense is refused, and none arrives as another value."""

from __future__ import annotations

from itertools import count
from typing import Any

import numpy as np
import pytest

from api.client import ClientSession, connect
from runtime.errors import InvalidRequest, SessionNotFound, SnapshotNotFound
from runtime.events import Token
from tests.actors.engines import generated as generated_by_an_embedded_one
from tests.api.doors import open_house

WRONG: list[tuple[str, Any]] = [
    *(("max_tokens", value) for value in (0, -1, 2**32 + 5, 2**64, 2.5, True, "5", None)),
    *(("top_k", value) for value in (-1, 2.5, True, "5")),
    *(("seed", value) for value in (-1, 2**64, 2**64 + 1, 2.5, True, "5")),
    *(("temperature", value) for value in (-0.1, 1e39, 10**400, float("nan"), True, "1")),
    *(("top_p", value) for value in (0.0, 1.1, float("nan"), True, "1")),
]


async def generated(session: ClientSession, max_tokens: int, **sampling: Any) -> list[int]:
    async with session.generate(max_tokens, **sampling) as events:
        return [event.token_id async for event in events if isinstance(event, Token)]


@pytest.mark.parametrize(
    "token_ids", [None, 5, "abc", ["a"], [1.0], [[1]], [-1], [2**32], [2**40], [None], [1, 2**80]], ids=repr
)
async def test_what_is_no_list_of_tokens_is_not_appended(token_ids: Any) -> None:
    async with open_house() as house, connect(house.grpc) as client, client.session() as session:
        with pytest.raises(InvalidRequest) as refused:
            await session.append(token_ids)

        assert refused.value.param == "token_ids"
        assert (await session.append([1])).history_length == 1


async def test_an_endless_iterable_is_refused() -> None:
    async with open_house() as house, connect(house.grpc) as client, client.session() as session:
        with pytest.raises(InvalidRequest, match="split it"):
            await session.append(count())


@pytest.mark.parametrize("length", [-1, 2**64, 2**64 + 1, 2.5, True, "0"], ids=repr)
async def test_a_length_that_is_none_is_refused(length: Any) -> None:
    async with open_house() as house, connect(house.grpc) as client, client.session() as session:
        with pytest.raises(InvalidRequest) as refused:
            await session.append([1], length)

        assert refused.value.param == "expected_history_length"


async def test_a_generation_that_makes_no_sense_is_refused_and_the_session_goes_on() -> None:
    async with open_house() as house, connect(house.grpc) as client, client.session() as session:
        await session.append([5, 6, 7])
        for name, value in WRONG:
            with pytest.raises(InvalidRequest) as refused:
                await generated(session, **({"max_tokens": 2} | {name: value}))
            assert refused.value.param == name

        assert (await session.info()).history_length == 3


@pytest.mark.parametrize("top_k", [2**32, 2**32 + 1, 2**70])
async def test_more_than_every_token_is_every_token(top_k: int) -> None:
    async with open_house() as house, connect(house.grpc) as client, client.session() as session:
        embedded = await house.runtime.create_session()
        await session.append([5, 6, 7])
        await embedded.append([5, 6, 7])
        sampling = {"temperature": 1.0, "seed": 3, "top_k": top_k}

        assert await generated(session, 8, **sampling) == await generated_by_an_embedded_one(embedded, 8, **sampling)


async def test_whole_numbers_of_other_kinds_are_taken() -> None:
    whole: Any = np.int64
    async with open_house() as house, connect(house.grpc) as client, client.session(np.arange(90, 93)) as session:
        await session.append(np.array([5, 6, 7], np.int16), whole(0))

        assert len(await generated(session, whole(3), top_k=np.uint8(3), seed=np.uint64(2**64 - 1))) == 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("eos_token_ids", ids) for ids in ([-1], [2**32], [2**40], [1.5], ["2"], [True], range(65), 5, None, "ab")),
        *(("overflow", overflow) for overflow in ("evict", None, 1)),
        *(("label", label) for label in (None, 5, b"label", "a" * 257, "\ud800")),
    ],
    ids=repr,
)
async def test_a_session_that_makes_no_sense_is_not_made(name: str, value: Any) -> None:
    async with open_house() as house, connect(house.grpc) as client:
        with pytest.raises(InvalidRequest):
            await client.create_session(**{name: value})

        assert house.runtime.load().slab_in_use == 0


@pytest.mark.parametrize("session_id", [None, 5, b"id", ["id"], "", "\ud800", "../x"], ids=repr)
async def test_an_id_that_is_none_is_of_no_session(session_id: Any) -> None:
    async with open_house() as house, connect(house.grpc) as client:
        with pytest.raises(SessionNotFound):
            await client.find_session(session_id).info()


@pytest.mark.parametrize("snapshot_id", [None, 5, ["id"], "\ud800"], ids=repr)
async def test_an_id_that_is_none_is_of_no_snapshot(snapshot_id: Any) -> None:
    async with open_house() as house, connect(house.grpc) as client:
        with pytest.raises(SnapshotNotFound):
            await client.restore_session(snapshot_id)
        with pytest.raises(SnapshotNotFound):
            await client.delete_snapshot(snapshot_id)
