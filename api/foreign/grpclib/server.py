"""A server that is given accepted connections, and answers each call in a way that no client can break."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Collection
from socket import socket
from ssl import SSLContext
from typing import TYPE_CHECKING

from grpclib import GRPCError, Status
from grpclib.config import Configuration
from grpclib.const import Handler
from grpclib.encoding.base import CodecBase
from grpclib.exceptions import StreamTerminatedError
from grpclib.metadata import Deadline, decode_metadata
from grpclib.server import Server
from h2.exceptions import ProtocolError

from api.foreign.grpclib.calls import Call
from api.foreign.grpclib.connection import GuardedProtocol
from api.foreign.grpclib.limits import Limits, Room
from api.foreign.grpclib.stream import ENCODINGS, GuardedStream, Headers
from api.logs import where

if TYPE_CHECKING:
    from grpclib._typing import IServable

_STREAM_WINDOW_BYTES = 256 * 2**10
_CONNECTION_WINDOW_BYTES = 2**20
_ROOM_BYTES = 256 * 2**20
_READ_AT_ONCE_BYTES = 4 * 2**10
_HANDSHAKE_S = 20.0
_SHUTDOWN_S = 1.0
_TIMEOUT = re.compile(r"[0-9]{1,8}[HMSmun]")
_OURS = "a fault of the server ended this call: its log says more"

_log = logging.getLogger("perennial.grpc")


class GuardedServer(Server):
    """A server that is given accepted connections by `attach`, and closes them when it is closed."""

    def __init__(
        self, services: Collection[IServable], *, codec: CodecBase, limits: Limits, on_leaving: Callable[[], None]
    ) -> None:
        """`on_leaving` is called when a connection has ended."""
        windows = Configuration(
            http2_connection_window_size=_CONNECTION_WINDOW_BYTES, http2_stream_window_size=_STREAM_WINDOW_BYTES
        )
        super().__init__(services, codec=codec, config=windows)
        # In latin-1 every byte is a character, so a header that is not ASCII costs only its own call.
        self._h2_config.header_encoding = "latin-1"
        self.limits = limits
        self.reading = memoryview(bytearray(_READ_AT_ONCE_BYTES))
        self._on_leaving = on_leaving
        self._room = Room(_ROOM_BYTES)
        self._connections: dict[GuardedProtocol, None] = {}

    async def attach(self, connected: socket, tls: SSLContext | None) -> None:
        """Serves this connection from now on; returns once it is set up. If that fails, the connection is closed."""
        protocol = GuardedProtocol(self, self._config, self._h2_config)
        self._connections[protocol] = None
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: protocol,
                connected,
                ssl=tls,
                ssl_handshake_timeout=_HANDSHAKE_S if tls else None,
                ssl_shutdown_timeout=_SHUTDOWN_S if tls else None,
            )
        except BaseException as error:
            self.forget(protocol)
            if not isinstance(error, Exception):
                raise
            _log.info("a gRPC connection could not be set up: %s", where(error))

    def forget(self, protocol: GuardedProtocol) -> None:
        """Removes a connection that has ended."""
        if protocol in self._connections:
            del self._connections[protocol]
            self._on_leaving()

    def end_idle_one(self) -> None:
        """Closes the connection that has been without a call for longest, if there is one."""
        idle = [
            (one.idle_since, index, one) for index, one in enumerate(self._connections) if one.idle_since is not None
        ]
        if idle:
            min(idle)[-1].end("others wait for its place")

    async def answer(self, stream: GuardedStream, headers: Headers) -> None:
        """Answers one call, valid or not."""
        try:
            if (found := await self._admit(stream, headers)) is not None:
                await self._run(stream, *found)
        except StreamTerminatedError:
            # The client has left or does not read, so nobody can be told.
            pass
        except ProtocolError:
            if stream.closable:
                raise

    async def _admit(self, stream: GuardedStream, headers: Headers) -> tuple[Headers, str, Handler] | None:
        """The path and handler of a call that can be answered. Any other call is refused."""
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
        elif found.get("grpc-encoding", "identity") not in ENCODINGS:
            await _refuse(stream, 200, Status.UNIMPLEMENTED, "grpc-encoding must be identity or gzip")
        elif not _TIMEOUT.fullmatch(found.get("grpc-timeout", "1S")):
            await _refuse(stream, 200, Status.INVALID_ARGUMENT, "grpc-timeout is up to 8 digits and a unit")
        else:
            return headers, path, handler
        return None

    async def _run(self, stream: GuardedStream, headers: Headers, path: str, handler: Handler) -> None:
        try:
            metadata, deadline = decode_metadata(headers), Deadline.from_headers(headers)
        except (ValueError, OverflowError):
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
        """Says goodbye to every client, and cancels the calls."""
        for protocol in list(self._connections):
            protocol.end("")

    async def wait_closed(self) -> None:
        """Returns once every call and connection has ended. Clients that do not read are not waited for."""
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
