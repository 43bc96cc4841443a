"""Clients of the agents' doors, over real sockets: HTTP, and a WebSocket."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import h11
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
        await self.send_text(json.dumps(frame))

    async def send_text(self, text: str) -> None:
        self._protocol.send_text(text.encode())
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


class Call:
    """A POST whose answer is read event by event; an answer in one piece is one event."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._http = h11.Connection(h11.CLIENT)
        self._is_stream = False
        self._text = b""

    async def send(self, host: str, path: str, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        headers = {"Host": host, "Content-Type": "application/json", "Content-Length": str(len(data))}
        for event in (
            h11.Request(method="POST", target=path, headers=[*headers.items()]),
            h11.Data(data),
            h11.EndOfMessage(),
        ):
            await self._stream.send_all(self._http.send(event) or b"")

    async def receive(self) -> dict[str, Any] | None:
        """The next event; None after the last."""
        while self._http.their_state is not h11.DONE or self._text:
            line, end, rest = self._text.partition(b"\n")
            if self._is_stream and end:
                self._text = rest
                if line.startswith(b"data: {"):
                    return _parsed(line.removeprefix(b"data: "))
                continue
            match self._http.next_event():
                case h11.NEED_DATA:
                    self._http.receive_data(await self._stream.receive_some())
                case h11.Response() as response:
                    self._is_stream = b"text/event-stream" in dict(response.headers)[b"content-type"]
                case h11.Data() as data:
                    self._text += data.data
                case h11.EndOfMessage() if not self._is_stream:
                    text, self._text = self._text, b""
                    return _parsed(text)
                case _:
                    return None
        return None


def _parsed(text: bytes) -> dict[str, Any]:
    event: dict[str, Any] = json.loads(text)
    return event


@asynccontextmanager
async def calling(address: tuple[str, int], path: str, body: dict[str, Any]) -> AsyncIterator[Call]:
    """The answer to a request, as it comes; leaving the block is the client's disconnect."""
    async with await trio.open_tcp_stream(*address) as stream:
        call = Call(stream)
        await call.send(address[0], path, body)
        yield call


async def heard(address: tuple[str, int], path: str, body: dict[str, Any]) -> Heard:
    """The whole answer."""
    answer = Heard()
    async with calling(address, path, body) as call:
        while (event := await call.receive()) is not None:
            answer.hear(event)
    return answer


async def heard_on(lane: Lane, frame: dict[str, Any]) -> Heard:
    """The whole answer to a frame, where nothing else is asked on the socket."""
    answer = Heard()
    await lane.send(frame)
    while not answer.is_over:
        answer.hear(await lane.receive())
    return answer
