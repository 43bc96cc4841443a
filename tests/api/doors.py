"""Both doors of this process on free ports, over an engine whose forwards the test can hold."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import trio

from actors import Runtime
from api.grpc import grpc_door
from api.http import http_door
from api.server import Server
from runtime import Settings
from runtime.metrics import Metrics
from runtime.settings import split_address
from runtime.text import Text
from tests.actors.engines import LedgerEngine, open_lab

# The rest of a POST's head, up to its body's length.
JSON = "HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
HELLO = {"model": "seedling", "messages": [{"role": "user", "content": "hello"}]}


@dataclass(frozen=True)
class House:
    """A server that serves, its engine and its addresses."""

    server: Server
    engine: LedgerEngine
    runtime: Runtime
    http: tuple[str, int]
    grpc: str


@asynccontextmanager
async def open_house(
    engine: LedgerEngine | None = None, text: Text | None = None, **settings: Any
) -> AsyncIterator[House]:
    """A server with both doors open and its engine loaded."""
    engine = engine or LedgerEngine()
    chosen = Settings(grpc_bind="127.0.0.1:0", **settings)

    @asynccontextmanager
    async def opening(_: Settings, metrics: Metrics) -> AsyncIterator[Runtime]:
        async with open_lab(engine, metrics, text=text, **settings) as runtime:
            yield runtime

    server = Server(chosen, opening, is_warmed=False)
    async with trio.open_nursery() as nursery:
        http = (await nursery.start(http_door, server, "127.0.0.1:0")).removeprefix("http://")
        grpc = await nursery.start(grpc_door, server)
        runtime = await nursery.start(server.run)
        yield House(server, engine, runtime, split_address(http), grpc)
        engine.open()
        nursery.cancel_scope.cancel()
