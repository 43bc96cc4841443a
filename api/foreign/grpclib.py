"""grpclib's server and client, with bounds on what one peer can make them hold, run and log.

| what grpclib does | what it does here |
| --- | --- |
| lets an event that it does not know, or any error of h2, out of `data_received` | ignores unknown frames; an error ends the connection, in one log line |
| waits for a message of whatever length its prefix says | refuses it at the prefix; messages on their way share a room |
| fails at an empty DATA frame, and queues them without end | takes them as what they are |
| keeps a stream for ever that is reset before its task has begun | lets go of it when its task ends, however it ends |
| opens and resets streams, pings and settings without end | ends with ENHANCE_YOUR_CALM who sends too many |
| waits for ever for a peer that takes nothing | for `reader_timeout_s`, then the call is cancelled |
| never closes a silent connection | pings it; closes it when it stays silent, or has no call for `idle_connection_s` |
| waits for ever to close a connection whose peer reads nothing | for `_CLOSING_S` |
| logs a traceback where a cancelled call comes to its end just then | says nothing |
| knows no compression | takes gzip, and says so |
"""

from __future__ import annotations

import asyncio
import logging
import re
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from socket import socket
from ssl import SSLContext
from typing import TYPE_CHECKING, Any, cast

from grpclib import GRPCError, Status
from grpclib.client import Channel
from grpclib.config import Configuration
from grpclib.const import Handler
from grpclib.encoding.base import CodecBase
from grpclib.exceptions import StreamTerminatedError
from grpclib.metadata import Deadline, decode_metadata
from grpclib.protocol import AbstractHandler, Buffer, Connection, EventsProcessor, H2Protocol
from grpclib.protocol import Stream as H2Stream
from grpclib.server import Server, Stream
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    DataReceived,
    Event,
    PingAckReceived,
    PingReceived,
    PriorityUpdated,
    RemoteSettingsChanged,
    SettingsAcknowledged,
    StreamReset,
    UnknownFrameReceived,
    WindowUpdated,
)
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes

from api.foreign import require
from api.foreign.h2 import BoundedConnection, ForgetfulConnection, require_tested_h2
from api.logs import where

if TYPE_CHECKING:
    from grpclib._typing import IServable

_STREAM_WINDOW_BYTES = 256 * 2**10
_CONNECTION_WINDOW_BYTES = 2**20
# Of messages whose prefix has come and whose end has not.
_ROOM_OF_A_CONNECTION_BYTES = 8 * 2**20
_ROOM_BYTES = 256 * 2**20
# What a peer that does not read can make us keep to be sent to it.
_MOST_UNREAD_BYTES = 512 * 2**10
# h2 allows 100 open streams; calls of streams that were reset are under way to their end.
_MOST_CALLS = 200
_READ_AT_ONCE_BYTES = 16 * 2**10
_CLOSING_S = 1.0
_HANDSHAKE_S = 20.0
# A message of this many bytes unpacks to a MiB at most: longer ones are unpacked in a thread.
_UNPACKED_AT_ONCE_BYTES = 1024
_ENCODINGS = ("identity", "gzip")
_ACCEPTED = ("grpc-accept-encoding", ",".join(_ENCODINGS))
_TIMEOUT = re.compile(r"[0-9]{1,8}[HMSmun]")
_OURS = "a fault of the server ended this call: its log says more"

# Frames that bring no call on. A peer has a stock of them, which grows again with time and with every message it is sent:
# good clients ping and open windows as they read.
_STOCK = 1000
_STOCK_A_SECOND = 100
_STOCK_A_MESSAGE = 4
_IDLE_TALK = (
    PingAckReceived,
    PingReceived,
    PriorityUpdated,
    RemoteSettingsChanged,
    SettingsAcknowledged,
    StreamReset,
    UnknownFrameReceived,
    WindowUpdated,
)

_log = logging.getLogger("perennial.grpc")

Headers = list[tuple[str, str]]


