"""The calls of a connection, and the messages that clients send in them."""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from grpclib import GRPCError, Status
from grpclib.protocol import AbstractHandler
from grpclib.protocol import Stream as H2Stream
from grpclib.server import Stream
from h2.errors import ErrorCodes

from api.foreign.grpclib.limits import Limits, Room
from api.foreign.grpclib.stream import GuardedStream, Headers
from api.logs import where

# h2 allows 100 open streams; besides these, calls whose streams were reset may still be ending.
_MOST_CALLS = 200
# A compressed message of this size unpacks to a MiB at most; longer ones are unpacked in a thread.
_UNPACKED_AT_ONCE_BYTES = 1024

_log = logging.getLogger("perennial.grpc")


class Calls(AbstractHandler):
    """The calls of one connection, each a task."""

    def __init__(
        self, answer: Callable[[GuardedStream, Headers], Coroutine[Any, Any, None]], on_idle: Callable[[], None]
    ) -> None:
        self._answer = answer
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
        task = asyncio.get_running_loop().create_task(self._answer(stream, headers))
        self._tasks[stream] = task
        # A task cancelled before it begins runs none of its code, so the task itself cannot clean up.
        task.add_done_callback(partial(self._on_end, stream, release_stream))

    def _on_end(self, stream: GuardedStream, release_stream: Callable[[], None], task: asyncio.Task[None]) -> None:
        del self._tasks[stream]
        if not self._tasks:
            self._on_idle()
        failure = None if task.cancelled() else task.exception()
        if failure is not None:
            _log.error("a gRPC call failed: %s", where(failure))
        if stream.closable:
            # The client has not closed its side, or has not been sent everything.
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
        """The next message; None at the end of a stream of messages. Raises GRPCError for one that is refused."""
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
            data = await self._unpack(prefix[0], data)
        return self._codec.decode(data, self._recv_type)

    async def _unpack(self, flag: int, data: bytes) -> bytes:
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
        raise GRPCError(Status.INVALID_ARGUMENT, "the message is not gzip") from None
    if len(unpacked) > limits.message_bytes:
        raise _too_long(limits)
    if not unpacker.eof or unpacker.unused_data:
        raise GRPCError(Status.INVALID_ARGUMENT, "the gzip message is cut short")
    return unpacked


def _too_long(limits: Limits) -> GRPCError:
    return GRPCError(
        Status.RESOURCE_EXHAUSTED, f"a message is {limits.message_bytes} bytes at most: append in smaller pieces"
    )
