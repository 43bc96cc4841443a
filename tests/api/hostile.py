"""A client of either door that sends what it likes: frames of HTTP/2 by hand, over a real socket."""

from __future__ import annotations

import random
import resource
import struct
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import trio
from google.protobuf.message import Message
from hpack import Decoder, Encoder
from hyperframe.frame import DataFrame, Frame, GoAwayFrame, PingFrame, RstStreamFrame

from api.client import connect
from runtime.settings import split_address
from tests.api.doors import House

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM = ACK = 1
END_HEADERS = 4
INITIAL_WINDOW_SIZE = 4
CALM = 11
# Types that HTTP/2 does not know, or not of clients: ALTSVC, ORIGIN and PRIORITY_UPDATE among them.
UNKNOWN = [0x42, 0x0A, 0x0C, 0x10, 0xFF]
SERVICE = "/kakeya.v1.RuntimeService"
CHECK = "/grpc.health.v1.Health/Check"
WATCH = "/grpc.health.v1.Health/Watch"
REFLECTION = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
# Nothing here takes this long; without it a test whose server says nothing would never end.
_LONGEST_WAIT_S = 100


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
        named: dict[str, str | bytes] = {
            ":method": "POST",
            ":scheme": "http",
            ":path": path,
            "te": "trailers",
            "content-type": "application/grpc",
        }
        named |= {name.replace("_", "-"): value for name, value in headers.items()}
        block = self._encoder.encode(sorted(named.items(), key=lambda each: not str(each[0]).startswith(":")))
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
        got: Any
        got, size = Frame.parse_frame_header(memoryview(self._unread[:9]))
        got.parse_body(memoryview(self._unread[9 : 9 + size]))
        self._unread = self._unread[9 + size :]
        if isinstance(got, PingFrame) and "ACK" not in got.flags and self.answers_pings:
            await self._stream.send_all(frame(PING, ACK, payload=got.opaque_data))
        if got.type == HEADERS:
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

        def is_last(got: Any) -> bool:
            return got.type == HEADERS and got.stream_id == number and "grpc-status" in got.fields

        fields: dict[str, str] = (await self.until(is_last)).fields
        return fields

    async def first_data(self, number: int) -> None:
        await self.until(lambda got: isinstance(got, DataFrame) and got.stream_id == number)

    async def is_reset(self, *numbers: int) -> None:
        """Returns once each of these streams has been reset, in whichever order."""
        left = {*numbers}
        while left:
            left.discard((await self.until(lambda got: isinstance(got, RstStreamFrame))).stream_id)

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
async def peer_at(address: str, *settings: bytes) -> AsyncIterator[Peer]:
    """A connection to a door, which begins with these settings; it is closed with the block."""
    stream = await trio.open_tcp_stream(*split_address(address))
    async with stream:
        yield Peer(stream, *settings)


def hostile(house: House, *settings: bytes) -> AbstractAsyncContextManager[Peer]:
    """A connection to the gRPC port."""
    return peer_at(house.grpc, *settings)


@dataclass(frozen=True)
class Call:
    """What a stream asks for."""

    path: str
    data: tuple[bytes, ...] = ()
    headers: dict[str, str] = field(default_factory=dict)


GRPC_CALLS = [Call(path, (message(),)) for path in (CHECK, WATCH, REFLECTION)]
_LOCAL = {":authority": "localhost", "content-type": "application/json"}
HTTP_CALLS = [
    *(
        Call(path, headers={":method": "GET", ":authority": "localhost"})
        for path in ("/healthz", "/openapi.json", "/no")
    ),
    *(Call("/v1/chat/completions", (body,), _LOCAL) for body in (b"{", b'{"model": "seedling", "messages": []}')),
]


def random_frames(source: random.Random, count: int) -> bytes:
    """Frames of every type, some of them what they should be, some that are known to have ended a server."""
    kinds = [*range(11), *UNKNOWN]
    frames = []
    for _ in range(count):
        kind, number = source.choice(kinds), source.choice([0, 1, 1, 3, 5, 2, source.randrange(2**31)])
        sane = {
            HEADERS: source.choice([b"\x83\x86\x44\x01/", b"\x82\x86\x44\x01/\x00\x01a\x02\xc3\xff"]),
            PRIORITY: source.choice([b"\x00\x00\x00\x07\x10", struct.pack(">IB", number % 2**31, 16)]),
            RST_STREAM: bytes(4),
            SETTINGS: setting(source.randrange(1, 70), source.choice([0, 1, 4096, 65535, 2**31 - 1])),
            PING: bytes(8),
            WINDOW_UPDATE: struct.pack(">I", source.randrange(1, 2**31)),
        }
        payload = sane.get(kind, b"") if source.random() < 0.7 else source.randbytes(source.randrange(40))
        flags = source.choice([0, END_STREAM, END_HEADERS, END_HEADERS | END_STREAM, source.randrange(256)])
        frames.append(frame(kind, flags, number, payload))
    return b"".join(frames)


async def sends_anything(address: str, calls: Sequence[Call], seed: int, frames: int) -> None:
    """One connection that begins with one of the calls."""
    source = random.Random(seed)
    async with peer_at(address) as peer:
        call = source.choice(calls)
        _, opening = peer.opening(call.path, *call.data, ends=source.random() < 0.5, **call.headers)
        said = opening + random_frames(source, frames)
        if source.random() < 0.2:
            said = said[: source.randrange(len(said))]
        try:
            await peer.send(said)
            if source.random() < 0.5:
                # Enough of an answer that the server has begun to read.
                await peer.next_frame()
        except trio.BrokenResourceError:
            pass


async def send_anything(address: str, calls: Sequence[Call], connections: int, frames: int, at_once: int = 20) -> None:
    """So many connections, some at a time, each other than all others."""
    for first in range(0, connections, at_once):
        async with trio.open_nursery() as nursery:
            for seed in range(first, min(first + at_once, connections)):
                nursery.start_soon(sends_anything, address, calls, seed, frames)


async def floods(peer: Peer, frames: Iterable[bytes]) -> int | None:
    """Sends it all while the connection takes it, and says how it ended."""
    code = None

    async def send() -> None:
        try:
            for one in frames:
                await peer.send(one)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        code = await peer.farewell()
        nursery.cancel_scope.cancel()
    return code


def resets(peer: Peer, count: int, call: Call) -> Iterator[bytes]:
    """Streams opened and reset at once, a hundred at a time."""
    for first in range(0, count, 100):
        pairs = []
        for _ in range(first, min(first + 100, count)):
            number, opening = peer.opening(call.path, ends=False, **call.headers)
            pairs.append(opening + frame(RST_STREAM, 0, number, bytes(4)))
        yield b"".join(pairs)


async def is_polite_to_others(house: House) -> bool:
    """Whether a client that means well is served."""
    return await serves_sessions(house.grpc)


async def serves_sessions(address: str) -> bool:
    """Whether a gRPC client that means well is served."""
    with trio.fail_after(_LONGEST_WAIT_S):
        async with connect(address) as client, client.session() as session:
            await session.append([1, 2, 3])
            async with session.generate(3) as events:
                return [type(event).__name__ async for event in events] == ["Token"] * 3 + ["Done"]


@contextmanager
def few_descriptors(most: int) -> Iterator[None]:
    """This process, and those that it starts in the block, may open so few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