def require_tested_grpclib() -> None:
    """Raises UntestedLibrary."""
    require("grpclib", "0.4.9", "0.4.10")
    require_tested_h2()


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client may ask for."""

    message_bytes: int
    reader_timeout_s: float
    idle_connection_s: float


class Room:
    """Bytes that may be held at once."""

    def __init__(self, most_bytes: int) -> None:
        self._free_bytes = most_bytes

    @contextmanager
    def held(self, size: int) -> Iterator[None]:
        """Raises GRPCError where there is not so much."""
        if size > self._free_bytes:
            raise GRPCError(Status.RESOURCE_EXHAUSTED, "too many long messages are on their way: send fewer at once")
        self._free_bytes -= size
        try:
            yield
        finally:
            self._free_bytes += size


class ReceiveBuffer(Buffer):
    """A stream's data in one piece. The peer's window is opened again while somebody waits for more, so that bounds it."""

    def __init__(self, ack_callback: Callable[[int], None]) -> None:
        self._acknowledge = ack_callback
        self._data = bytearray()
        self._unacknowledged = 0
        self._has_ended = False
        self._more = asyncio.Event()

    def add(self, data: bytes, ack_size: int) -> None:
        self._data += data
        self._unacknowledged += ack_size
        self._more.set()

    def eof(self) -> None:
        self._has_ended = True
        self._more.set()

    def holds(self, size: int) -> bool:
        """Whether `read` of so much returns at once."""
        return self._has_ended or len(self._data) >= size

    async def read(self, size: int) -> bytes:
        """The next `size` bytes; fewer where the stream has ended."""
        while not self.holds(size):
            self._acknowledge(self.unacked_size())
            self._more.clear()
            await self._more.wait()
        data = bytes(self._data[:size])
        del self._data[:size]
        return data

    def unacked_size(self) -> int:
        size, self._unacknowledged = self._unacknowledged, 0
        return size


class GuardedStream(H2Stream):
    """A stream whose peer has to take what it is sent, within `reader_timeout_s` for each message."""

    buffer: ReceiveBuffer
    connection: GuardedConnection

    def init_stream(self, stream_id: int, connection: Connection) -> None:
        super().init_stream(stream_id, connection)
        self.buffer = ReceiveBuffer(partial(connection.ack, stream_id))

    async def recv_data(self, size: int, timeout_s: float | None = None) -> bytes:
        """The next `size` bytes; fewer where the stream has ended. Raises GRPCError when they take longer."""
        if self.buffer.holds(size):
            return await self.buffer.read(size)
        try:
            async with asyncio.timeout(timeout_s):
                return await self.buffer.read(size)
        except TimeoutError:
            raise GRPCError(Status.DEADLINE_EXCEEDED, f"the message took longer than {timeout_s} s to come") from None

    async def send_headers(self, headers: Headers, end_stream: bool = False) -> None:
        """Raises StreamTerminatedError where the peer has left or does not read."""
        if headers[0][0] == ":status":
            headers = [*headers, _ACCEPTED]
        if not self._may_write():
            async with self._reading():
                while not self._may_write():
                    await self.connection.write_ready.wait()
        self._h2_connection.send_headers(self._id, headers, end_stream=end_stream)
        self._transport.write(self._h2_connection.data_to_send())
        self.connection.headers_send_process()

    async def send_data(self, data: bytes, end_stream: bool = False) -> None:
        """Raises StreamTerminatedError where the peer has left or does not read."""
        if self._may_write() and self._window() >= len(data) <= self._h2_connection.max_outbound_frame_size:
            self._write(data, end_stream)
        else:
            async with self._reading():
                await self._send_in_pieces(memoryview(data), end_stream)
        self.connection.patience.earn(_STOCK_A_MESSAGE)
        self.connection.data_send_process()

    async def _send_in_pieces(self, data: memoryview, end_stream: bool) -> None:
        while data:
            if not self._may_write():
                await self.connection.write_ready.wait()
            elif (window := self._window()) > 0:
                size = min(window, self._h2_connection.max_outbound_frame_size)
                piece, data = data[:size], data[size:]
                self._write(bytes(piece), end_stream and not data)
            else:
                self.window_updated.clear()
                await self.window_updated.wait()

    def _reading(self) -> _Reading:
        return _Reading(self, self.connection.limits.reader_timeout_s)

    def _may_write(self) -> bool:
        if not self.closable:
            raise StreamTerminatedError("the client has left")
        return self.connection.write_ready.is_set()

    def _window(self) -> int:
        return self._h2_connection.local_flow_control_window(self._id)

    def _write(self, data: bytes, end_stream: bool) -> None:
        self._h2_connection.send_data(self._id, data, end_stream=end_stream)
        self._transport.write(self._h2_connection.data_to_send())
        self.data_sent += len(data)
        self.connection.data_sent += len(data)

    @property
    def _id(self) -> int:
        assert self.id is not None
        return self.id


class _Reading:
    """The time in which a stream's peer has to read."""

    def __init__(self, stream: GuardedStream, timeout_s: float) -> None:
        self._stream = stream
        self._timeout_s = timeout_s
        self._timeout = asyncio.timeout(timeout_s)

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(self, *raised: Any) -> None:
        try:
            await self._timeout.__aexit__(*raised)
        except TimeoutError:
            if not self._timeout.expired():
                raise
            _log.info("a client did not read its stream for %g s: the call is cancelled", self._timeout_s)
            if self._stream.closable:
                self._stream.reset_nowait(ErrorCodes.CANCEL)
            raise StreamTerminatedError("the client does not read") from None


