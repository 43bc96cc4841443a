"""A server that stops: calls that it ends are told so, and what is idle is not waited for."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import pytest
import trio
from hypercorn.config import Config
from trio.testing import wait_all_tasks_blocked

from api import serve
from api.client import Client, connect
from api.doors import Addresses
from runtime import Settings
from runtime.errors import NotServing
from runtime.settings import split_address
from tests.actors.engines import LedgerEngine
from tests.api.doors import House, open_house

# No test waits this long; without it one that fails would never end.
_NEVER_S = 100
_AGES_S = 10**9
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"
GET = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def generates(client: Client) -> None:
    session = await client.create_session()
    await session.append([1])
    async with session.generate(10**6) as events:
        async for _ in events:
            pass


async def appends(client: Client) -> None:
    session = await client.create_session()
    await session.append(range(50))


async def waits_for_a_session_at_work(client: Client) -> None:
    session = await client.create_session()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(session.append, range(50))
        await wait_all_tasks_blocked(0.05)
        await session.info()


@pytest.mark.parametrize("call", [generates, appends, waits_for_a_session_at_work])
async def test_a_call_that_is_ended_with_the_server_is_told_so(call: Callable[[Client], Awaitable[None]]) -> None:
    told: list[str] = []

    async def ask(house: House) -> None:
        async with connect(house.grpc) as client:
            try:
                await call(client)
            except* NotServing as errors:
                told.extend(str(error) for error in errors.exceptions)

    with trio.fail_after(_NEVER_S):
        async with open_house(LedgerEngine()) as house, trio.open_nursery() as askers:
            house.engine.hold()
            askers.start_soon(ask, house)
            await house.engine.begun()
            await wait_all_tasks_blocked(0.1)
            house.server.begin_drain()
            house.server.end_calls()
            # What has begun comes to its end.
            house.engine.open()

    assert set(told) == {"the server is stopping: try again in a moment"}


async def opened(stack: AsyncExitStack, address: str, said: bytes) -> trio.SocketStream:
    stream = await stack.enter_async_context(await trio.open_tcp_stream(*split_address(address)))
    await stream.send_all(said)
    if said:
        assert await stream.receive_some()
    return stream


async def test_connections_without_a_call_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "api.server.DRAIN_S",
        "api.server.LAST_WORDS_S",
        "api.foreign.hypercorn._GOODBYE_S",
        "api.foreign.grpclib.connection._CLOSING_S",
    ):
        monkeypatch.setattr(name, _AGES_S)
    monkeypatch.setattr(Config, "graceful_timeout", _AGES_S)
    stop, stopped = trio.Event(), trio.Event()

    async def serving(*, task_status: trio.TaskStatus[Addresses]) -> None:
        chosen = Settings(device="cpu", determinism="fast", window=60, capacity=1, grpc_bind="127.0.0.1:0")
        await serve(chosen, http_bind="127.0.0.1:0", shutdown_trigger=stop.wait, task_status=task_status)
        stopped.set()

    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
        addresses = await nursery.start(serving)
        for said in (b"", GET, PREFACE):
            await opened(stack, addresses.http.removeprefix("http://"), said)
        for said in (b"", PREFACE):
            await opened(stack, addresses.grpc, said)
        async with connect(addresses.grpc) as client:
            await client.list_sessions()

            # The clients stay.
            with trio.fail_after(_NEVER_S):
                stop.set()
                await stopped.wait()
