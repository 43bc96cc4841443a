"""Connections of Hypercorn's trio worker that end, and end alone. Imported for its effect, by what is served with it.

There what fails in one connection goes up to the nursery in which all are, and ends the server. An answer that ends before its
request closes the connection, and where the client breaks off in that moment Hypercorn answers that too, on a stream that is
being closed: it expects any error of a stream but the one that this makes.

A client that does not read holds a send up, which Hypercorn shields from whatever would end it: the server would wait for its
client. A send that is cancelled ends the connection instead.

Where a client has sent a second request, what reads the connection waits for the end of the first answer. A send that fails
ends the answer without telling it, and it would wait for as long as the server lives.

Hypercorn's asyncio worker has none of these faults.
"""

from __future__ import annotations

import logging

import hypercorn.trio.run
import trio
from hypercorn.events import Closed, Event, RawData
from hypercorn.trio.tcp_server import TCPServer

_log = logging.getLogger("perennial.http")


class TcpConnection(TCPServer):
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


hypercorn.trio.run.TCPServer = TcpConnection  # type: ignore[attr-defined] # There is no other place to name one's own.