class Patience:
    """A peer's stock of frames that bring no call on."""

    def __init__(self) -> None:
        self._stock = float(_STOCK)
        self._at = asyncio.get_running_loop().time()

    def earn(self, count: float) -> None:
        self._stock = min(_STOCK, self._stock + count)

    def spend(self, count: int) -> bool:
        """Whether there were so many."""
        now = asyncio.get_running_loop().time()
        self.earn((now - self._at) * _STOCK_A_SECOND)
        self._at = now
        self._stock -= count
        return self._stock >= 0


class GuardedConnection(Connection):
    """A server's connection: what its streams share."""

    def __init__(self, connection: H2Connection, transport: asyncio.Transport, config: Configuration, limits: Limits):
        super().__init__(connection, transport, config=config)
        self.limits = limits
        self.patience = Patience()
        self.room = Room(_ROOM_OF_A_CONNECTION_BYTES)

    def create_stream(self, *, stream_id: int | None = None, wrapper: Any = None) -> GuardedStream:
        return GuardedStream(self, self._connection, self._transport, stream_id=stream_id, wrapper=wrapper)

    def initialize(self) -> None:
        """Leaves pings to the protocol, which knows when a connection is idle."""

    def flush(self) -> None:
        if not self.is_closing():
            super().flush()

    def ping(self) -> None:
        self._connection.ping(b"perennia")
        self.flush()

    def say_goodbye(self, code: ErrorCodes) -> None:
        """Tells the peer to make no more calls here."""
        try:
            self._connection.close_connection(code)
        except ProtocolError:
            # One of the two sides has said so before.
            return
        self.flush()

    def close(self) -> None:
        if hasattr(self, "_transport"):
            asyncio.get_running_loop().call_later(_CLOSING_S, self._transport.abort)
        super().close()

    def abort(self) -> None:
        if hasattr(self, "_transport"):
            self._transport.abort()

    def unread_bytes(self) -> int:
        return self._transport.get_write_buffer_size() if hasattr(self, "_transport") else 0


class GuardedProcessor(EventsProcessor):
    """Ignores events that mean nothing to a gRPC server, as RFC 9113 5.5 has it for frames of unknown types."""

    def process(self, event: Event) -> None:
        process = getattr(self, "processors", {}).get(type(event))
        if process is not None:
            process(event)


