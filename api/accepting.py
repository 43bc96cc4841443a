"""Accepts connections as long as there is room for them, and goes on when there is room again."""

from __future__ import annotations

import errno
import logging
import math
import resource
import socket
from collections.abc import Awaitable, Callable

import trio

from actors.nursery import open_nursery

# Of descriptors the process has a limit, which the other door and the files need too.
_MOST_CONNECTIONS = 2000
_OUT_OF_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
# Descriptors are freed by others too, without a word.
_TRY_AGAIN_S = 0.1
_SAID_ONCE_IN_S = 60.0

_log = logging.getLogger("perennial.grpc")


def most_connections() -> int:
    """How many connections a door may hold: at most half of the descriptors that this process may open."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return _MOST_CONNECTIONS
    return max(1, min(_MOST_CONNECTIONS, limit // 2))


class Accepting:
    """Hands on what a listener accepts. Where there is no room, the connection that is needed least is closed for it."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._open = 0
        self._left = trio.lowlevel.ParkingLot()
        self._said_at = -math.inf

    def one_has_left(self) -> None:
        """To be called when a connection has ended."""
        self._open -= 1
        self._left.unpark_all()

    async def run(
        self,
        listener: socket.socket,
        attach: Callable[[socket.socket], Awaitable[None]],
        end_idle_one: Callable[[], None],
    ) -> None:
        """Accepts until cancelled. `end_idle_one` closes the connection that is needed least, if there is one."""
        listener.setblocking(False)
        async with open_nursery() as nursery:
            while True:
                await trio.lowlevel.wait_readable(listener)
                if self._open >= self._most:
                    await self._room(end_idle_one, f"{self._most} are open")
                    continue
                try:
                    connected, _ = listener.accept()
                except OSError as error:
                    if error.errno in _OUT_OF_ROOM:
                        await self._room(end_idle_one, error.strerror or "out of resources")
                    # Any other error is of a client that left before it was accepted.
                    continue
                self._open += 1
                nursery.start_soon(_attached, attach, connected)

    async def _room(self, end_idle_one: Callable[[], None], reason: str) -> None:
        """Returns when there may be room."""
        now = trio.current_time()
        if now >= self._said_at + _SAID_ONCE_IN_S:
            self._said_at = now
            _log.warning("no room for another gRPC connection (%s): idle ones are closed, new ones wait", reason)
        end_idle_one()
        with trio.move_on_after(_TRY_AGAIN_S):
            await self._left.park()


async def _attached(attach: Callable[[socket.socket], Awaitable[None]], connected: socket.socket) -> None:
    try:
        await attach(connected)
    except BaseException:
        connected.close()
        raise
