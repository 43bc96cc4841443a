"""Clients that mean harm, or might as well: what they leave behind, and what others notice of it."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests import templates
from tests.actors.engines import LedgerEngine
from tests.api.doors import HELLO, House, open_house
from tests.api.h2_client import DataReceived, Rude, StreamEnded, StreamReset, rude
from tests.api.hostile import CONTINUATION, HEADERS, frame
from tests.api.test_disconnects import is_free, until
from tests.api.test_rude_clients import gives_up, got, tasks_living
from tests.templates import text_with

ENDLESS = HELLO | {"stream": True, "max_tokens": 10**6, "ignore_eos": True}
# Answers that are longer than the window of a client that takes 1,000 bytes, or none.
UNREAD = [("/openapi.json", 1000), ("/metrics", 0), ("/openapi.json", 0)]


def descriptors() -> int:
    return len(os.listdir("/dev/fd"))


async def settled() -> None:
    await wait_all_tasks_blocked(0.05)


@pytest.mark.parametrize(("path", "window"), UNREAD)
async def test_a_stream_that_is_reset_while_its_answer_waits_for_the_window_leaves_no_task(
    path: str, window: int
) -> None:
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
async def test_a_connection_that_closes_while_its_answers_wait_for_the_window_leaves_nothing(
    path: str, window: int
) -> None:
    async with open_house() as house:
        await settled()
        tasks, files = tasks_living(), descriptors()
        for _ in range(20):
            async with rude(house.http, window) as client:
                assert await client.status(await client.ask(path)) == "200"

        await until(lambda: tasks_living() <= tasks and descriptors() <= files)


async def test_a_stream_of_events_that_nobody_reads_is_ended_and_its_permit_is_free_again() -> None:
    settings: dict[str, Any] = {"http_overflow": "evict", "max_concurrent": 1, "reader_timeout_s": 0.1}
    async with open_house(**settings) as house, rude(house.http, 0) as client:
        number = await client.ask("/v1/chat/completions", ENDLESS)
        await client.until(number, StreamReset)

        await until(lambda: is_free(house))
        assert await client.status(await client.ask("/healthz")) == "200"


async def test_an_answer_that_nobody_reads_is_ended_also_where_all_of_it_was_made() -> None:
    async with open_house(reader_timeout_s=0.1) as house, rude(house.http, 1000) as client:
        number = await client.ask("/openapi.json")

        await client.until(number, StreamReset)


async def test_a_client_that_reads_slowly_is_not_one_that_does_not_read(mock_clock: MockClock) -> None:
    async with open_house(reader_timeout_s=0.5) as house, rude(house.http, 1000) as client:
        number, granted, has_ended = await client.ask("/"), 1000, False
        while not has_ended:
            events = await client.next_events()
            assert not any(isinstance(event, StreamReset) for event in events)
            granted -= sum(event.flow_controlled_length for event in events if isinstance(event, DataReceived))
            has_ended = any(isinstance(event, StreamEnded) for event in events)
            if not granted and not has_ended:
                # Each part is taken in time, and all of them take longer than that.
                mock_clock.jump(0.4)
                granted = 1000
                client.grant(number, granted)
                await client.flush()
        assert trio.current_time() > 0.5


async def test_an_http_1_client_that_does_not_read_its_stream_loses_it() -> None:
    body = json.dumps(ENDLESS).encode()
    settings: dict[str, Any] = {"http_overflow": "evict", "max_concurrent": 1, "reader_timeout_s": 0.2}
    async with open_house(**settings) as house, await trio.open_tcp_stream(*house.http) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        await client.send_all(post("/v1/chat/completions", body))
        await until(lambda: bool(house.engine.batches))

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
        b"\x00\x00\x05\x02\x00" + (2 * number + 1).to_bytes(4, "big") + b"\x00\x00\x00\x00\x10"
        for number in range(5000)
    ),
}


@pytest.mark.parametrize("name", FRAMES)
async def test_frames_that_ask_for_nothing_are_passed_over(name: str) -> None:
    async with open_house() as house, rude(house.http) as client:
        await client.stream.send_all(FRAMES[name](client))

        assert await client.status(await client.ask("/healthz")) == "200"


@pytest.mark.parametrize(
    "content",
    [
        frame(HEADERS, 0, 1, b"") + 70 * frame(CONTINUATION, 0, 1, bytes(1000)),
        b"\xff\xff\xff\x00\x00\x00\x00\x00\x01",
    ],
    ids=["a block of headers without an end", "a frame of 16 MiB"],
)
async def test_what_a_client_can_make_the_door_hold_has_bounds(content: bytes) -> None:
    async with open_house() as house:
        async with rude(house.http) as client:
            with trio.fail_after(60), suppress(trio.BrokenResourceError):
                await client.stream.send_all(content)
                while await client.stream.receive_some():
                    pass

        async with rude(house.http) as client:
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
    monkeypatch.setattr("api.foreign.hypercorn.most_connections", lambda: 3)
    async with open_house() as house, AsyncExitStack() as clients:
        idle = [await clients.enter_async_context(await trio.open_tcp_stream(*house.http)) for _ in range(3)]
        await settled()

        assert (await got(*house.http)).startswith(b"HTTP/1.1 200 ")

        with trio.fail_after(60):
            assert await idle[0].receive_some() == b""


async def test_a_head_that_does_not_come_to_its_end_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.foreign.hypercorn._HEAD_S", 0.1)
    async with open_house() as house, await trio.open_tcp_stream(*house.http) as client:
        await client.send_all(b"GET / HTTP/1.1\r\nHost: loc")

        with trio.fail_after(60):
            assert await client.receive_some() == b""


async def test_a_connection_without_a_call_is_closed_in_time() -> None:
    async with open_house(idle_connection_s=0.1) as house, await trio.open_tcp_stream(*house.http) as client:
        with trio.fail_after(60):
            assert await client.receive_some() == b""


async def asked(house: House, body: bytes) -> tuple[int, dict[str, object]]:
    """Status and error of a completion."""
    async with await trio.open_tcp_stream(*house.http) as stream:
        with suppress(trio.BrokenResourceError):
            await stream.send_all(post("/v1/chat/completions", body, "Connection: close"))
        said = b"".join([bytes(part) async for part in stream])
    head, _, rest = said.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(rest).get("error", {})


class Steps(trio.abc.Instrument):
    """The longest that one step of a task has kept the loop's thread busy, in seconds of its own time.

    The step that adds it counts from then on: what a test prepared before is not the server's.
    """

    def __init__(self) -> None:
        self.longest_s = 0.0
        trio.lowlevel.add_instrument(self)
        self._began = time.thread_time()

    def before_task_step(self, _: trio.lowlevel.Task) -> None:
        self._began = time.thread_time()

    def after_task_step(self, _: trio.lowlevel.Task) -> None:
        self.longest_s = max(self.longest_s, time.thread_time() - self._began)


def said(*contents: str, **more: object) -> bytes:
    messages = [{"role": "user", "content": content} for content in contents]
    return json.dumps(HELLO | {"messages": messages, "max_tokens": 1} | more).encode()


# Steps of the loop take a millisecond; these bodies kept it busy for seconds.
_LONG_STEP_S = 0.2


@pytest.mark.parametrize("contents", [["a" * (8 * 2**20 - 200)], [""] * 220_000], ids=["a long one", "many empty ones"])
async def test_messages_that_can_never_fit_are_refused_by_their_length_and_keep_nobody_waiting(
    contents: list[str],
) -> None:
    body = said(*contents)
    async with open_house() as house:
        # A body that keeps the loop busy does so each time; what else runs here may lengthen a step now and then.
        for _ in range(3):
            steps = Steps()
            status, error = await asked(house, body)
            trio.lowlevel.remove_instrument(steps)
            if steps.longest_s < _LONG_STEP_S:
                break

    assert (status, error["code"]) == (400, "context_length_exceeded")
    assert steps.longest_s < _LONG_STEP_S


@pytest.mark.parametrize("name_length", [0, 200_000])
async def test_a_prompt_that_is_refused_for_its_length_takes_no_room_of_conversations(name_length: int) -> None:
    async with open_house() as house:
        message = {"role": "user", "content": "a " * (house.runtime.shape.visible + 1), "name": "n" * name_length}
        status, error = await asked(house, json.dumps(HELLO | {"messages": [message]}).encode())

        assert (status, error["code"]) == (400, "context_length_exceeded")
        assert house.runtime.conversations.points.size_bytes == 0


async def test_tools_that_can_never_fit_are_refused_by_their_length() -> None:
    engine = LedgerEngine(window=60)
    tool = {"type": "function", "function": {"name": "f", "description": "d" * 200_000}}
    async with open_house(engine, text_with(templates.QWEN)) as house:
        status, error = await asked(house, json.dumps(HELLO | {"tools": [tool]}).encode())

    assert (status, error["code"]) == (400, "context_length_exceeded")
    assert "tools and instructions have" in str(error["message"])


async def test_a_model_that_is_not_here_is_named_in_few_words() -> None:
    async with open_house() as house:
        status, error = await asked(house, json.dumps(HELLO | {"model": "\x7f" * 2**20}).encode())

    assert status == 404
    assert len(str(error["message"])) < 500


@asynccontextmanager
async def uploading(house: House, length: int, *lines: str, lacks: int = 1) -> AsyncIterator[trio.SocketStream]:
    """A completion of which all bytes have come but those that it lacks."""
    async with await trio.open_tcp_stream(*house.http) as stream:
        with suppress(trio.BrokenResourceError):
            await stream.send_all(post("/v1/chat/completions", said("hi").ljust(length), *lines)[: -lacks or None])
        await settled()
        yield stream


async def status_of(stream: trio.SocketStream) -> int:
    with trio.fail_after(200):
        return int((await stream.receive_some()).split()[1])


async def test_bodies_on_their_way_share_a_room_and_give_it_back() -> None:
    async with open_house() as house:
        async with AsyncExitStack() as stack:
            for _ in range(8):
                await stack.enter_async_context(uploading(house, 15 * 2**19))
            async with uploading(house, 15 * 2**19) as one_more, uploading(house, 1000, lacks=0) as short:
                assert await status_of(one_more) == 429
                assert await status_of(short) == 200
        await settled()
        async with AsyncExitStack() as stack:
            streams = [await stack.enter_async_context(uploading(house, 15 * 2**19)) for _ in range(8)]
            await streams[-1].send_all(b" ")
            assert await status_of(streams[-1]) == 200


async def test_bodies_of_requests_that_are_refused_are_not_held() -> None:
    async with open_house(api_keys=("right",)) as house, AsyncExitStack() as stack:
        for _ in range(10):
            await stack.enter_async_context(uploading(house, 15 * 2**19))
        async with uploading(house, 15 * 2**19, "Authorization: Bearer right", lacks=0) as stream:
            assert await status_of(stream) == 200


async def got_with(house: House, method: str, path: str, *lines: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of a request with these lines of headers."""
    async with await trio.open_tcp_stream(*house.http) as stream:
        head = "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "Connection: close", "", ""])
        await stream.send_all(head.encode())
        answer = b"".join([bytes(part) async for part in stream])
    start, _, body = answer.partition(b"\r\n\r\n")
    first, *rest = start.decode().split("\r\n")
    return (
        int(first.split()[1]),
        {name.lower(): value for name, _, value in (line.partition(": ") for line in rest)},
        body,
    )