class _OurProtocol(H2Protocol):
    """grpclib's protocol, with the say which classes it is made of."""

    h2_connection: type[H2Connection] = ForgetfulConnection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        h2_connection = self.h2_connection(config=self.h2_config)
        h2_connection.initiate_connection()
        initial = h2_connection.local_settings.initial_window_size
        if more := self.config.http2_connection_window_size - initial:
            h2_connection.increment_flow_control_window(more)
        if (window := self.config.http2_stream_window_size) != initial:
            h2_connection.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: window})
        self.connection = self.connected(h2_connection, cast(asyncio.Transport, transport))
        self.connection.flush()
        self.connection.initialize()
        self.processor = self.processing()

    def connected(self, h2_connection: H2Connection, transport: asyncio.Transport) -> Connection:
        return Connection(h2_connection, transport, config=self.config)

    def processing(self) -> EventsProcessor:
        return EventsProcessor(self.handler, self.connection)


class ForgetfulChannel(Channel):
    """A client's channel whose connections remember few of the calls that have ended."""

    def _protocol_factory(self) -> H2Protocol:
        factory = super()._protocol_factory()
        return _OurProtocol(factory.handler, factory.config, factory.h2_config)


class GuardedProtocol(_OurProtocol, asyncio.BufferedProtocol):
    """A server's side of one connection. Whatever its peer sends, nothing worse than its end comes of it."""

    h2_connection = BoundedConnection
    connection: GuardedConnection

    def __init__(self, server: GuardedServer, config: Configuration, h2_config: H2Configuration) -> None:
        self._server = server
        self._loop = asyncio.get_running_loop()
        self.calls = Calls(server, self._became_idle)
        super().__init__(self.calls, config, h2_config)
        self.is_made = False
        self._is_over = False
        self._heard_at = self._idle_since = self._loop.time()
        self._pinged_at = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def idle_since(self) -> float | None:
        """When its last call ended; None while there is one, and until the connection is made."""
        return None if self.calls.count or not self.is_made else self._idle_since

    def connected(self, h2_connection: H2Connection, transport: asyncio.Transport) -> Connection:
        return GuardedConnection(h2_connection, transport, self.config, self._server.limits)

    def processing(self) -> EventsProcessor:
        self.is_made = True
        self._watch()
        return GuardedProcessor(self.handler, self.connection)

    def get_buffer(self, sizehint: int) -> memoryview:
        # All that comes of one reading is done before the loop turns: little at once, so that others have their turn.
        return self._server.reading

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(bytes(self._server.reading[:nbytes]))

    def data_received(self, data: bytes) -> None:
        if self._is_over or self.connection.is_closing():
            return
        self._heard_at = self._loop.time()
        try:
            self._take(data)
        except ProtocolError as error:
            self.connection.flush()
            # h2 has said goodbye, with the code of the error.
            self.end(f"its frames break the protocol ({type(error).__name__})", None)
        except Exception as error:
            _log.error("a gRPC connection failed and is closed: %s", where(error))
            self.end("", ErrorCodes.INTERNAL_ERROR)

    def _take(self, data: bytes) -> None:
        events = self.connection.feed(data)
        idle_talk = sum(isinstance(event, _IDLE_TALK) or _is_empty(event) for event in events)
        if not self.connection.patience.spend(idle_talk):
            self.end("it sends too many frames that bring no call on", ErrorCodes.ENHANCE_YOUR_CALM)
            return
        self.connection.flush()
        for event in events:
            self.processor.process(event)
        self.connection.flush()
        if self.connection.unread_bytes() > _MOST_UNREAD_BYTES:
            self.connection.abort()
            self.end("it does not read what it asks for")

    def end(self, reason: str, code: ErrorCodes | None = ErrorCodes.NO_ERROR) -> None:
        """Closes the connection, and cancels its calls. Without a `code` the client is told nothing."""
        if self._is_over:
            return
        self._is_over = True
        if not self.is_made:
            return
        if reason:
            _log.info("a gRPC connection is closed: %s", reason)
        if code is not None:
            self.connection.say_goodbye(code)
        self.processor.close()

    def abort(self) -> None:
        """Closes the connection without a word."""
        if self.is_made:
            self.connection.abort()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._is_over = True
        if self._timer is not None:
            self._timer.cancel()
        if self.is_made:
            super().connection_lost(exc)
        self._server.forget(self)

    def _became_idle(self) -> None:
        self._idle_since = self._loop.time()

    def _watch(self) -> None:
        """Pings who is silent, ends who stays silent, and who has no call. Calls itself when there is more to see."""
        if self._is_over:
            return
        limits, now, idle_since = self._server.limits, self._loop.time(), self.idle_since
        # A peer has half of the time to be silent, and half to answer the ping.
        pinged_from, silent_until = (
            self._heard_at + limits.reader_timeout_s / 2,
            self._heard_at + limits.reader_timeout_s,
        )
        if now >= silent_until:
            self.connection.abort()
            self.end("it answers no ping")
            return
        if idle_since is not None and now >= idle_since + limits.idle_connection_s:
            self.end("it had no call for long")
            return
        if now >= pinged_from and self._pinged_at < pinged_from:
            self._pinged_at = now
            self.connection.ping()
        due = silent_until if self._pinged_at >= pinged_from else pinged_from
        if idle_since is not None:
            due = min(due, idle_since + limits.idle_connection_s)
        self._timer = self._loop.call_later(max(due - now, 0.0), self._watch)


