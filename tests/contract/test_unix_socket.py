"""`perennial serve --bind unix:PATH`: the HTTP door at a socket in the file system."""

from __future__ import annotations

import gc
import os
import socket
import stat
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from api.http import http_door
from api.server import Server
from runtime import Settings
from runtime.errors import InvalidSetting
from tests.contract.loops import MOST_S
from tests.contract.servers import started
from tests.contract.test_http_bad_input import COMPLETIONS, HELLO, events_in


@pytest.mark.door
def test_a_client_is_answered_at_a_socket_in_the_file_system(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with started("perennial", "--bind", f"unix:{path}") as server:
        with httpx.Client(
            transport=httpx.HTTPTransport(uds=str(path)), base_url="http://localhost", timeout=MOST_S
        ) as client:
            answer = client.post(COMPLETIONS, json=HELLO).json()
            *_, done = events_in(client.post(COMPLETIONS, json=HELLO | {"stream": True}))

            assert answer["usage"]["completion_tokens"] == 4
            assert done == "[DONE]"
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
        assert server.stop() == 0
    assert not path.exists()


async def listens(path: Path, nursery: trio.Nursery, **settings: Any) -> None:
    await nursery.start(http_door, Server(Settings(**settings)), f"unix:{path}")


async def test_another_servers_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    async with trio.open_nursery() as nursery:
        await listens(path, nursery)
        with pytest.raises(InvalidSetting, match="already"):
            await listens(path, nursery)

        async with await trio.open_unix_socket(path):
            nursery.cancel_scope.cancel()


async def test_a_socket_that_nobody_listens_on_any_more_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    async with trio.open_nursery() as nursery:
        await listens(path, nursery)

        async with await trio.open_unix_socket(path):
            nursery.cancel_scope.cancel()


async def test_a_file_that_is_no_socket_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_text("mine")
    async with trio.open_nursery() as nursery:
        with pytest.raises(InvalidSetting, match="no socket"):
            await listens(path, nursery)

    assert path.read_text() == "mine"


@pytest.mark.parametrize("name", ["nowhere/socket", "a" * 200, "a" * 300], ids=len)
async def test_a_path_that_cannot_be_listened_on_is_refused_in_one_line_and_no_socket_is_left(
    tmp_path: Path, name: str
) -> None:
    async with trio.open_nursery() as nursery:
        with pytest.raises(InvalidSetting, match="cannot be listened on") as refused:
            await listens(tmp_path / name, nursery)

    assert "\n" not in str(refused.value)
    # Its traceback would hold the socket, of which the collector complains.
    del refused
    gc.collect()


async def test_with_a_key_the_rights_are_those_that_files_have_here(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    before = os.umask(0o007)
    try:
        async with trio.open_nursery() as nursery:
            await listens(path, nursery, api_keys=("a",))
            assert stat.S_IMODE(path.stat().st_mode) == 0o770
            nursery.cancel_scope.cancel()
    finally:
        os.umask(before)


@pytest.mark.parametrize("bind", ["unix:", "unix", "/tmp/socket"])
def test_what_names_no_path_is_no_address(bind: str) -> None:
    with pytest.raises(InvalidSetting, match="HOST:PORT"):
        Settings().check_exposure(bind, "bind")