LOCAL = "Host: localhost:8000"
PAGE = "Origin: https://evil.example"
GUARDED = ["/", "/healthz", "/metrics", "/openapi.json", "/v1/models", "/v1/runtime"]


@pytest.mark.parametrize("path", GUARDED)
@pytest.mark.parametrize("line", ["Host: evil.example", "Host: localhost.evil.example:8000", "Host: 10.0.0.1", "Host:"])
async def test_without_keys_a_foreign_host_is_refused(path: str, line: str) -> None:
    async with open_house() as house:
        status, _, body = await got_with(house, "GET", path, line)

    assert (status, json.loads(body)["error"]["code"]) == (403, "host_not_allowed")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1:8000", "[::1]:8000", "127.0.0.1"])
async def test_names_of_this_machine_are_served_at_any_port(host: str) -> None:
    async with open_house() as house:
        assert (await got_with(house, "GET", "/v1/runtime", f"Host: {host}"))[0] == 200


async def test_a_name_that_the_settings_allow_is_served() -> None:
    async with open_house(allowed_hosts=("llm.example",)) as house:
        assert (await got_with(house, "GET", "/v1/runtime", "Host: llm.example"))[0] == 200
        assert (await got_with(house, "GET", "/v1/runtime", LOCAL))[0] == 403


