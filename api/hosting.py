"""Runs `app` under another program's server: settings come from the environment, start and stop from ASGI's lifespan."""

from __future__ import annotations

import logging
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import NoReturn

import trio

from actors.nursery import open_nursery
from api.bridge import Receive, Scope, Send, TrioApplication
from api.foreign.hypercorn import Patience, patch
from api.grpc import grpc_door
from api.leaving import leave_at_once
from api.logs import configure_logging
from api.server import LAST_WORDS_S, Server
from api.traces import configure_tracing
from runtime.errors import EngineFailed, StartError
from runtime.settings import Settings

_log = logging.getLogger("perennial.server")


class HostedApplication:
    """An ASGI application for trio. Its lifespan opens the server with the gRPC door; its requests go to the HTTP door."""

    def __init__(self, make_app: Callable[[Server], TrioApplication]) -> None:
        self._make_app = make_app
        self._door: TrioApplication | None = None
        self._stop: Callable[[float], None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        else:
            assert self._door is not None, "the server has to start the lifespan first"
            await self._door(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            settings = Settings.from_environment(os.environ)
            configure_logging(settings.log_level)
            configure_tracing()
            patch(
                Patience(settings.reader_timeout_s, on_stop=partial(self._on_stop, trio.lowlevel.current_trio_token()))
            )
            for address in _bound_addresses():
                settings.check_exposure(address, "bind")
            await self._serve(Server(settings), receive, send)
        except StartError as error:
            _give_up(error)
        if multiprocessing.parent_process() is not None:
            # This process is a Hypercorn worker and does nothing else, so it may be ended.
            leave_at_once()

    def _on_stop(self, token: trio.lowlevel.TrioToken, left_s: float) -> None:
        """Called in any thread when the host stops: it closes its connections in `left_s` seconds, and then ends the lifespan."""
        with suppress(trio.RunFinishedError):
            token.run_sync_soon(self._begin_stop, left_s)

    def _begin_stop(self, left_s: float) -> None:
        if self._stop is not None:
            self._stop(left_s)

    async def _serve(self, server: Server, receive: Receive, send: Send) -> None:
        self._door = self._make_app(server)
        async with open_nursery() as runtime_nursery:
            async with open_nursery() as door_nursery:
                self._stop = lambda left_s: door_nursery.start_soon(_end_calls, server, left_s)
                if server.settings.grpc_bind:
                    address = await door_nursery.start(grpc_door, server)
                    _log.info("serving grpc=%s", address)
                await send({"type": "lifespan.startup.complete"})
                runtime_nursery.start_soon(_run, server)
                await receive()
                await server.drain()
                door_nursery.cancel_scope.cancel()
            runtime_nursery.cancel_scope.cancel()


async def _end_calls(server: Server, left_s: float) -> None:
    server.begin_drain()
    await trio.sleep(max(0.0, left_s - LAST_WORDS_S))
    server.end_calls_of_host()


async def _run(server: Server) -> None:
    try:
        await server.run()
    except EngineFailed as error:
        # The host keeps running; its requests are answered that the server has stopped.
        _log.critical("%s", error)


def _bound_addresses() -> Iterator[str]:
    """`HOST:PORT` of the TCP sockets that this process holds and that are not connected: the host server's."""
    for name in os.listdir("/dev/fd"):
        with suppress(OSError), socket.socket(fileno=os.dup(int(name))) as held:
            is_tcp = held.type == socket.SOCK_STREAM and held.family in (socket.AF_INET, socket.AF_INET6)
            if is_tcp and not _is_connected(held) and (bound := held.getsockname())[1]:
                host = f"[{bound[0]}]" if held.family == socket.AF_INET6 else bound[0]
                yield f"{host}:{bound[1]}"


def _is_connected(held: socket.socket) -> bool:
    try:
        held.getpeername()
    except OSError:
        return False
    return True


def _give_up(error: StartError) -> NoReturn:
    """Ends the process with one line on stderr. An application has no way to make its host server end without a traceback."""
    print(f"perennial: {error}", file=sys.stderr, flush=True)
    os._exit(1)
