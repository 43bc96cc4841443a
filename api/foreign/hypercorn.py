"""Hypercorn 0.18 with connections that end: with their client, with the server, and on their own when they fail.

`patch` puts these classes in the place of Hypercorn's. What each changes:

- `TrioConnection`. Hypercorn shields every send from cancellation, so that a client that does not read holds its connection
  for ever; lets an error of one connection end the server; and reads nothing while it handles a request, so that it notices
  no sooner than the answer's end that the client has left.
- `AsyncioConnection`. The same, but for the shield: there a close waits until all has been sent. And where a connection has
  not ended by `graceful_timeout`, Hypercorn fails on its own cancellation and never tells the application to stop.
- `PatientH2`, `PatientBuffer`. Of an answer that is not read, any length is held in memory; it waits for the client's window
  without limit, also on a stream or connection that is gone; streams may be opened and reset faster than their calls end;
  an error in the answer leaves the stream open; something of each
  stream that was reset is kept, until the connection fails; a connection whose last stream was reset never counts as idle; data
  for a stream that was answered already, a path that is not ASCII and a PRIORITY frame can end the connection; and what a client
  can make h2 hold has no bound (`api.foreign.h2`).
- `BoundedDeflate`. A compressed frame of a WebSocket is inflated whatever it comes to (`api.foreign.wsproto`).
- Both connections count themselves in a `Crowd`, which Hypercorn does not bound. Without descriptors, asyncio and trio wait for
  somebody else to free one and log an error each time that they have waited; `_OutOfRoom` frees one, and says so once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from math import inf
from typing import Any, Protocol

import anyio
import anyio.lowlevel
import h2.events
import hypercorn.asyncio.run
import hypercorn.protocol
import hypercorn.protocol.h2
import hypercorn.protocol.ws_stream
import hypercorn.trio.run
import trio
from h2.errors import ErrorCodes
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes, Settings
from hypercorn.asyncio.tcp_server import TCPServer as AsyncioTCPServer
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol import ProtocolWrapper
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.events import StreamClosed
from hypercorn.protocol.h2 import BUFFER_HIGH_WATER, BUFFER_LOW_WATER, BufferCompleteError, H2Protocol, StreamBuffer
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.trio.tcp_server import MAX_RECV, TCPServer
from priority.priority import MissingStreamError

from api.accepting import OUT_OF_ROOM, Notice, most_connections
from api.foreign import require
from api.foreign.h2 import MOST_HEADER_BYTES, BoundedConnection, require_tested_h2
from api.foreign.wsproto import BoundedDeflate, require_tested_wsproto

READ_AHEAD = 16
"""Parts of at most 64 KiB that a connection holds of what its client sends while something else is handled."""

# Bytes of a long answer sent under one deadline, so that a slow reader is told from one that does not read.
_PART_BYTES = 2**16
# Bytes of a client's frames handled in one step of the event loop; the shortest frame has 9 bytes.
_FRAMES_BYTES = 2**12
# The most calls of one connection that may be ending after their streams are gone; beyond it no frames are taken.
_MOST_ENDING = 100
# How long a connection that ends may take to say goodbye, in seconds.
_GOODBYE_S = 2.0
# Connections end by themselves this many seconds before their host would cancel them.
_EARLY_S = 0.25
# How long a client may take to send the head of a request that it has begun.
_HEAD_S = 30.0
# The loggers in which asyncio and trio report that they cannot accept.
_ACCEPTING = ("asyncio", "trio.serve_listeners")

_log = logging.getLogger("perennial.http")


class _Connection(Protocol):
    def cut(self) -> None: ...


@dataclass
class Crowd:
    """The open connections, at most `most`. For one more, the connection that has been without a call for longest ends."""

    most: int
    _busy: set[_Connection] = field(default_factory=set)
    _idle: dict[_Connection, None] = field(default_factory=dict)

    def enter(self, connection: _Connection) -> bool:
        """Adds a connection; returns whether there was room for it."""
        if len(self._busy) + len(self._idle) >= self.most and not self.make_room():
            return False
        self._idle[connection] = None
        return True

    def make_room(self) -> bool:
        """Ends the connection that has been without a call for longest, if there is one."""
        if not self._idle:
            return False
        longest = next(iter(self._idle))
        self.leave(longest)
        longest.cut()
        return True

    def note(self, connection: _Connection, *, is_idle: bool) -> None:
        if connection in self._busy or connection in self._idle:
            self.leave(connection)
            if is_idle:
                self._idle[connection] = None
            else:
                self._busy.add(connection)

    def leave(self, connection: _Connection) -> None:
        self._busy.discard(connection)
        self._idle.pop(connection, None)


class _OutOfRoom(logging.Filter):
    """Makes room when a connection could not be accepted, which the event loops report in their logs alone."""

    def __init__(self, crowd: Crowd) -> None:
        super().__init__()
        self._crowd = crowd
        self._notice = Notice(_log, "HTTP")

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if not isinstance(error, OSError) or error.errno not in OUT_OF_ROOM:
            return True
        self._notice.give(error.strerror or "out of resources")
        self._crowd.make_room()
        return False


@dataclass(frozen=True)
class Patience:
    """How long to wait for clients; `on_stop` is told when the server stops, with the seconds that calls have left."""

    reader_timeout_s: float
    on_stop: Callable[[float], None]
    crowd: Crowd = field(default_factory=lambda: Crowd(most_connections()))


def patch(patience: Patience) -> None:
    """Makes Hypercorn's servers that start from now on use the classes of this module. Raises UntestedLibrary."""
    require("hypercorn", "0.18", "0.19")
    require_tested_h2()
    require_tested_wsproto()
    # Hypercorn has no setting for these classes, and its types say that its own stay where they are.
    hypercorn.trio.run.TCPServer = partial(TrioConnection, patience)  # type: ignore[attr-defined, assignment]
    hypercorn.asyncio.run.TCPServer = partial(AsyncioConnection, patience)  # type: ignore[attr-defined, assignment]
    hypercorn.protocol.H2Protocol = partial(PatientH2, patience)  # type: ignore[attr-defined, assignment]
    hypercorn.protocol.h2.StreamBuffer = partial(PatientBuffer, patience)  # type: ignore[misc, assignment]
    hypercorn.protocol.ws_stream.PerMessageDeflate = BoundedDeflate  # type: ignore[attr-defined]
    for name in _ACCEPTING:
        logger = logging.getLogger(name)
        logger.filters[:] = [
            *(one for one in logger.filters if not isinstance(one, _OutOfRoom)),
            _OutOfRoom(patience.crowd),
        ]


