"""Connections of Hypercorn's trio worker that cannot end the server. Imported for its effect, by whatever is served with it.

An answer that ends before its request closes the connection, and where the client breaks off in that moment Hypercorn answers
that too, on a stream that is being closed. It expects any error of a stream but the one that this makes, which goes up to the
nursery in which all connections are. Under asyncio a connection's error is its own.
"""

from __future__ import annotations

import hypercorn.trio.run
import trio
from hypercorn.events import Closed, Event
from hypercorn.trio.tcp_server import TCPServer


class TcpConnection(TCPServer):
    async def protocol_send(self, event: Event) -> None:
        try:
            await super().protocol_send(event)
        except trio.BusyResourceError:
            # Sends take turns, so it is the close that is under way: as when the client has left.
            await self.protocol.handle(Closed())


hypercorn.trio.run.TCPServer = TcpConnection  # type: ignore[attr-defined] # There is no other place to name one's own.