def _is_empty(event: Event) -> bool:
    return isinstance(event, DataReceived) and not event.data and event.stream_ended is None


class Calls(AbstractHandler):
    """The calls of one connection, each a task."""

    def __init__(self, server: GuardedServer, on_idle: Callable[[], None]) -> None:
        self._server = server
        self._on_idle = on_idle
        self._tasks: dict[H2Stream, asyncio.Task[None]] = {}

    @property
    def count(self) -> int:
        return len(self._tasks)

    def accept(self, stream: H2Stream, headers: Headers, release_stream: Callable[[], None]) -> None:
        assert isinstance(stream, GuardedStream)
        if len(self._tasks) >= _MOST_CALLS:
            if stream.closable:
                stream.reset_nowait(ErrorCodes.REFUSED_STREAM)
            release_stream()
            return
        task = asyncio.get_running_loop().create_task(self._server.answer(stream, headers))
        self._tasks[stream] = task
        # A task that is cancelled before it begins runs none of its own code.
        task.add_done_callback(partial(self._ended, stream, release_stream))

    def _ended(self, stream: GuardedStream, release_stream: Callable[[], None], task: asyncio.Task[None]) -> None:
        del self._tasks[stream]
        if not self._tasks:
            self._on_idle()
        failure = None if task.cancelled() else task.exception()
        if failure is not None:
            _log.error("a gRPC call failed: %s", where(failure))
        if stream.closable:
            # The client has not ended its side, or has not been told all.
            stream.reset_nowait(ErrorCodes.CANCEL if task.cancelled() else ErrorCodes.NO_ERROR)
        release_stream()

    def cancel(self, stream: H2Stream) -> None:
        if (task := self._tasks.get(stream)) is not None:
            task.cancel()

    def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()

    async def wait_closed(self) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks.values())