def _parts(data: bytes, most: int = _PART_BYTES) -> Iterator[memoryview]:
    view = memoryview(data)
    return (view[at : at + most] for at in range(0, len(view), most))


def _is_in_head(protocol: ProtocolWrapper) -> bool:
    """Whether the client has sent a part of an HTTP/1 request's head."""
    spoken = protocol.protocol
    return isinstance(spoken, H11Protocol) and spoken.stream is None and bool(spoken.connection.trailing_data[0])


def _log_failure(error: BaseException) -> None:
    left: BaseException | None = error
    if isinstance(error, BaseExceptionGroup):
        # The application runs in a trio loop of its own, whose cancellation arrives here as an error.
        _, left = error.split((trio.Cancelled, asyncio.CancelledError))
    if left is not None:
        _log.error("connection failed", exc_info=left)


class TrioConnection(TCPServer):
    def __init__(self, patience: Patience, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._patience = patience
        self._scope = trio.CancelScope()

    def cut(self) -> None:
        self._scope.cancel()

    async def run(self) -> None:
        crowd = self._patience.crowd
        if not crowd.enter(self):
            await trio.aclose_forcefully(self.stream)
            return
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._end_when_cancelled)
                    await super().run()
                    nursery.cancel_scope.cancel()
        except* Exception as errors:
            _log_failure(errors)
        finally:
            crowd.leave(self)

    async def _end_when_cancelled(self) -> None:
        """Cancels what Hypercorn shields, so that an answer's last send ends with its connection."""
        try:
            await self.context.terminated.wait()
            self._patience.on_stop(self.config.graceful_timeout)
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(self.stream)
                await self._let_go()

    async def _let_go(self) -> None:
        if hasattr(self, "protocol"):
            with trio.move_on_after(_GOODBYE_S, shield=True):
                await self.protocol.handle(Closed())

    async def _read_data(self) -> None:
        ahead, received = trio.open_memory_channel[bytes](READ_AHEAD)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._handle_each, received)
            with suppress(trio.ClosedResourceError, trio.BrokenResourceError, trio.TooSlowError):
                while data := await self._next_bytes():
                    await ahead.send(data)
            nursery.cancel_scope.cancel()
        # A client that has left needs no answer, and an answer that is being sent has a time limit.
        self._scope.deadline = min(self._scope.deadline, trio.current_time() + _GOODBYE_S)
        await self.protocol.handle(Closed())

    async def _handle_each(self, received: trio.MemoryReceiveChannel[bytes]) -> None:
        async for data in received:
            await self.protocol.handle(RawData(data))
            is_in_head = _is_in_head(self.protocol)
            if is_in_head != (self._scope.deadline < inf):
                self._scope.deadline = trio.current_time() + _HEAD_S if is_in_head else inf

    async def _next_bytes(self) -> bytes:
        with trio.fail_after(self.config.read_timeout or inf):
            return bytes(await self.stream.receive_some(MAX_RECV))

    async def protocol_send(self, event: Event) -> None:
        if isinstance(event, Updated):
            self._patience.crowd.note(self, is_idle=event.idle)
        if not isinstance(event, RawData):
            await super().protocol_send(event)
            return
        async with self.send_lock:
            try:
                for part in _parts(event.data):
                    with trio.fail_after(self._patience.reader_timeout_s):
                        await self.stream.send_all(part)
            except (
                trio.BrokenResourceError,
                trio.ClosedResourceError,
                trio.BusyResourceError,
                trio.TooSlowError,
            ):
                self._scope.cancel()
                await self._let_go()
            except trio.Cancelled:
                # On a kept connection a part of an answer would look like the beginning of the next.
                self._scope.cancel()
                raise

    async def _close(self) -> None:
        with trio.move_on_after(_GOODBYE_S):
            await super()._close()

    async def _initiate_server_close(self) -> None:
        await self._let_go()
        self._scope.cancel()


