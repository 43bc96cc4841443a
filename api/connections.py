"""Connections of Hypercorn's workers that end, and end alone. Imported for its effect, by what is served with them.

A client that does not read holds up what is sent to it. Under trio Hypercorn shields a send from whatever would end it, under
asyncio a close waits for what was sent: the server would wait for its client. Here the connection is cut when its task is
cancelled.

Under trio what fails in one connection goes up to the nursery in which all are, and ends the server. An answer that ends before
its request closes the connection, and where the client breaks off in that moment Hypercorn answers that too, on a stream that
is being closed: it expects any error of a stream but the one that this makes.

Where a client has sent a second request, Hypercorn reads nothing more before the end of the first answer: that the client has
left would be seen no sooner, and after a send that failed, never. Here a task of its own reads ahead of what is handled. It
stops at `READ_AHEAD` parts, and a client that has sent more than that and left is noticed when its first answer ends.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from math import inf

import hypercorn.asyncio.run
import hypercorn.trio.run
import trio
from hypercorn.asyncio.tcp_server import TCPServer as AsyncioTCPServer
from hypercorn.events import Closed, Event, RawData
from hypercorn.trio.tcp_server import MAX_RECV, TCPServer

READ_AHEAD = 16
"""Parts of at most 64 KiB that a connection holds of what its client sends while something else is handled."""

_log = logging.getLogger("perennial.http")


class TrioConnection(TCPServer):
    async def run(self) -> None:
        try:
            with trio.CancelScope() as self._scope:
                await super().run()
        except* Exception as errors:
            _log.error("connection failed", exc_info=errors)

    async def _read_data(self) -> None:
        ahead, received = trio.open_memory_channel[bytes](READ_AHEAD)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._handle_each, received)
            with suppress(trio.ClosedResourceError, trio.BrokenResourceError, trio.TooSlowError):
                while data := await self._received():
                    await ahead.send(data)
            nursery.cancel_scope.cancel()
        await self.protocol.handle(Closed())

    async def _handle_each(self, received: trio.MemoryReceiveChannel[bytes]) -> None:
        async for data in received:
            await self.protocol.handle(RawData(data))

    async def _received(self) -> bytes:
        with trio.fail_after(self.config.read_timeout or inf):
            return bytes(await self.stream.receive_some(MAX_RECV))

    async def protocol_send(self, event: Event) -> None:
        if not isinstance(event, RawData):
            await super().protocol_send(event)
            return
        async with self.send_lock:
            try:
                await self.stream.send_all(event.data)
            except (trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError):
                await self.protocol.handle(Closed())
                self._scope.cancel()
            except trio.Cancelled:
                # A part of an answer would pass for the beginning of another.
                self._scope.cancel()
                raise


class AsyncioConnection(AsyncioTCPServer):
    async def _read_data(self) -> None:
        received = asyncio.Queue[bytes](READ_AHEAD)
        async with asyncio.TaskGroup() as tasks:
            handling = tasks.create_task(self._handle_each(received))
            with suppress(OSError):
                while data := await asyncio.wait_for(self.reader.read(MAX_RECV), self.config.read_timeout):
                    await received.put(data)
            handling.cancel()
        await self.protocol.handle(Closed())

    async def _handle_each(self, received: asyncio.Queue[bytes]) -> None:
        while True:
            await self.protocol.handle(RawData(await received.get()))

    async def _close(self) -> None:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            self.writer.transport.abort()
        await super()._close()


# There is no other place to name one's own.
hypercorn.trio.run.TCPServer = TrioConnection  # type: ignore[attr-defined]
hypercorn.asyncio.run.TCPServer = AsyncioConnection  # type: ignore[attr-defined]
