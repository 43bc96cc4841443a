"""What clients may make the HTTP door hold and wait for, at servers of every kind and over either version of HTTP."""

from __future__ import annotations

import json
import select
import socket
import struct
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import httpx
import pytest
import trio

from runtime.models import SEEDLING
from runtime.settings import split_address
from tests.api.h2_client import Rude, StreamEnded, StreamReset, rude
from tests.api.hostile import (
    CONTINUATION,
    GOAWAY,
    HEADERS,
    HTTP_CALLS,
    INITIAL_WINDOW_SIZE,
    PING,
    PREFACE,
    PRIORITY,
    RST_STREAM,
    SETTINGS,
    UNKNOWN,
    WINDOW_UPDATE,
    Call,
    Peer,
    floods,
    frame,
    peer_at,
    resets,
    send_anything,
    setting,
)
from tests.contract.loops import MOST_S
from tests.contract.servers import JSON, KINDS, ServerProcess, complaints, memory_of, started, until

pytestmark = pytest.mark.door

COMPLETIONS = "/v1/chat/completions"
TALK = {"model": SEEDLING, "messages": [{"role": "user", "content": "Hi!"}], "max_tokens": 3}
ENDLESS = TALK | {"max_tokens": 2**31 - 1, "ignore_eos": True, "stream": True}
MIB = 2**20
# What caches and the allocator may keep; a fault of these kinds keeps a multiple.
SLACK_BYTES = 40 * MIB
versions = pytest.mark.parametrize("version", ["1.1", "2"])


def address_of(server: ServerProcess) -> str:
    return server.http.removeprefix("http://")


def client_of(server: ServerProcess, version: str = "1.1") -> httpx.Client:
    """A client that speaks this version from its first byte on."""
    return httpx.Client(base_url=server.http, http1=version == "1.1", http2=version == "2", timeout=MOST_S)


def serves(server: ServerProcess) -> bool:
    """Whether a client that means well is served over either version."""
    with client_of(server) as first, client_of(server, "2") as second:
        health = [client.get("/healthz").status_code for client in (first, second)]
        # Where another's completion runs still, this one is told so.
        until(lambda: second.post(COMPLETIONS, json=TALK).status_code == 200)
    return health == [200, 200]


# Who may call.


@versions
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "localhost.evil.example:8000"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "localhost:1"}, 200),
    ],
    ids=str,
)
def test_a_page_of_another_site_is_refused(
    server: ServerProcess, version: str, headers: dict[str, str], status: int
) -> None:
    with client_of(server, version) as client:
        answers = [client.get(path, headers=headers).status_code for path in ("/v1/runtime", "/v1/models", "/")]

    assert answers == [status] * 3


@versions
@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_body_that_is_not_said_to_be_json_is_refused(server: ServerProcess, version: str, kind: str) -> None:
    headers = {"Content-Type": kind} if kind else {}
    with client_of(server, version) as client:
        assert client.post(COMPLETIONS, content=json.dumps(TALK), headers=headers).status_code == 415


@pytest.mark.parametrize(
    "named", [{}, {":authority": "evil.example"}, {":authority": "localhost", "host": "evil.example"}]
)
async def test_a_host_that_is_missing_or_forged_over_http_2_is_refused(
    server: ServerProcess, named: dict[str, str]
) -> None:
    async with peer_at(address_of(server)) as peer:
        number = await peer.open("/v1/runtime", ends=True, **{":method": "GET"}, **named)
        answer = await peer.until(lambda got: got.stream_id == number or got.type == GOAWAY)

        assert answer.type in (RST_STREAM, GOAWAY) or answer.fields[":status"] in ("400", "403")


@versions
@pytest.mark.parametrize("path", ["//v1//models", "/v1/models/", "//evil.example/v1/models"])
def test_no_path_is_redirected(server: ServerProcess, version: str, path: str) -> None:
    with client_of(server, version) as client:
        answer = client.get(server.http + path)

    assert answer.status_code == 404
    assert "location" not in answer.headers


# What is read.


@versions
@pytest.mark.parametrize("contents", [["a" * (8 * MIB - 300)], [""] * 220_000], ids=["a long one", "many empty ones"])
def test_messages_that_can_never_fit_are_refused(server: ServerProcess, version: str, contents: list[str]) -> None:
    body = TALK | {"messages": [{"role": "user", "content": content} for content in contents]}
    with client_of(server, version) as client:
        answer = client.post(COMPLETIONS, json=body)

    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"


@versions
def test_a_pattern_that_takes_too_long_is_refused(server: ServerProcess, version: str) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "string", "pattern": "^((a{1000}){1000}){1000}$"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    bound = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}
    with client_of(server, version) as client:
        answer = client.post(COMPLETIONS, json=TALK | {"max_tokens": 200, "response_format": bound})

    assert answer.status_code == 422
    assert "too complex" in answer.json()["error"]["message"]