class AsyncioConnection(AsyncioTCPServer):
    def __init__(self, patience: Patience, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._patience = patience
        self._head_timer: asyncio.TimerHandle | None = None
        self._is_over = False

    def cut(self) -> None:
        self._is_over = True
        self.writer.transport.abort()

    async def run(self) -> None:
        crowd = self._patience.crowd
        if not crowd.enter(self):
            self.cut()
            return
        # Everything sent is handed to the kernel at once, so that a close waits for nobody. (Over TLS, a limit of 0 counts
        # as always reached.)
        self.writer.transport.set_write_buffer_limits(high=1, low=0)
        serving = asyncio.create_task(super().run())
        watching = asyncio.create_task(self._end_with_the_server(serving))
        try:
            await asyncio.wait([serving])
        except asyncio.CancelledError:
            # Not raised again: asyncio's streams treat a cancelled connection task as a failed one.
            await self._end(serving)
        finally:
            watching.cancel()
            if self._head_timer is not None:
                self._head_timer.cancel()
            crowd.leave(self)
        if not serving.cancelled() and (error := serving.exception()) is not None:
            _log_failure(error)

    async def _end_with_the_server(self, serving: asyncio.Task[None]) -> None:
        """Ends the connection before Hypercorn cancels it, for then the application would not hear that the server stops."""
        await self.context.terminated.wait()
        self._patience.on_stop(self.config.graceful_timeout)
        await asyncio.sleep(self.config.graceful_timeout - _EARLY_S)
        await self._end(serving)

    async def _end(self, serving: asyncio.Task[None]) -> None:
        # Tasks that wait for the client must be told before they can be cancelled.
        self.cut()
        await self._let_go()
        serving.cancel()
        await asyncio.wait([serving])

    async def _let_go(self) -> None:
        if hasattr(self, "protocol"):
            with suppress(TimeoutError):
                await asyncio.wait_for(self.protocol.handle(Closed()), _GOODBYE_S)

    async def _read_data(self) -> None:
        received = asyncio.Queue[bytes](READ_AHEAD)
        async with asyncio.TaskGroup() as tasks:
            handling = tasks.create_task(self._handle_each(received))
            with suppress(OSError):
                while data := await asyncio.wait_for(self.reader.read(MAX_RECV), self.config.read_timeout):
                    await received.put(data)
            handling.cancel()
        self._is_over = True
        self.loop.call_later(_GOODBYE_S, self.cut)
        await self.protocol.handle(Closed())

    async def _handle_each(self, received: asyncio.Queue[bytes]) -> None:
        while True:
            await self.protocol.handle(RawData(await received.get()))
            is_in_head = _is_in_head(self.protocol)
            if is_in_head and self._head_timer is None:
                self._head_timer = self.loop.call_later(_HEAD_S, self.cut)
            elif not is_in_head and self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

    async def protocol_send(self, event: Event) -> None:
        if isinstance(event, Updated):
            self._patience.crowd.note(self, is_idle=event.idle)
        if not isinstance(event, RawData):
            # A connection that is ending starts no more tasks, not even the one that waits for its next request.
            if not (self._is_over and isinstance(event, Updated)):
                await super().protocol_send(event)
            return
        async with self.send_lock:
            try:
                for part in _parts(event.data):
                    if self.writer.transport.is_closing():
                        # asyncio would accept the data, and log a line each time.
                        raise ConnectionResetError
                    self.writer.write(part)
                    await asyncio.wait_for(self.writer.drain(), self._patience.reader_timeout_s)
            except (OSError, RuntimeError):
                self.cut()
                await self.protocol.handle(Closed())

    async def _close(self) -> None:
        # A close waits until everything is sent, which a client that does not read delays for ever.
        timer = self.loop.call_later(_GOODBYE_S, self.cut)
        try:
            await super()._close()
        finally:
            timer.cancel()


class PatientBuffer(StreamBuffer):
    """Data that waits for a stream's window. Raises ReaderGone if the client takes none of it for as long as a reader may."""

    def __init__(self, patience: Patience, event_class: Any) -> None:
        super().__init__(event_class)
        self._patience = patience
        self._taken = 0

    @property
    def has_end(self) -> bool:
        return self._complete

    async def push(self, data: bytes) -> None:
        if self._complete:
            raise BufferCompleteError
        self.buffer.extend(data)
        await self._is_empty.clear()
        if len(self.buffer) >= BUFFER_HIGH_WATER:
            await self._while_client_reads(self._paused.wait)
            await self._paused.clear()

    async def drain(self) -> None:
        await self._while_client_reads(super().drain)

    async def pop(self, max_length: int) -> bytes:
        data = bytes(self.buffer[:max_length])
        del self.buffer[:max_length]
        self._taken += len(data)
        # Hypercorn checks only the length of what it took, and so lets an answer go on that nobody reads.
        if len(self.buffer) < BUFFER_LOW_WATER:
            await self._paused.set()
        if not self.buffer:
            await self._is_empty.set()
        return data

    async def _while_client_reads(self, wait: Callable[[], Awaitable[None]]) -> None:
        while True:
            taken = self._taken
            with anyio.move_on_after(self._patience.reader_timeout_s):
                await wait()
                return
            if self._taken == taken:
                raise ReaderGone


class ReaderGone(Exception):
    """A client has not read its stream for longer than allowed."""


class _Streams(dict[int, Any]):
    """The streams of one connection. A stream that was answered already ignores what still arrives for it."""

    def __missing__(self, stream_id: int) -> _Answered:
        return _Answered()


class _Answered:
    idle = True

    async def handle(self, _: StreamEvent) -> None:
        pass


class _Calls:
    """The task group of a connection, which counts the calls that have not ended."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self._running = 0
        self._one_ended = anyio.Event()

    def spawn(self, function: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        self._group.spawn(function, *arguments)

    async def spawn_app(self, app: Any, config: Any, scope: Any, send: Callable[[Any], Awaitable[None]]) -> Any:
        async def send_and_count(event: Any) -> None:
            if event is None:
                self._running -= 1
                self._one_ended.set()
            await send(event)

        self._running += 1
        return await self._group.spawn_app(app, config, scope, send_and_count)

    async def until_at_most(self, most: int) -> None:
        while self._running > most:
            self._one_ended = anyio.Event()
            await self._one_ended.wait()


class PatientH2(H2Protocol):
    def __init__(self, patience: Patience, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.streams = _Streams()
        self._calls = _Calls(self.task_group)
        self.task_group = self._calls  # type: ignore[assignment] # It has what Hypercorn uses of one.
        settings = {
            SettingCodes.MAX_CONCURRENT_STREAMS: self.config.h2_max_concurrent_streams,
            SettingCodes.MAX_HEADER_LIST_SIZE: MOST_HEADER_BYTES,
            SettingCodes.ENABLE_CONNECT_PROTOCOL: 1,
        }
        frame_bytes = self.connection.DEFAULT_MAX_INBOUND_FRAME_SIZE
        self.connection = BoundedConnection(self.connection.config)
        self.connection.DEFAULT_MAX_INBOUND_FRAME_SIZE = frame_bytes
        self.connection.local_settings = Settings(client=False, initial_values=settings)

    async def initiate(self, *arguments: Any, **more: Any) -> None:
        await super().initiate(*arguments, **more)
        # If the connection began with HTTP/1, Hypercorn takes the preface for a running request.
        await self.send(Updated(idle=self.idle))

    async def handle(self, event: Event) -> None:
        if isinstance(event, RawData):
            for part in _parts(event.data, _FRAMES_BYTES):
                await super().handle(RawData(bytes(part)))
                await anyio.lowlevel.checkpoint()
                # A stream that was reset is not counted any more, although its call has not ended yet.
                await self._calls.until_at_most(self.connection.open_inbound_streams + _MOST_ENDING)
            return
        await super().handle(event)
        if isinstance(event, Closed):
            for stream_id in list(self.stream_buffers):
                await self._discard(stream_id)

    async def stream_send(self, event: StreamEvent) -> None:
        try:
            buffer = self.stream_buffers.get(event.stream_id)
            if isinstance(event, StreamClosed) and isinstance(buffer, PatientBuffer) and not buffer.has_end:
                # The answer failed half-way, and the part that was sent must not look complete.
                await self._reset(event.stream_id, ErrorCodes.INTERNAL_ERROR)
            await super().stream_send(event)
        except ReaderGone:
            await self._reset(event.stream_id, ErrorCodes.CANCEL)
            await super()._close_stream(event.stream_id)
            await self.send(Updated(idle=self.idle))

    async def _handle_events(self, events: list[h2.events.Event]) -> None:
        # One by one, because one read may both open and reset a stream.
        for event in events:
            if isinstance(event, h2.events.StreamReset):
                await self._discard(event.stream_id)
            await super()._handle_events([event])
            if isinstance(event, h2.events.StreamReset):
                await self.send(Updated(idle=self.idle))

    async def _send_data(self, stream_id: int) -> None:
        # If the stream was discarded while a part of it was sent, nothing is left to send or to block.
        with suppress(KeyError, MissingStreamError):
            await super()._send_data(stream_id)

    async def _create_stream(self, request: h2.events.RequestReceived) -> None:
        if all(value.isascii() for name, value in request.headers or () if name in (b":method", b":path")):
            await super()._create_stream(request)
        else:
            self.connection.reset_stream(request.stream_id or 0, ErrorCodes.PROTOCOL_ERROR)

    async def _priority_updated(self, event: h2.events.PriorityUpdated) -> None:
        pass  # RFC 9113 has deprecated priorities, and a client can name any number of streams in them.

    async def _reset(self, stream_id: int, code: ErrorCodes) -> None:
        await self._discard(stream_id)
        with suppress(ProtocolError):
            self.connection.reset_stream(stream_id, code)
            await self._flush()

    async def _discard(self, stream_id: int) -> None:
        """Forgets a stream and wakes whatever waits for its window."""
        if buffer := self.stream_buffers.pop(stream_id, None):
            await buffer.close()
            with suppress(MissingStreamError):
                self.priority.remove_stream(stream_id)
