"""Clients that mean harm, or might as well: what they leave behind, and what others notice of it."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress

import pytest
import trio
import trio.testing

from tests.api.doors import HELLO, House, open_house
from tests.api.h2_client import Rude, StreamEnded, StreamReset, rude
from tests.api.test_disconnects import is_free, until
from tests.api.test_rude_clients import gives_up, got, tasks_living

ENDLESS = HELLO | {"stream": True, "max_tokens": 10**6, "ignore_eos": True}
# Answers that are longer than the window of a client that takes 1,000 bytes, or none.
UNREAD = [("/openapi.json", 1000), ("/metrics", 0), ("/openapi.json", 0)]


def descriptors() -> int:
    return len(os.listdir("/dev/fd"))


async def settled() -> None:
    await trio.testing.wait_all_tasks_blocked(0.05)


@pytest.mark.parametrize(("path", "window"), UNREAD)
async def test_a_stream_that_is_reset_while_its_answer_waits_for_the_window_leaves_no_task(path: str, window: int) -> None:
    async with open_house() as house, rude(house.http, window) as client:
        await settled()
        tasks = tasks_living()
        for _ in range(20):
            number = await client.ask(path)
            assert await client.status(number) == "200"
            await settled()
            await client.reset(number)

        await until(lambda: tasks_living() <= tasks)
        assert await client.status(await client.ask("/healthz")) == "200"


@pytest.mark.parametrize(("path", "window"), UNREAD)
async def test_a_connection_that_closes_while_its_answers_wait_for_the_window_leaves_nothing(path: str, window: int) -> None:
    async with open_house() as house:
        await settled()
        tasks, files = tasks_living(), descriptors()
        for _ in range(20):
            async with rude(house.http, window) as client:
                assert await client.status(await client.ask(path)) == "200"

        await until(lambda: tasks_living() <= tasks and descriptors() <= files)


async def test_a_stream_of_events_that_nobody_reads_is_ended_and_its_permit_is_free_again() -> None:
    async with open_house(http_overflow="evict", max_concurrent=1, reader_timeout_s=0.1) as house:
        async with rude(house.http, 0) as client:
            number = await client.ask("/v1/chat/completions", ENDLESS)
            await client.until(number, StreamReset)

            await until(lambda: is_free(house))
            assert await client.status(await client.ask("/healthz")) == "200"


async def test_an_answer_that_nobody_reads_is_ended_also_where_all_of_it_was_made() -> None:
    async with open_house(reader_timeout_s=0.1) as house, rude(house.http, 1000) as client:
        number = await client.ask("/openapi.json")

        await client.until(number, StreamReset)


async def test_a_client_that_reads_slowly_is_not_one_that_does_not_read() -> None:
    async with open_house(reader_timeout_s=0.5) as house, rude(house.http, 1000) as client:
        number = await client.ask("/openapi.json")
        with trio.fail_after(30):
            while not any(isinstance(event, StreamEnded) for event in await read_a_little(client, number)):
                pass


async def read_a_little(client: Rude, number: int) -> list[object]:
    client.grant(number, 1000)
    await client.flush()
    return list(await client.next_events())


async def test_an_http_1_client_that_does_not_read_its_stream_loses_it() -> None:
    body = json.dumps(ENDLESS | {"logprobs": False}).encode()
    async with open_house(http_overflow="evict", max_concurrent=1, reader_timeout_s=0.2) as house:
        async with await trio.open_tcp_stream(*house.http) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            await client.send_all(post("/v1/chat/completions", body))
            await until(lambda: not is_free(house))

            await until(lambda: is_free(house))


def post(path: str, body: bytes, *more: str) -> bytes:
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        *more,
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


@pytest.mark.parametrize(("path", "window"), [*UNREAD, ("/v1/chat/completions", 0)])
async def test_clients_that_wait_for_nothing_do_not_keep_the_server_from_its_end(path: str, window: int) -> None:
    async with AsyncExitStack() as clients, trio.open_nursery() as nursery:
        async with open_house(http_overflow="evict") as house:
            for _ in range(3):
                client = await clients.enter_async_context(rude(house.http, window))
                number = await client.ask(path, ENDLESS if path.startswith("/v1") else None)
                assert await client.status(number) == "200"
            await settled()
            nursery.start_soon(gives_up, client.stream)
        assert not nursery.cancel_scope.cancel_called
        nursery.cancel_scope.cancel()


FRAMES: dict[str, Callable[[Rude], bytes]] = {
    "unknown type": lambda _: b"\x00\x00\x03\x42\x00\x00\x00\x00\x00abc",
    "priority of 5,000 streams": lambda _: b"".join(
        b"\x00\x00\x05\x02\x00" + (2 * number + 1).to_bytes(4, "big") + b"\x00\x00\x00\x00\x10" for number in range(5000)
    ),
}


@pytest.mark.parametrize("name", FRAMES)
async def test_frames_that_ask_for_nothing_are_passed_over(name: str) -> None:
    async with open_house() as house, rude(house.http) as client:
        await client.stream.send_all(FRAMES[name](client))

        assert await client.status(await client.ask("/healthz")) == "200"


async def test_a_path_that_is_not_ascii_ends_its_stream_and_not_its_connection() -> None:
    async with open_house() as house, rude(house.http) as client:
        number = await client.ask("/hé")
        await client.until(number, StreamReset)

        assert await client.status(await client.ask("/healthz")) == "200"


async def test_data_for_a_stream_that_was_answered_already_does_not_end_the_connection() -> None:
    async with open_house() as house, rude(house.http, 2**20) as client:
        number = await client.begin("/v1/chat/completions", 9 * 2**20)
        with suppress(trio.TooSlowError), trio.fail_after(5):
            await client.send_while_it_is_taken(number, 9 * 2**20)

        assert await client.status(await client.ask("/healthz")) == "200"


async def test_beyond_the_most_connections_the_one_idle_longest_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.foreign.hypercorn._most_connections", lambda: 3)
    async with open_house() as house, AsyncExitStack() as clients:
        idle = [await clients.enter_async_context(await trio.open_tcp_stream(*house.http)) for _ in range(3)]
        await settled()

        assert (await got(*house.http)).startswith(b"HTTP/1.1 200 ")

        with trio.fail_after(10):
            assert await idle[0].receive_some() == b""


async def test_a_head_that_does_not_come_to_its_end_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.foreign.hypercorn._HEAD_S", 0.1)
    async with open_house() as house, await trio.open_tcp_stream(*house.http) as client:
        await client.send_all(b"GET / HTTP/1.1\r\nHost: loc")

        with trio.fail_after(10):
            assert await client.receive_some() == b""


async def test_a_connection_without_a_call_is_closed_in_time() -> None:
    async with open_house(idle_connection_s=0.1) as house, await trio.open_tcp_stream(*house.http) as client:
        with trio.fail_after(10):
            assert await client.receive_some() == b""


async def asked(house: House, body: bytes) -> tuple[int, dict[str, object]]:
    """Status and error of a completion."""
    async with await trio.open_tcp_stream(*house.http) as stream:
        with suppress(trio.BrokenResourceError):
            await stream.send_all(post("/v1/chat/completions", body, "Connection: close"))
        said = b"".join([bytes(part) async for part in stream])
    head, _, rest = said.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(rest).get("error", {})