@versions
def test_a_body_over_8_mib_is_refused_however_it_comes(server: ServerProcess, version: str) -> None:
    headers = {"Content-Type": "application/json"}
    with client_of(server, version) as client:
        whole = client.post(COMPLETIONS, content=b" " * (8 * MIB + 1), headers=headers)
        parts = client.post(COMPLETIONS, content=(b" " * MIB for _ in range(9)), headers=headers)

    assert (whole.status_code, parts.status_code) == (413, 413)


def test_bodies_on_their_way_share_a_room(server: ServerProcess) -> None:
    """Thirty clients send seven MiB each, and not the last byte."""
    head = f"POST {COMPLETIONS} {JSON}{7 * MIB}\r\n\r\n".encode()
    before = memory_of(server)
    with ExitStack() as clients:
        uploads = []
        for _ in range(30):
            uploads.append(clients.enter_context(socket.create_connection(split_address(address_of(server)))))
            # Who is refused is so while it sends.
            with suppress(OSError):
                uploads[-1].sendall(head + b" " * (7 * MIB - 1))
        refused: set[socket.socket] = set()

        def most_are_refused() -> bool:
            told, _, _ = select.select(uploads, [], [], 0)
            for upload in set(told) - refused:
                with suppress(OSError):
                    assert upload.recv(4096).startswith(b"HTTP/1.1 429 ")
                refused.add(upload)
            return len(refused) >= 20

        until(most_are_refused)
        # Each connection may hold a MiB besides, that the door has not come to yet.
        assert memory_of(server) - before < (64 + len(uploads)) * MIB + SLACK_BYTES
    assert serves(server)


# What is waited for.


async def test_a_stream_over_http_2_that_nobody_reads_is_ended(besieged: ServerProcess) -> None:
    async with rude(split_address(address_of(besieged)), 0) as client:
        with trio.fail_after(MOST_S):
            await client.until(await client.ask(COMPLETIONS, ENDLESS), StreamReset)
            await client.until(await client.ask("/openapi.json"), StreamReset)
            assert await client.status(await client.ask("/healthz")) == "200"

    assert serves(besieged)


def test_a_stream_over_http_1_that_nobody_reads_is_ended(besieged: ServerProcess) -> None:
    # Logprobs make of each token some kilobytes, so that the socket is full soon.
    body = json.dumps(ENDLESS | {"logprobs": True, "top_logprobs": 20}).encode()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(split_address(address_of(besieged)))
        client.sendall(f"POST {COMPLETIONS} {JSON}{len(body)}\r\n\r\n".encode() + body)

        # There is one permit.
        assert serves(besieged)


async def read_a_little(client: Rude, number: int) -> list[Any]:
    client.grant(number, 2000)
    await client.flush()
    return list(await client.next_events())


async def test_a_client_that_reads_slowly_is_served_to_the_end(besieged: ServerProcess) -> None:
    async with rude(split_address(address_of(besieged)), 1000) as client:
        number = await client.ask("/")
        with trio.fail_after(MOST_S):
            while not any(isinstance(event, StreamEnded) for event in await read_a_little(client, number)):
                pass


async def says(stream: trio.SocketStream, said: bytes, *, is_answered: bool = False) -> None:
    """Sends it, and returns once the server has closed the connection."""
    with trio.fail_after(MOST_S), suppress(trio.BrokenResourceError):
        await stream.send_all(said)
        answer = b"".join([bytes(part) async for part in stream])
        assert (b"200" in answer) == is_answered


HEALTH = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    ("said", "is_answered"),
    [
        (b"", False),
        (HEALTH, True),
        (PREFACE, False),
        (PREFACE + frame(SETTINGS), False),
        (PREFACE + frame(SETTINGS) + frame(HEADERS, 0, 1, b"\x82\x86"), False),
        (PREFACE + frame(SETTINGS)[:5], False),
    ],
    ids=["nothing", "a call", "a preface", "settings", "headers without an end", "half a frame"],
)
async def test_a_connection_on_which_nothing_more_is_asked_is_closed(
    besieged: ServerProcess, said: bytes, is_answered: bool
) -> None:
    async with await trio.open_tcp_stream(*split_address(address_of(besieged))) as stream:
        await says(stream, said, is_answered=is_answered)


@pytest.mark.parametrize("is_reset", [False, True])
async def test_a_connection_of_http_2_whose_streams_have_ended_is_closed(
    besieged: ServerProcess, is_reset: bool
) -> None:
    async with rude(split_address(address_of(besieged)), 1000) as client:
        if is_reset:
            number = await client.ask("/openapi.json")
            await client.status(number)
            await client.reset(number)
        else:
            await client.until(await client.ask("/healthz"), StreamEnded)

        with trio.fail_after(MOST_S), suppress(EOFError):
            while True:
                await client.next_events()


