"""The runtime with both doors: start and stop order read as indentation."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from actors.nursery import open_nursery
from api.grpc import grpc_door
from api.http import http_door
from api.server import Server
from runtime.settings import DEFAULT_HTTP_BIND, Settings

_log = logging.getLogger("perennial.server")


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where a server listens: `http://HOST:PORT` and `HOST:PORT`; None for a door that is shut."""

    http: str | None
    grpc: str | None


async def serve(
    settings: Settings,
    *,
    http_bind: str | None = DEFAULT_HTTP_BIND,
    shutdown_trigger: Callable[[], Awaitable[object]] = trio.sleep_forever,
    hurry_trigger: Callable[[], Awaitable[object]] = trio.sleep_forever,
    task_status: trio.TaskStatus[Addresses] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serves sessions through gRPC and HTTP until cancelled, or until `shutdown_trigger` returns and calls have drained.

    From then on it waits for `hurry_trigger`, which cuts the drain short.

    Started in a nursery, it returns its Addresses once the model is loaded; the doors open earlier and answer that it is
    loading. Raises StartError or EngineFailed.
    """
    if http_bind:
        settings.check_exposure(http_bind, "bind")
    server = Server(settings)
    async with open_nursery() as runtime_nursery:
        async with open_nursery() as door_nursery:
            grpc = await door_nursery.start(grpc_door, server) if settings.grpc_bind else None
            http = await door_nursery.start(http_door, server, http_bind) if http_bind else None
            await runtime_nursery.start(server.run)
            addresses = Addresses(http, grpc)
            _log.info("serving http=%s grpc=%s", addresses.http or "none", addresses.grpc or "none")
            task_status.started(addresses)
            await shutdown_trigger()
            async with open_nursery() as draining:
                draining.start_soon(_hurry, server, hurry_trigger)
                await server.drain()
                draining.cancel_scope.cancel()
            door_nursery.cancel_scope.cancel()
        runtime_nursery.cancel_scope.cancel()


async def _hurry(server: Server, trigger: Callable[[], Awaitable[object]]) -> None:
    await trigger()
    server.end_calls()
    server.stop_waiting()
