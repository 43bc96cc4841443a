"""The server's side of one connection: what it accepts, how long it may be silent, and how it ends."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, cast

from grpclib.config import Configuration
from grpclib.protocol import Connection, EventsProcessor, H2Protocol
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import Event
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes

from api.foreign.grpclib.calls import Calls
from api.foreign.grpclib.limits import Limits, Patience, Room
from api.foreign.grpclib.stream import GuardedStream
from api.foreign.h2 import BoundedConnection, ForgetfulConnection
from api.logs import where

if TYPE_CHECKING:
    from api.foreign.grpclib.server import GuardedServer

# Bytes of messages whose prefix has arrived and whose end has not.
_ROOM_BYTES = 8 * 2**20
# Bytes that a peer which does not read can make us hold for sending.
_MOST_UNREAD_BYTES = 512 * 2**10
_CLOSING_S = 1.0

_log = logging.getLogger("perennial.grpc")


class GuardedConnection(Connection):
    """A server's connection: what its streams share."""

    def __init__(self, connection: H2Connection, transport: asyncio.Transport, config: Configuration, limits: Limits):
        super().__init__(connection, transport, config=config)
        self.limits = limits
        self.patience = Patience()
        self.room = Room(_ROOM_BYTES)

    def create_stream(self, *, stream_id: int | None = None, wrapper: Any = None) -> GuardedStream:
        return GuardedStream(self, self._connection, self._transport, stream_id=stream_id, wrapper=wrapper)

    def initialize(self) -> None:
        """Starts no pings: the protocol sends them, which knows when a connection is idle."""

    def flush(self) -> None:
        if not self.is_closing():
            super().flush()

    def ping(self) -> None:
        self._connection.ping(b"perennia")
        self.flush()

    def say_goodbye(self, code: ErrorCodes) -> None:
        """Tells the peer to make no more calls on this connection."""
        try:
            self._connection.close_connection(code)
        except ProtocolError:
            # One of the two sides has said goodbye before.
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


class ChosenProtocol(H2Protocol):
    """grpclib's protocol, of which a subclass can choose the classes that it uses."""

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


class GuardedProtocol(ChosenProtocol, asyncio.BufferedProtocol):
    """A server's side of one connection. Whatever the peer sends, the worst that can happen is that the connection ends."""

    h2_connection = BoundedConnection
    connection: GuardedConnection

    def __init__(self, server: GuardedServer, config: Configuration, h2_config: H2Configuration) -> None:
        self._server = server
        self._loop = asyncio.get_running_loop()
        self.calls = Calls(server.answer, self._became_idle)
        super().__init__(self.calls, config, h2_config)
        self.is_made = False
        self._is_over = False
        self._heard_at = self._idle_since = self._loop.time()
        self._pinged_at = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def idle_since(self) -> float | None:
        """When its last call ended; None while a call runs, before the connection is made, and after it is closed."""
        return None if self.calls.count or not self.is_made or self._is_over else self._idle_since

    def connected(self, h2_connection: H2Connection, transport: asyncio.Transport) -> Connection:
        return GuardedConnection(h2_connection, transport, self.config, self._server.limits)

    def processing(self) -> EventsProcessor:
        self.is_made = True
        self._watch()
        return GuardedProcessor(self.handler, self.connection)

    def get_buffer(self, sizehint: int) -> memoryview:
        # All that one read brings is handled before other tasks run, so a read is kept small.
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
            # h2 has queued a goodbye with the code of the error.
            self.end(f"its frames break the protocol ({type(error).__name__})", None)
        except Exception as error:
            _log.error("a gRPC connection failed and is closed: %s", where(error))
            self.end("", ErrorCodes.INTERNAL_ERROR)

    def _take(self, data: bytes) -> None:
        events = self.connection.feed(data)
        if not self.connection.patience.bears(events):
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
        """Closes the connection, and cancels its calls. Without a `code` the client is not told why."""
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
        """Closes the connection without telling the client."""
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
        """Pings a silent peer; ends the connection if it stays silent, or has had no call for too long.

        Schedules its next run itself.
        """
        if self._is_over:
            return
        limits, now, idle_since = self._server.limits, self._loop.time(), self.idle_since
        # A peer may be silent for half of the time, and has the other half to answer a ping.
        half = limits.reader_timeout_s / 2
        is_pinged = self._pinged_at >= self._heard_at + half
        if is_pinged and now >= self._pinged_at + half:
            self.connection.abort()
            self.end("it answers no ping")
            return
        if idle_since is not None and now >= idle_since + limits.idle_connection_s:
            self.end("it had no call for long")
            return
        if not is_pinged and now >= self._heard_at + half:
            self._pinged_at, is_pinged = now, True
            self.connection.ping()
        due = (self._pinged_at if is_pinged else self._heard_at) + half
        if idle_since is not None:
            due = min(due, idle_since + limits.idle_connection_s)
        self._timer = self._loop.call_later(max(due - now, 0.0), self._watch)
