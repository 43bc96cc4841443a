"""Servers of every kind that may open few files: they go on, take connections again when there is room, and say so once."""

from __future__ import annotations

import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import httpx
import psutil
import pytest

from runtime.models import SEEDLING
from runtime.settings import split_address
from tests.api.hostile import serves_sessions
from tests.contract.loops import MOST_S
from tests.contract.servers import (
    JSON,
    KINDS,
    LONGEST_LINE,
    PATIENT,
    ServerProcess,
    complaints,
    processes_of,
    readers_of,
    started,
    until,
)

pytestmark = pytest.mark.door

each_kind = pytest.mark.parametrize("kind", KINDS)
COMPLETIONS = "/v1/chat/completions"
FEW = 160
NO_ROOM = {"HTTP": "no room for another HTTP", "gRPC": "no room for another gRPC"}


def connected(address: str) -> socket.socket:
    return socket.create_connection(split_address(address.removeprefix("http://")), timeout=MOST_S)


def serves_http(server: ServerProcess) -> bool:
    talk = {"model": SEEDLING, "messages": [{"role": "user", "content": "Hi!"}], "max_tokens": 3}
    return httpx.post(server.http + COMPLETIONS, json=talk, timeout=MOST_S).status_code == 200


@each_kind
async def test_more_idle_connections_than_files_keep_nobody_out(kind: str) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(started(kind, application=PATIENT, descriptors=FEW))
        clients = [stack.enter_context(connected(each)) for each in [server.http, server.grpc] * 2 * FEW]

        assert serves_http(server)
        assert await serves_sessions(server.grpc)
        for client in clients:
            client.close()
        assert server.stop() == 0
    said = "".join(server.said)
    assert all(said.count(words) <= 1 for words in NO_ROOM.values())
    assert all("no room" in line for line in complaints(said))
    assert max(map(len, server.said)) <= LONGEST_LINE


@contextmanager
def no_descriptors_left(server: ServerProcess) -> Iterator[None]:
    """No process of the server can open a file or accept a connection in the block."""
    before = {each.pid: resource.prlimit(each.pid, resource.RLIMIT_NOFILE) for each in processes_of(server)}
    try:
        for pid, (_, hard) in before.items():
            # Below what is open: that stays so.
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, hard))
        yield
    finally:
        for pid, limits in before.items():
            with suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits of another process are Linux's")
@each_kind
async def test_without_a_file_to_open_a_server_waits_for_room_and_says_so_once(kind: str) -> None:
    body = b'{"model": "seedling"}'
    head = f"POST {COMPLETIONS} {JSON}{len(body)}\r\nConnection: close\r\n\r\n".encode()
    with started(kind, application=PATIENT) as server, ExitStack() as stack:
        calls = [stack.enter_context(connected(server.http)) for _ in range(3)]
        for call in calls:
            call.sendall(head + body[:-1])
        # Another connection's answer comes after the server has taken these bytes.
        assert serves_http(server)
        with no_descriptors_left(server):
            for address in [server.http, server.grpc] * 20:
                stack.enter_context(connected(address))
            until(lambda: all(words in "".join(server.said) for words in NO_ROOM.values()))

            # Two places for processes that read, whose end is noticed when they are used, and one call that needs another.
            for each in readers_of(server):
                with suppress(psutil.NoSuchProcess):
                    each.kill()
            for call in calls:
                call.sendall(body[-1:])
                status = call.recv(4096).split()[1]
            assert status == b"503"
        assert serves_http(server)
        assert await serves_sessions(server.grpc)
        assert server.stop() == 0
    said = "".join(server.said)
    assert [said.count(words) for words in NO_ROOM.values()] == [1, 1]
    # One line for each door, each call, and the process that was to be ready before the first call.
    assert len(complaints(said)) <= 2 + len(calls) + 1
    assert max(map(len, server.said)) <= LONGEST_LINE
