"""Accepts connections while there is room for them, and resumes when there is room again."""

from __future__ import annotations

import errno
import logging
import math
import resource
import socket
import time
from collections.abc import Awaitable, Callable

import trio

from actors.nursery import open_nursery

_MOST_CONNECTIONS = 2000
# Share of the descriptors that this process may open: each door takes this many, and some are left for files and processes.
_SHARE_OF_DESCRIPTORS = 3 / 8
OUT_OF_ROOM = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
"""What accept fails with where the process or the machine has no room for a connection."""

# Other parts of the process free descriptors too, and no event tells of it.
_TRY_AGAIN_S = 0.1
_SAID_ONCE_IN_S = 60.0


class Notice:
    """Logs that there is no room, at most once in a while however often `give` is called."""

    def __init__(self, logger: logging.Logger, door: str) -> None:
        self._logger = logger
        self._door = door
        self._said_at = -math.inf

    def give(self, reason: str) -> None:
        now = time.monotonic()
        if now >= self._said_at + _SAID_ONCE_IN_S:
            self._said_at = now
            self._logger.warning(
                "no room for another %s connection (%s): idle ones are closed, new ones wait", self._door, reason
            )


def most_connections() -> int:
    """How many connections a door may hold."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return _MOST_CONNECTIONS
    return max(1, min(_MOST_CONNECTIONS, int(limit * _SHARE_OF_DESCRIPTORS)))


class Accepting:
    """Hands on the connections that a listener accepts. When there is no room, it closes the one that has been idle longest."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._open = 0
        self._left = trio.lowlevel.ParkingLot()
        self._notice = Notice(logging.getLogger("perennial.grpc"), "gRPC")

    def one_has_left(self) -> None:
        """Call this when a connection has ended."""
        self._open -= 1
        self._left.unpark_all()

    async def run(
        self,
        listener: socket.socket,
        attach: Callable[[socket.socket], Awaitable[None]],
        end_idle_one: Callable[[], None],
    ) -> None:
        """Accepts until cancelled. `end_idle_one` closes the connection that has been idle longest, if one is idle."""
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
                    if error.errno in OUT_OF_ROOM:
                        await self._room(end_idle_one, error.strerror or "out of resources")
                    # Any other error means that the client left before it was accepted.
                    continue
                self._open += 1
                nursery.start_soon(_attach_or_close, attach, connected)

    async def _room(self, end_idle_one: Callable[[], None], reason: str) -> None:
        """Returns when there may be room."""
        self._notice.give(reason)
        end_idle_one()
        with trio.move_on_after(_TRY_AGAIN_S):
            await self._left.park()


async def _attach_or_close(attach: Callable[[socket.socket], Awaitable[None]], connected: socket.socket) -> None:
    try:
        await attach(connected)
    except BaseException:
        connected.close()
        raise