class Call(Stream[Any, Any]):
    """A call as its handler sees it."""

    _stream: GuardedStream

    def __init__(self, *args: Any, encoding: str, room: Room, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._encoding = encoding
        self._room = room

    async def recv_message(self) -> Any:
        """The next message; None at the end of a stream of them. Raises GRPCError for one that cannot be taken."""
        limits, connection = self._stream.connection.limits, self._stream.connection
        is_stream = self._cardinality.client_streaming
        prefix = await self._stream.recv_data(5, None if is_stream else limits.reader_timeout_s)
        if is_stream and not prefix:
            return None
        if len(prefix) < 5:
            raise GRPCError(Status.INVALID_ARGUMENT, "the call brought no message")
        size = int.from_bytes(prefix[1:], "big")
        if size > limits.message_bytes:
            raise _too_long(limits)
        with connection.room.held(size), self._room.held(size):
            data = await self._stream.recv_data(size, limits.reader_timeout_s) if size else b""
        if len(data) < size:
            raise GRPCError(Status.INVALID_ARGUMENT, "the message was cut short")
        if prefix[0]:
            data = await self._unpacked(prefix[0], data)
        return self._codec.decode(data, self._recv_type)

    async def _unpacked(self, flag: int, data: bytes) -> bytes:
        if flag != 1 or self._encoding != "gzip":
            raise GRPCError(Status.INTERNAL, "the message is marked as compressed and no grpc-encoding says how")
        unpack = partial(_gunzip, data, self._stream.connection.limits)
        if len(data) <= _UNPACKED_AT_ONCE_BYTES:
            return unpack()
        return await asyncio.get_running_loop().run_in_executor(None, unpack)


def _gunzip(data: bytes, limits: Limits) -> bytes:
    unpacker = zlib.decompressobj(wbits=31)
    try:
        unpacked = unpacker.decompress(data, limits.message_bytes + 1)
    except zlib.error:
        raise GRPCError(Status.INVALID_ARGUMENT, "the message is no gzip") from None
    if len(unpacked) > limits.message_bytes:
        raise _too_long(limits)
    if not unpacker.eof or unpacker.unused_data:
        raise GRPCError(Status.INVALID_ARGUMENT, "the message is no whole gzip")
    return unpacked


def _too_long(limits: Limits) -> GRPCError:
    return GRPCError(
        Status.RESOURCE_EXHAUSTED, f"a message is {limits.message_bytes} bytes at most: append in smaller pieces"
    )


class GuardedServer(Server):
    """A server that is handed its connections, by `attach`, and closes them when it is closed."""

    def __init__(
        self, services: Collection[IServable], *, codec: CodecBase, limits: Limits, on_leaving: Callable[[], None]
    ) -> None:
        """`on_leaving` is called when a connection has ended."""
        windows = Configuration(
            http2_connection_window_size=_CONNECTION_WINDOW_BYTES, http2_stream_window_size=_STREAM_WINDOW_BYTES
        )
        super().__init__(services, codec=codec, config=windows)
        # Any byte has a letter there, so that what is no ASCII can be refused by its call.
        self._h2_config.header_encoding = "latin-1"
        self.limits = limits
        self.reading = memoryview(bytearray(_READ_AT_ONCE_BYTES))
        self._on_leaving = on_leaving
        self._room = Room(_ROOM_BYTES)
        self._connections: dict[GuardedProtocol, None] = {}

    async def attach(self, connected: socket, tls: SSLContext | None) -> None:
        """Serves this connection from now on, and returns once it is set up. It is closed where that fails."""
        protocol = GuardedProtocol(self, self._config, self._h2_config)
        self._connections[protocol] = None
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: protocol,
                connected,
                ssl=tls,
                ssl_handshake_timeout=_HANDSHAKE_S if tls else None,
                ssl_shutdown_timeout=_CLOSING_S if tls else None,
            )
        except BaseException as error:
            self.forget(protocol)
            if not isinstance(error, OSError):
                raise
            _log.info("a gRPC connection could not be set up: %s", where(error))

    def forget(self, protocol: GuardedProtocol) -> None:
        """Called for a connection that has ended."""
        if protocol in self._connections:
            del self._connections[protocol]
            self._on_leaving()

    def end_idle_one(self) -> None:
        """Closes the connection that has had no call for longest, if there is one without a call."""
        idle = [
            (one.idle_since, index, one) for index, one in enumerate(self._connections) if one.idle_since is not None
        ]
        if idle:
            min(idle)[-1].end("others wait for its place")

    async def answer(self, stream: GuardedStream, headers: Headers) -> None:
        """Answers one call, whatever it is."""
        try:
            if (found := await self._admitted(stream, headers)) is not None:
                await self._run(stream, *found)
        except StreamTerminatedError:
            # The client has left or does not read, so there is nobody to be told.
            pass
        except ProtocolError:
            if stream.closable:
                raise

    async def _admitted(self, stream: GuardedStream, headers: Headers) -> tuple[Headers, str, Handler] | None:
        """The path and handler of a call that can be answered; another one is refused."""
        found = dict(headers)
        kind, _, subtype = found.get("content-type", "").partition("+")
        path = found.get(":path", "")
        handler = self._mapping.get(path)
        if found.get(":method") != "POST":
            await _refuse(stream, 405)
        elif kind != "application/grpc" or subtype not in ("", self._codec.__content_subtype__):
            await _refuse(stream, 415, Status.UNKNOWN, "content-type must be application/grpc+proto")
        elif found.get("te") != "trailers":
            await _refuse(stream, 400, Status.UNKNOWN, "the header te: trailers is missing")
        elif not all(name.isascii() and value.isascii() for name, value in headers):
            await _refuse(stream, 200, Status.INVALID_ARGUMENT, "metadata is ASCII: give what is not a name in -bin")
        elif handler is None:
            await _refuse(stream, 200, Status.UNIMPLEMENTED, "Method not found")
        elif found.get("grpc-encoding", "identity") not in _ENCODINGS:
            await _refuse(stream, 200, Status.UNIMPLEMENTED, "grpc-encoding must be identity or gzip")
        elif not _TIMEOUT.fullmatch(found.get("grpc-timeout", "1S")):
            await _refuse(stream, 200, Status.INVALID_ARGUMENT, "grpc-timeout is up to 8 digits and a unit")
        else:
            return headers, path, handler
        return None

    async def _run(self, stream: GuardedStream, headers: Headers, path: str, handler: Handler) -> None:
        try:
            metadata, deadline = decode_metadata(headers), Deadline.from_headers(headers)
        except ValueError:
            await _refuse(stream, 200, Status.INVALID_ARGUMENT, "the headers cannot be decoded")
            return
        async with Call(
            stream,
            path,
            handler.cardinality,
            handler.request_type,
            handler.reply_type,
            codec=self._codec,
            status_details_codec=self._status_details_codec,
            dispatch=self.__dispatch__,
            deadline=deadline,
            encoding=dict(headers).get("grpc-encoding", "identity"),
            room=self._room,
        ) as call:
            call.metadata = metadata
            timeout = asyncio.timeout(deadline.time_remaining() if deadline else None)
            try:
                async with timeout:
                    await handler.func(call)
            except (GRPCError, StreamTerminatedError):
                raise
            except Exception as error:
                if timeout.expired():
                    raise GRPCError(Status.DEADLINE_EXCEEDED, "the call took longer than it may") from None
                if not stream.closable:
                    raise StreamTerminatedError("the client has left") from None
                _log.error("a gRPC call failed: %s", where(error))
                raise GRPCError(Status.INTERNAL, _OURS) from None

    def close(self) -> None:
        """Tells every client to go, and cancels their calls."""
        for protocol in list(self._connections):
            protocol.end("")

    async def wait_closed(self) -> None:
        """Returns once every call and every connection has ended; who does not read is not waited for."""
        connections = list(self._connections)
        for protocol in connections:
            await protocol.calls.wait_closed()
        for protocol in connections:
            protocol.abort()


async def _refuse(stream: GuardedStream, http: int, status: Status | None = None, message: str = "") -> None:
    headers = [(":status", str(http))]
    if status is not None:
        headers += [("content-type", "application/grpc"), ("grpc-status", str(status.value)), ("grpc-message", message)]
    await stream.send_headers(headers, end_stream=True)
