"""A client that leaves frees its permit and slab, whoever runs the loop that its socket is on."""

from __future__ import annotations

import http.client
import json
import re
import time
import urllib.request
from collections.abc import Callable
from urllib.parse import urlsplit

import pytest

from tests.contract.servers import ServerProcess

pytestmark = pytest.mark.door

_LONGEST_WAIT_S = 20
LONG = "Hello! " * 250


def asked(server: ServerProcess, content: str, **more: object) -> http.client.HTTPConnection:
    """A connection on which a completion was asked for, to its longest."""
    body = {"model": "seedling", "messages": [{"role": "user", "content": content}], "ignore_eos": True, **more}
    connection = http.client.HTTPConnection(urlsplit(server.http).netloc, timeout=_LONGEST_WAIT_S)
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    return connection


def metric(server: ServerProcess, name: str) -> float:
    with urllib.request.urlopen(f"{server.http}/metrics", timeout=_LONGEST_WAIT_S) as reply:
        found = re.search(rf"^perennial_{name} (\S+)$", reply.read().decode(), re.M)
    assert found
    return float(found[1])


def wait_until(condition: Callable[[], bool]) -> None:
    """Another process has no event to wait for: this asks it again until `condition` holds."""
    deadline = time.monotonic() + _LONGEST_WAIT_S
    while not condition():
        assert time.monotonic() < deadline


def leaves_in_a_prefill(server: ServerProcess) -> None:
    forwards = metric(server, "forward_rows_count")
    connection = asked(server, LONG)
    wait_until(lambda: metric(server, "forward_rows_count") > forwards)
    connection.close()


def leaves_in_a_decode(server: ServerProcess) -> None:
    tokens = metric(server, "generated_tokens_total")
    connection = asked(server, "Hello!", max_tokens=100_000, temperature=0)
    wait_until(lambda: metric(server, "generated_tokens_total") > tokens)
    connection.close()


def leaves_between_chunks(server: ServerProcess) -> None:
    connection = asked(server, "Hello!", max_tokens=100_000, temperature=0, stream=True)
    response = connection.getresponse()
    response.readline()
    response.close()
    connection.close()


@pytest.mark.parametrize("leaves", [leaves_in_a_prefill, leaves_in_a_decode, leaves_between_chunks])
def test_when_a_client_leaves_its_work_ends_and_all_it_held_is_free(
    server: ServerProcess, leaves: Callable[[ServerProcess], None]
) -> None:
    leaves(server)

    wait_until(lambda: metric(server, "slab_in_use") == 0)
    rows = metric(server, "forward_rows_sum")
    assert metric(server, "session_active") == 0
    assert metric(server, "forward_rows_sum") == rows
