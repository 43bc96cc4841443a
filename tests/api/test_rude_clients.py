"""Clients that break off in the middle of what they say: whatever becomes of their connection, the server goes on."""

from __future__ import annotations

import json
import struct
from contextlib import AsyncExitStack, suppress
from socket import SO_LINGER, SO_RCVBUF, SOL_SOCKET

import pytest
import trio
import trio.testing
from hypercorn.config import Config
from hypercorn.logging import Logger
from hypercorn.trio import serve

from api.http import make_app
from runtime.settings import split_address
from tests.api.doors import HELLO, JSON, House, open_house
from tests.api.test_disconnects import until

TRIES = 300


async def breaks_off(house: House, said: bytes) -> None:
    stream = await trio.open_tcp_stream(*house.http)
    async with stream:
        with suppress(trio.BrokenResourceError):
            await stream.send_all(said)
            await stream.send_eof()
            await stream.receive_some()


async def got(host: str, port: int) -> bytes:
    """The answer to a request for /healthz, taken to its end: who leaves before has the rest of its connection cancelled."""
    async with await trio.open_tcp_stream(host, port) as stream:
        await stream.send_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        return b"".join([bytes(part) async for part in stream])


@pytest.mark.parametrize("path", ["/nothing", "/v1/chat/completions"])
@pytest.mark.parametrize("length", [10, 10**9])
async def test_a_body_that_breaks_off_while_it_is_answered_costs_the_server_nothing(path: str, length: int) -> None:
    said = f"POST {path} {JSON}{length}\r\n\r\nhello".encode()
    async with open_house() as house:
        async with trio.open_nursery() as clients:
            for _ in range(TRIES):
                clients.start_soon(breaks_off, house, said)

        assert (await got(*house.http)).startswith(b"HTTP/1.1 200 ")


def tasks_living() -> int:
    return trio.lowlevel.current_statistics().tasks_living


async def test_a_connection_that_breaks_with_a_second_request_on_it_is_over_once_the_first_is_answered() -> None:
    data = json.dumps(HELLO | {"max_tokens": 1}).encode()
    request = f"POST /v1/chat/completions {JSON}{len(data)}\r\n\r\n".encode() + data
    async with open_house() as house:
        tasks = tasks_living()
        house.engine.hold()
        async with await trio.open_tcp_stream(*house.http) as stream:
            stream.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
            await stream.send_all(request * 2)
            await house.engine.begun()
        house.engine.open()

        await until(lambda: tasks_living() <= tasks)


class FaultyLogger(Logger):
    """Fails in the task of a connection, where nothing of ours runs."""

    async def access(self, *_: object) -> None:
        raise ZeroDivisionError


async def test_what_fails_in_one_connection_is_logged_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    config = Config()
    config.bind, config.logger_class = ["127.0.0.1:0"], FaultyLogger
    async with open_house() as house, trio.open_nursery() as nursery:
        (url,) = await nursery.start(serve, make_app(house.server), config)
        address = split_address(url.removeprefix("http://"))

        answers = [await got(*address) for _ in range(2)]

        assert [answer[:13] for answer in answers] == [b"HTTP/1.1 200 "] * 2
        await until(lambda: "ZeroDivisionError" in caplog.text)
        nursery.cancel_scope.cancel()


async def test_a_client_that_does_not_read_does_not_keep_the_server_from_its_end() -> None:
    body = HELLO | {"stream": True, "max_tokens": 10**6, "ignore_eos": True}
    data = json.dumps(body).encode()
    request = f"POST /v1/chat/completions {JSON}{len(data)}\r\n\r\n".encode() + data
    async with AsyncExitStack() as clients, trio.open_nursery() as nursery:
        async with open_house(http_overflow="evict") as house:
            client = await clients.enter_async_context(await trio.open_tcp_stream(*house.http))
            client.setsockopt(SOL_SOCKET, SO_RCVBUF, 2048)
            await client.send_all(request)
            # Its answers wait for room in the socket, and the engine for them.
            await until(lambda: bool(house.engine.batches))
            count = -1
            while count != len(house.engine.batches):
                count = len(house.engine.batches)
                await trio.testing.wait_all_tasks_blocked(0.2)
            # Without an end of itself, the house ends when the client does, and this test with it.
            nursery.start_soon(gives_up, client)
        assert not nursery.cancel_scope.cancel_called
        nursery.cancel_scope.cancel()


async def gives_up(client: trio.SocketStream) -> None:
    await trio.sleep(100)
    await client.aclose()
    raise AssertionError("the server waited for a client that does not read")
