"""A stream whose peer must read in time, and whose received data is bounded by its window."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from grpclib import GRPCError, Status
from grpclib.exceptions import StreamTerminatedError
from grpclib.protocol import Buffer, Connection
from grpclib.protocol import Stream as H2Stream
from h2.errors import ErrorCodes

if TYPE_CHECKING:
    from api.foreign.grpclib.connection import GuardedConnection

ENCODINGS = ("identity", "gzip")
_ACCEPTED = ("grpc-accept-encoding", ",".join(ENCODINGS))

_log = logging.getLogger("perennial.grpc")

Headers = list[tuple[str, str]]


class ReceiveBuffer(Buffer):
    """A stream's received data in one piece. The window opens again only while somebody waits for more, which bounds the data."""

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
        """Whether `read(size)` would return at once."""
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
    """A stream whose peer must take each message sent to it within `reader_timeout_s`."""

    buffer: ReceiveBuffer
    connection: GuardedConnection

    def init_stream(self, stream_id: int, connection: Connection) -> None:
        super().init_stream(stream_id, connection)
        self.buffer = ReceiveBuffer(partial(connection.ack, stream_id))

    async def recv_data(self, size: int, timeout_s: float | None = None) -> bytes:
        """The next `size` bytes; fewer if the stream has ended. Raises GRPCError if they take longer than `timeout_s`."""
        if self.buffer.holds(size):
            return await self.buffer.read(size)
        try:
            async with asyncio.timeout(timeout_s):
                return await self.buffer.read(size)
        except TimeoutError:
            raise GRPCError(Status.DEADLINE_EXCEEDED, f"the message took longer than {timeout_s} s to come") from None

    async def send_headers(self, headers: Headers, end_stream: bool = False) -> None:
        """Raises StreamTerminatedError if the peer has left or does not read."""
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
        """Raises StreamTerminatedError if the peer has left or does not read."""
        if self._may_write() and self._window() >= len(data) <= self._h2_connection.max_outbound_frame_size:
            self._write(data, end_stream)
        else:
            async with self._reading():
                await self._send_in_pieces(memoryview(data), end_stream)
        self.connection.patience.message_sent()
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
    """The time within which a stream's peer must read."""

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