async def test_with_keys_any_host_is_served() -> None:
    async with open_house(api_keys=("right",)) as house:
        lines = ("Host: evil.example", "Authorization: Bearer right")
        assert (await got_with(house, "GET", "/v1/runtime", *lines))[0] == 200


@pytest.mark.parametrize(
    "origin",
    [
        *("https://evil.example", "null", "http://localhost:9000", "http://localhost:8000.evil.example"),
        *("http://[", "http://[x]", "http://[::1", "//localhost:8000", ""),
    ],
)
async def test_without_keys_a_page_of_another_origin_is_refused(origin: str) -> None:
    async with open_house() as house:
        status, _, body = await got_with(house, "GET", "/v1/runtime", LOCAL, f"Origin: {origin}")

    assert (status, json.loads(body)["error"]["code"]) == (403, "origin_not_allowed")


async def test_the_servers_own_page_is_served() -> None:
    async with open_house() as house:
        assert (await got_with(house, "GET", "/v1/runtime", LOCAL, "Origin: http://localhost:8000"))[0] == 200


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "text/plain; a=application/json", ""]
)
async def test_without_keys_a_body_that_is_not_said_to_be_json_is_refused(kind: str) -> None:
    async with open_house() as house:
        lines = (LOCAL, *([f"Content-Type: {kind}"] if kind else []), "Content-Length: 0")
        status, _, body = await got_with(house, "POST", "/v1/chat/completions", *lines)

    assert (status, json.loads(body)["error"]["type"]) == (415, "invalid_request_error")


