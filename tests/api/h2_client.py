"""A client of HTTP/2 that reads as little as it likes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, Event, ResponseReceived, StreamEnded, StreamReset
from h2.settings import SettingCodes

_HEAD = {":scheme": "http", ":authority": "localhost"}


class Rude:
    """One connection. Its streams have the window that it was opened with, and no more."""

    def __init__(self, stream: trio.SocketStream, window: int) -> None:
        self.stream = stream
        self._h2 = H2Connection(H2Configuration(header_encoding="utf-8"))
        self._h2.initiate_connection()
        self._h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: window})

    async def ask(self, path: str, body: object = None) -> int:
        """The stream of a request that was sent."""
        number = self._h2.get_next_available_stream_id()
        method = {":method": "GET" if body is None else "POST", ":path": path}
        kind = {} if body is None else {"content-type": "application/json"}
        self._h2.send_headers(number, list((method | _HEAD | kind).items()), end_stream=body is None)
        if body is not None:
            self._h2.send_data(number, json.dumps(body).encode(), end_stream=True)
        await self.flush()
        return number

    async def begin(self, path: str, length: int) -> int:
        """The stream of a request whose body is to come."""
        number = self._h2.get_next_available_stream_id()
        head = {":method": "POST", ":path": path} | _HEAD
        more = {"content-type": "application/json", "content-length": str(length)}
        self._h2.send_headers(number, list((head | more).items()))
        await self.flush()
        return number

    async def send_while_it_is_taken(self, number: int, length: int) -> None:
        """Sends a body in parts as its window allows, also after it was answered."""
        while length:
            part = min(length, self._h2.local_flow_control_window(number), self._h2.max_outbound_frame_size)
            if part:
                self._h2.send_data(number, b"a" * part)
                length -= part
                await self.flush()
            else:
                await self.next_events()

    def grant(self, number: int, more: int) -> None:
        """Lets the server send so many bytes more."""
        self._h2.increment_flow_control_window(more, number)

    async def reset(self, number: int) -> None:
        self._h2.reset_stream(number)
        await self.flush()

    async def flush(self) -> None:
        await self.stream.send_all(self._h2.data_to_send())

    async def next_events(self) -> list[Event]:
        """What came next. Raises EOFError where the server has closed the connection."""
        data = await self.stream.receive_some()
        if not data:
            raise EOFError
        events: list[Event] = self._h2.receive_data(data)
        await self.flush()
        return events

    async def until(self, number: int, kind: type[Event]) -> Event:
        """The first event of this kind on the stream."""
        while True:
            for event in await self.next_events():
                if isinstance(event, kind) and getattr(event, "stream_id", None) == number:
                    return event

    async def status(self, number: int) -> str:
        answer = await self.until(number, ResponseReceived)
        assert isinstance(answer, ResponseReceived)
        headers: dict[Any, Any] = dict(answer.headers or ())
        return str(headers[":status"])


@asynccontextmanager
async def rude(address: tuple[str, int], window: int = 2**16 - 1) -> AsyncIterator[Rude]:
    async with await trio.open_tcp_stream(*address) as stream:
        client = Rude(stream, window)
        await client.flush()
        yield client


__all__ = ["DataReceived", "Rude", "StreamEnded", "StreamReset", "rude"]
