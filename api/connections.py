"""Connections of Hypercorn's workers that end, and end alone. Imported for its effect, by what is served with them.

A client that does not read holds up what is sent to it. Under trio Hypercorn shields a send from whatever would end it, under
asyncio a close waits for what was sent: the server would wait for its client. Here the connection is cut when its task is
cancelled.

Under trio what fails in one connection goes up to the nursery in which all are, and ends the server. An answer that ends before
its request closes the connection, and where the client breaks off in that moment Hypercorn answers that too, on a stream that
is being closed: it expects any error of a stream but the one that this makes.

Where a client has sent a second request, what reads the connection waits for the end of the first answer. A send that fails
ends the answer without telling it, and it would wait for as long as the server lives.
"""

from __future__ import annotations

import asyncio
import logging

import hypercorn.asyncio.run
import hypercorn.trio.run
import trio
from hypercorn.asyncio.tcp_server import TCPServer as AsyncioTCPServer
from hypercorn.events import Closed, Event, RawData
from hypercorn.trio.tcp_server import TCPServer

_log = logging.getLogger("perennial.http")


class TrioConnection(TCPServer):
    async def run(self) -> None:
        try:
            with trio.CancelScope() as self._scope:
                await super().run()
        except* Exception as errors:
            _log.error("connection failed", exc_info=errors)

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
    async def _close(self) -> None:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            self.writer.transport.abort()
        await super()._close()


# There is no other place to name one's own.
hypercorn.trio.run.TCPServer = TrioConnection  # type: ignore[attr-defined]
hypercorn.asyncio.run.TCPServer = AsyncioConnection  # type: ignore[attr-defined]
