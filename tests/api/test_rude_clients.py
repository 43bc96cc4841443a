"""Clients that break off in the middle of what they say: whatever becomes of their connection, the server goes on."""

from __future__ import annotations

from contextlib import suppress

import pytest
import trio

from tests.api.doors import House, open_house

TRIES = 300


async def breaks_off(house: House, said: bytes) -> None:
    stream = await trio.open_tcp_stream(*house.http)
    async with stream:
        with suppress(trio.BrokenResourceError):
            await stream.send_all(said)
            await stream.send_eof()
            await stream.receive_some()


@pytest.mark.parametrize("path", ["/nothing", "/v1/chat/completions"])
@pytest.mark.parametrize("length", [10, 10**9])
async def test_a_body_that_breaks_off_while_it_is_answered_costs_the_server_nothing(path: str, length: int) -> None:
    said = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\nhello".encode()
    async with open_house() as house:
        async with trio.open_nursery() as clients:
            for _ in range(TRIES):
                clients.start_soon(breaks_off, house, said)

        stream = await trio.open_tcp_stream(*house.http)
        async with stream:
            await stream.send_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 200 ")
