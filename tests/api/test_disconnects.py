"""A client that leaves stops its work within one forward: over real sockets, with forwards that the test holds."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from api.client import connect
from runtime import Token
from tests.actors.engines import sample
from tests.api.doors import HELLO, JSON, House, open_house

# A loop with nothing to do for this long has seen what its sockets had to say.
_NOTICED_S = 0.05
# More rows than the ledger engine's tile has: a prompt of several forwards.
LONG = " ".join(["hello"] * 14)


@asynccontextmanager
async def posted(house: House, **body: object) -> AsyncIterator[trio.SocketStream]:
    """A connection on which a completion was asked for; leaving the block is the client's disconnect."""
    stream = await trio.open_tcp_stream(*house.http)
    async with stream:
        data = json.dumps(HELLO | body).encode()
        head = f"POST /v1/chat/completions {JSON}{len(data)}\r\n\r\n"
        await stream.send_all(head.encode() + data)
        yield stream


async def read_until(stream: trio.SocketStream, mark: bytes) -> bytes:
    """What came up to and with `mark`."""
    data = b""
    while mark not in data:
        more = await stream.receive_some()
        assert more, data
        data += more
    return data


async def until(condition: Callable[[], bool]) -> None:
    """Returns once `condition` holds. Sockets know no event for "the other side has noticed"."""
    with trio.fail_after(100):
        while not condition():
            await wait_all_tasks_blocked(0.01)


def is_free(house: House) -> bool:
    return sample(house.server.metrics, "slab_in_use") == 0 and sample(house.server.metrics, "session_active") == 0


async def leaves_in_prefill(house: House) -> None:
    async with posted(house, messages=[{"role": "user", "content": LONG}]):
        await house.engine.begun()


async def leaves_in_decode(house: House) -> None:
    async with posted(house, max_tokens=1000, ignore_eos=True):
        for _ in range(3):
            await house.engine.begun()
            house.engine.end()
        await house.engine.begun()


async def leaves_between_chunks(house: House) -> None:
    async with posted(house, max_tokens=1000, ignore_eos=True, stream=True) as stream:
        await house.engine.begun()
        house.engine.end()
        await house.engine.begun()
        house.engine.end()
        await read_until(stream, b'"content":"')
        await house.engine.begun()


@pytest.mark.parametrize("leaves", [leaves_in_prefill, leaves_in_decode, leaves_between_chunks])
async def test_an_http_client_that_leaves_costs_no_forward_more_than_the_one_that_runs(
    leaves: Callable[[House], Awaitable[None]],
) -> None:
    async with open_house(http_overflow="evict") as house:
        house.engine.hold()
        await leaves(house)
        begun = len(house.engine.batches)
        await wait_all_tasks_blocked(_NOTICED_S)

        house.engine.open()

        await until(lambda: is_free(house))
        assert len(house.engine.batches) == begun


async def test_a_waiter_that_leaves_is_out_of_the_queue_at_once() -> None:
    async with open_house(max_concurrent=1, admission_policy="queue") as house:
        house.engine.hold()
        async with posted(house):
            await house.engine.begun()
            async with posted(house):
                await until(lambda: sample(house.server.metrics, "admission_pending") == 1)

            await until(lambda: sample(house.server.metrics, "admission_pending") == 0)


async def test_a_grpc_client_that_cancels_leaves_a_session_that_answers() -> None:
    async with open_house() as house, connect(house.grpc) as client:
        session = await client.create_session()
        await session.append([1, 2, 3])
        house.engine.hold()
        async with session.generate(1000) as events:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_two_forwards, house)
                assert [type(await anext(events)) for _ in range(2)] == [Token, Token]
            await house.engine.begun()
            begun = len(house.engine.batches)
        await wait_all_tasks_blocked(_NOTICED_S)
        house.engine.open()

        info = await session.info()

        assert info.history_length == 5
        assert len(house.engine.batches) == begun


async def test_a_grpc_client_whose_connection_drops_in_a_prefill_leaves_a_session_that_answers() -> None:
    async with open_house() as house, connect(house.grpc) as stays:
        house.engine.hold()
        async with connect(house.grpc) as leaves, trio.open_nursery() as nursery:
            session = await leaves.create_session()
            nursery.start_soon(session.append, [5] * 100)
            await house.engine.begun()
            nursery.cancel_scope.cancel()
        await wait_all_tasks_blocked(_NOTICED_S)
        begun = len(house.engine.batches)
        house.engine.open()

        info = await stays.find_session(session.id).info()

        assert info.history_length == 100
        assert len(house.engine.batches) == begun


async def _two_forwards(house: House) -> None:
    for _ in range(2):
        await house.engine.begun()
        house.engine.end()
