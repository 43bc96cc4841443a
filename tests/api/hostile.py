"""A client of the gRPC door that sends what it likes: frames of HTTP/2 by hand, over a real socket."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import trio
from google.protobuf.message import Message
from hpack import Decoder, Encoder
from hyperframe.frame import DataFrame, Frame, GoAwayFrame, HeadersFrame, PingFrame, RstStreamFrame

from api.client import connect
from runtime.settings import split_address
from tests.api.doors import House

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM = ACK = 1
END_HEADERS = 4
INITIAL_WINDOW_SIZE = 4
CALM = 11
SERVICE = "/kakeya.v1.RuntimeService"
CHECK = "/grpc.health.v1.Health/Check"
WATCH = "/grpc.health.v1.Health/Watch"
REFLECTION = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
# Nothing here takes this long; without it a test whose server says nothing would never end.
_LONGEST_WAIT_S = 20


def frame(kind: int, flags: int = 0, stream_id: int = 0, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream_id) + payload


def setting(code: int, value: int) -> bytes:
    return struct.pack(">HI", code, value)


def message(content: Message | bytes = b"", flag: int = 0, length: int | None = None) -> bytes:
    data = content if isinstance(content, bytes) else content.SerializeToString()
    return struct.pack(">BI", flag, len(data) if length is None else length) + data


class Peer:
    """One connection. Streams are numbered as they are opened, from 1 on."""

    def __init__(self, stream: trio.SocketStream, *settings: bytes) -> None:
        self._stream = stream
        self._encoder, self._decoder = Encoder(), Decoder()
        self._unread = b""
        self._first = PREFACE + frame(SETTINGS, payload=b"".join(settings))
        self._next_id = 1
        self.answers_pings = True

    async def send(self, *frames: bytes) -> None:
        first, self._first = self._first, b""
        await self._stream.send_all(first + b"".join(frames))

    def opening(self, path: str, *data: bytes, ends: bool = True, **headers: str | bytes) -> tuple[int, bytes]:
        """A stream's number, and its frames."""
        number, self._next_id = self._next_id, self._next_id + 2
        named = {
            ":method": "POST",
            ":scheme": "http",
            ":path": path,
            "te": "trailers",
            "content-type": "application/grpc",
        }
        named |= {name.replace("_", "-"): value for name, value in headers.items()}
        block = self._encoder.encode(list(named.items()))
        frames = [frame(HEADERS, END_HEADERS, number, block)]
        frames += [frame(DATA, 0, number, one) for one in data]
        return number, b"".join(frames) + (frame(DATA, END_STREAM, number) if ends else b"")

    async def open(self, path: str, *data: bytes, ends: bool = True, **headers: str | bytes) -> int:
        number, frames = self.opening(path, *data, ends=ends, **headers)
        await self.send(frames)
        return number

    async def next_frame(self) -> Any:
        """What the server sends next; None when it has closed the connection."""
        while not len(self._unread) >= 9 + int.from_bytes(self._unread[:3]):
            try:
                with trio.fail_after(_LONGEST_WAIT_S):
                    more = await self._stream.receive_some()
            except trio.BrokenResourceError:
                return None
            if not more:
                return None
            self._unread += more
        got, size = Frame.parse_frame_header(memoryview(self._unread[:9]))
        got.parse_body(memoryview(self._unread[9 : 9 + size]))
        self._unread = self._unread[9 + size :]
        if isinstance(got, PingFrame) and "ACK" not in got.flags and self.answers_pings:
            await self._stream.send_all(frame(PING, ACK, payload=got.opaque_data))
        if isinstance(got, HeadersFrame):
            got.fields = dict(self._decoder.decode(got.data))
        return got

    async def until(self, wanted: Callable[[Any], bool]) -> Any:
        """The first frame that is wanted."""
        while (got := await self.next_frame()) is not None:
            if wanted(got):
                return got
        raise AssertionError("the server closed the connection")

    async def status(self, number: int) -> dict[str, str]:
        """The trailers of a stream."""

        def is_last(got: Frame) -> bool:
            return isinstance(got, HeadersFrame) and got.stream_id == number and "grpc-status" in got.fields

        fields: dict[str, str] = (await self.until(is_last)).fields
        return fields

    async def first_data(self, number: int) -> None:
        await self.until(lambda got: isinstance(got, DataFrame) and got.stream_id == number)

    async def is_reset(self, number: int) -> None:
        await self.until(lambda got: isinstance(got, RstStreamFrame) and got.stream_id == number)

    async def is_answered(self) -> None:
        """Returns once the server has taken all that was sent before, and said that it goes on."""
        await self.send(frame(PING, payload=b"are you?"))
        await self.until(lambda got: isinstance(got, PingFrame) and got.opaque_data == b"are you?")

    async def farewell(self) -> int | None:
        """The code of the GOAWAY with which the server closes the connection; None where it closes without one."""
        code = None
        while (got := await self.next_frame()) is not None:
            if isinstance(got, GoAwayFrame):
                code = got.error_code
        return code

    async def aclose(self) -> None:
        await self._stream.aclose()


@asynccontextmanager
async def hostile(house: House, *settings: bytes) -> AsyncIterator[Peer]:
    """A connection to the gRPC port, which begins with these settings; it is closed with the block."""
    stream = await trio.open_tcp_stream(*split_address(house.grpc))
    async with stream:
        yield Peer(stream, *settings)


async def is_polite_to_others(house: House) -> bool:
    """Whether a client that means well is served."""
    with trio.fail_after(_LONGEST_WAIT_S):
        async with connect(house.grpc) as client, client.session() as session:
            await session.append([1, 2, 3])
            async with session.generate(3) as events:
                return [type(event).__name__ async for event in events] == ["Token"] * 3 + ["Done"]
