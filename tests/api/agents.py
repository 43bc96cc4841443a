"""Clients of the agents' doors, over real sockets: HTTP, and a WebSocket."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import trio
from websockets.client import ClientProtocol
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory
from websockets.frames import Frame, Opcode
from websockets.uri import parse_uri

from tests.api.recordings import Heard


class Lane:
    """A WebSocket on `/v1/responses`, which compresses as codex does."""

    def __init__(self, stream: trio.SocketStream, protocol: ClientProtocol) -> None:
        self._stream = stream
        self._protocol = protocol
        self._ready: list[dict[str, Any]] = []
        self._part = b""

    async def send(self, frame: dict[str, Any]) -> None:
        self._protocol.send_text(json.dumps(frame).encode())
        await self._flush()

    async def receive(self) -> dict[str, Any]:
        """The next event. Raises EndOfChannel where the server has closed."""
        while not self._ready:
            await self._read()
        return self._ready.pop(0)

    async def leave(self) -> None:
        """Closes the connection, and says nothing."""
        await self._stream.aclose()

    async def open(self) -> None:
        self._protocol.send_request(self._protocol.connect())
        await self._flush()
        while self._protocol.handshake_exc is None and self._protocol.state.name == "CONNECTING":
            await self._read()
        if self._protocol.handshake_exc is not None:
            raise self._protocol.handshake_exc

    async def _read(self) -> None:
        data = await self._stream.receive_some()
        if not data:
            raise trio.EndOfChannel
        self._protocol.receive_data(data)
        await self._flush()
        for event in self._protocol.events_received():
            if isinstance(event, Frame) and event.opcode in (Opcode.TEXT, Opcode.CONT):
                self._part += event.data
                if event.fin:
                    self._ready.append(json.loads(self._part))
                    self._part = b""

    async def _flush(self) -> None:
        for data in self._protocol.data_to_send():
            await self._stream.send_all(data)


@asynccontextmanager
async def open_lane(address: tuple[str, int]) -> AsyncIterator[Lane]:
    """A WebSocket to a server there; leaving the block is the client's disconnect."""
    uri = parse_uri(f"ws://{address[0]}:{address[1]}/v1/responses")
    protocol = ClientProtocol(uri, extensions=[ClientPerMessageDeflateFactory()], max_size=None)
    async with await trio.open_tcp_stream(*address) as stream:
        lane = Lane(stream, protocol)
        await lane.open()
        yield lane


@asynccontextmanager
async def open_client(address: tuple[str, int]) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=f"http://{address[0]}:{address[1]}", timeout=60) as client:
        yield client


@asynccontextmanager
async def listening(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> AsyncIterator[AsyncIterator[Any]]:
    """The events of an answer, or the one body that it is; leaving the block early is the client's disconnect."""
    async with client.stream("POST", path, json=body) as response:
        yield _events(response)


async def _events(response: httpx.Response) -> AsyncIterator[Any]:
    if not response.headers["Content-Type"].startswith("text/event-stream"):
        yield json.loads(await response.aread())
        return
    async for line in response.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


async def heard(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> Heard:
    """The whole answer."""
    answer = Heard()
    async with listening(client, path, body) as events:
        async for event in events:
            answer.hear(event)
    return answer


async def heard_on(lane: Lane, frame: dict[str, Any]) -> Heard:
    """The whole answer to a frame."""
    answer = Heard()
    await lane.send(frame)
    while not answer.is_over:
        answer.hear(await lane.receive())
    return answer