PREFLIGHT = (
    LOCAL,
    PAGE,
    "Access-Control-Request-Method: POST",
    "Access-Control-Request-Headers: authorization, x-more",
)


async def test_a_browser_is_told_that_pages_of_an_allowed_origin_may_call() -> None:
    async with open_house(allowed_origins=("https://evil.example",)) as house:
        status, headers, _ = await got_with(house, "OPTIONS", "/v1/chat/completions", *PREFLIGHT)
        answered = await got_with(house, "GET", "/v1/models", LOCAL, PAGE)
        missing = await got_with(house, "GET", "/nowhere", LOCAL, PAGE)

    assert status == 204
    assert headers["access-control-allow-origin"] == "https://evil.example"
    assert "POST" in headers["access-control-allow-methods"]
    assert headers["access-control-allow-headers"] == "authorization, x-more"
    assert [each[0] for each in (answered, missing)] == [200, 404]
    assert all(each[1]["access-control-allow-origin"] == "https://evil.example" for each in (answered, missing))
    assert all(each[1]["vary"] == "Origin" for each in (answered, missing))


async def test_a_browser_is_not_told_that_other_pages_may_call() -> None:
    async with open_house() as house:
        status, headers, _ = await got_with(house, "OPTIONS", "/v1/chat/completions", *PREFLIGHT)
    async with open_house(api_keys=("right",), allowed_origins=("https://good.example",)) as house:
        _, keyed, _ = await got_with(house, "OPTIONS", "/v1/chat/completions", *PREFLIGHT)

    assert status == 403
    assert "access-control-allow-origin" not in headers | keyed


@pytest.mark.parametrize("path", ["//v1//models", "/v1/models/", "/v1//chat/completions"])
async def test_no_path_is_redirected(path: str) -> None:
    async with open_house() as house:
        status, headers, _ = await got_with(house, "GET", path, LOCAL)

    assert status == 404
    assert "location" not in headers