@pytest.mark.parametrize("kind", KINDS[1:])
async def test_a_request_whose_rest_does_not_come_is_not_waited_for(kind: str) -> None:
    with started(kind, application="tests.contract.hasty:app") as server:
        address = split_address(address_of(server))
        with socket.create_connection(address, timeout=MOST_S) as head:
            head.sendall(b"GET /healthz HTTP/1.1\r\nHost: loc")
            assert head.recv(4096) == b""
        with ExitStack() as stack:
            bodies = [stack.enter_context(socket.create_connection(address, timeout=MOST_S)) for _ in range(9)]
            for each in bodies:
                each.sendall(f"POST {COMPLETIONS} {JSON}{7 * MIB}\r\n\r\n{{".encode())
            for each in bodies:
                answer = b"".join(iter(partial(each.recv, 4096), b""))
                assert answer.startswith(b"HTTP/1.1 408 ")
        async with rude(address) as client:
            assert await client.status(await client.begin(COMPLETIONS, 1000)) == "408"
        assert serves(server)
        assert server.stop() == 0
    assert complaints("".join(server.said)) == []


# What is held.


def zeros(count: int, size: int) -> bytes:
    return frame(HEADERS, 0, 1) + frame(CONTINUATION, 0, 1, bytes(size)) * count


@pytest.mark.parametrize(
    "content",
    [zeros(70, 1000), zeros(70, 0), b"\xff\xff\xff\x00\x00\x00\x00\x00\x01"],
    ids=["headers without an end", "empty headers without an end", "a frame of 16 MiB"],
)
async def test_what_is_too_long_ends_its_connection(besieged: ServerProcess, content: bytes) -> None:
    async with peer_at(address_of(besieged)) as peer:
        with suppress(trio.BrokenResourceError):
            await peer.send(content)

        await peer.farewell()
    assert serves(besieged)


PASSED_OVER = {
    **{f"unknown type {kind:#x}": frame(kind, 0xFF, 0, b"\x80" * 100) for kind in UNKNOWN},
    "priority of 5,000 streams": b"".join(
        frame(PRIORITY, 0, 2 * number + 1, b"\x00\x00\x00\x00\x10") for number in range(5000)
    ),
    "settings that are unknown": frame(SETTINGS, payload=b"".join(setting(n, 1) for n in range(100, 1100))),
}


@pytest.mark.parametrize("content", PASSED_OVER.values(), ids=PASSED_OVER)
async def test_frames_that_ask_for_nothing_are_passed_over(besieged: ServerProcess, content: bytes) -> None:
    async with peer_at(address_of(besieged)) as peer:
        await peer.send(content)

        assert await status(peer, "/healthz") == "200"


async def status(peer: Peer, path: str) -> str:
    number = await peer.open(path, ends=True, **{":method": "GET", ":authority": "localhost"})
    answer = await peer.until(lambda got: got.type == HEADERS and got.stream_id == number)
    found: str = answer.fields[":status"]
    return found


async def test_a_path_that_is_no_ascii_ends_its_stream_and_not_its_connection(besieged: ServerProcess) -> None:
    async with peer_at(address_of(besieged)) as peer:
        path: Any = b"/h\xc3\xa9"
        await peer.is_reset(await peer.open(path, ends=True, **{":method": "GET", ":authority": "localhost"}))

        assert await status(peer, "/healthz") == "200"


async def test_a_body_that_was_refused_already_does_not_end_its_connection(besieged: ServerProcess) -> None:
    async with rude(split_address(address_of(besieged)), MIB) as client:
        # A connection without an open stream is closed, however long its client takes to send the rest of a body.
        await client.begin(COMPLETIONS, 1000)
        number = await client.begin(COMPLETIONS, 9 * MIB)
        with trio.move_on_after(MOST_S):
            await client.send_while_it_is_taken(number, 9 * MIB)

        assert await client.status(await client.ask("/healthz")) == "200"


async def test_streams_that_are_opened_and_reset_are_not_kept(besieged: ServerProcess) -> None:
    call = Call("/healthz", headers={":method": "GET", ":authority": "localhost"})

    async def opened_and_reset(count: int) -> None:
        for _ in range(count):
            async with peer_at(address_of(besieged)) as peer:
                # Hypercorn says goodbye after a thousand.
                for some in resets(peer, 900, call):
                    await peer.send(some)
                await peer.is_answered()
                await floods(peer, resets(peer, 2000, call))

    await opened_and_reset(1)
    before = memory_of(besieged)

    await opened_and_reset(6)

    assert memory_of(besieged) < before + SLACK_BYTES
    assert serves(besieged)


FLOODS = {
    "pings": frame(PING, payload=bytes(8)),
    "settings": frame(SETTINGS, payload=setting(INITIAL_WINDOW_SIZE, 0)),
    "windows": frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 1)),
}


@pytest.mark.parametrize("name", FLOODS)
async def test_a_flood_whose_answers_are_not_read_is_not_held(besieged: ServerProcess, name: str) -> None:
    before = memory_of(besieged)
    async with await trio.open_tcp_stream(*split_address(address_of(besieged))) as stream:
        with trio.move_on_after(5), suppress(trio.BrokenResourceError):
            await Peer(stream).send(*[FLOODS[name] * 1000] * 1000)

    assert memory_of(besieged) < before + SLACK_BYTES
    assert serves(besieged)


async def test_random_frames_end_nothing_but_their_connections(besieged: ServerProcess) -> None:
    await send_anything(address_of(besieged), HTTP_CALLS, 200, 20)

    assert serves(besieged)
