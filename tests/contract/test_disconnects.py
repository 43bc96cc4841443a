"""A client that leaves frees its permits and slabs, wherever its completion stands and whoever runs its socket's loop."""

from __future__ import annotations

import http.client
import json
import re
import socket
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.contract.loops import MOST_S
from tests.contract.servers import JSON, KINDS, ServerProcess, started, until

pytestmark = pytest.mark.door

PERMITS = 3
# Neither comes to its end within a test: a prompt that takes a minute to read, and an answer that only the time limit ends.
LONG = "Hello! " * 50_000
ENDLESS = {"max_tokens": 2**31 - 1, "ignore_eos": True}


@pytest.fixture(scope="module", params=KINDS)
def endless(request: pytest.FixtureRequest) -> Iterator[ServerProcess]:
    """A server of each kind, with a few permits and a line for them, that forgets rather than refuses."""
    settings: dict[str, Any] = {"http_overflow": "evict", "max_concurrent": PERMITS, "admission_policy": "queue"}
    with started(request.param, window=252, **settings) as server:
        yield server


def asked(server: ServerProcess, content: str = "Hello!", **more: Any) -> http.client.HTTPConnection:
    """A connection on which a completion was asked for, an endless one unless it is told otherwise."""
    body = {"model": "seedling", "messages": [{"role": "user", "content": content}], **ENDLESS, **more}
    connection = http.client.HTTPConnection(urlsplit(server.http).netloc, timeout=MOST_S)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    return connection


def metric(server: ServerProcess, name: str) -> float:
    with urllib.request.urlopen(f"{server.http}/metrics", timeout=MOST_S) as reply:
        found = re.search(rf"^perennial_{name} (\S+)$", reply.read().decode(), re.M)
    assert found
    return float(found[1])


def leaves_in_a_prefill(server: ServerProcess, **more: Any) -> None:
    forwards = metric(server, "forward_rows_count")
    with closing(asked(server, LONG, **more)):
        until(lambda: metric(server, "forward_rows_count") > forwards)


def leaves_in_a_decode(server: ServerProcess, **more: Any) -> None:
    tokens = metric(server, "generated_tokens_total")
    with closing(asked(server, **more)):
        until(lambda: metric(server, "generated_tokens_total") > tokens)


def leaves_between_chunks(server: ServerProcess, **more: Any) -> None:
    with closing(asked(server, **more)) as connection, connection.getresponse() as response:
        while not json.loads(response.readline().removeprefix(b"data: "))["choices"][0]["delta"]["content"]:
            response.readline()


STAGES = [leaves_in_a_prefill, leaves_in_a_decode, leaves_between_chunks]


@pytest.mark.parametrize("n", [1, PERMITS])
@pytest.mark.parametrize(
    ("leaves", "stream"), [(stage, stream) for stage in STAGES[:2] for stream in (False, True)] + [(STAGES[2], True)]
)
def test_when_a_client_leaves_its_work_ends_and_all_it_held_is_free(
    endless: ServerProcess, leaves: Callable[..., None], stream: bool, n: int
) -> None:
    leaves(endless, stream=stream, n=n)

    until(lambda: metric(endless, "slab_in_use") == 0)
    rows = metric(endless, "forward_rows_sum")
    assert metric(endless, "session_active") == 0
    assert metric(endless, "forward_rows_sum") == rows
    assert_every_permit_is_free(endless)


def test_when_a_client_leaves_with_a_second_request_on_its_connection_its_work_ends_at_once(
    endless: ServerProcess,
) -> None:
    body = json.dumps({"model": "seedling", "messages": [{"role": "user", "content": "Hello!"}], **ENDLESS}).encode()
    request = f"POST /v1/chat/completions {JSON}{len(body)}\r\n\r\n".encode() + body
    tokens = metric(endless, "generated_tokens_total")
    address = urlsplit(endless.http)
    with socket.create_connection((address.hostname, address.port), timeout=MOST_S) as connection:
        connection.sendall(request * 2)
        until(lambda: metric(endless, "generated_tokens_total") > tokens)

    until(lambda: metric(endless, "slab_in_use") == 0)
    assert_every_permit_is_free(endless)


# `n` permits for which it waits, while others hold `taken`: with some it has taken some before it leaves.
@pytest.mark.parametrize(("n", "taken"), [(1, PERMITS), (2, PERMITS), (2, PERMITS - 1), (PERMITS, 1)])
@pytest.mark.parametrize("stream", [False, True])
def test_when_a_client_leaves_the_line_it_has_cost_no_forward_and_kept_nothing(
    endless: ServerProcess, n: int, taken: int, stream: bool
) -> None:
    with closing(asked(endless, n=taken)):
        until(lambda: metric(endless, "slab_in_use") == taken)
        with closing(asked(endless, n=n, stream=stream)):
            until(lambda: metric(endless, "admission_pending") == 1)

        until(lambda: metric(endless, "admission_pending") == 0)
        assert metric(endless, "slab_in_use") == taken
        if taken < PERMITS:
            with closing(asked(endless, n=PERMITS - taken, max_tokens=1)) as next_one:
                assert next_one.getresponse().status == 200

    until(lambda: metric(endless, "slab_in_use") == 0)
    assert_every_permit_is_free(endless)


def assert_every_permit_is_free(server: ServerProcess) -> None:
    assert metric(server, "admission_pending") == 0
    with closing(asked(server, n=PERMITS, max_tokens=1)) as connection:
        assert connection.getresponse().status == 200
    assert metric(server, "admission_pending") == 0
