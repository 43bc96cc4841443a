"""What one client may make a server hold and do."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from grpclib import GRPCError, Status
from h2.events import (
    DataReceived,
    Event,
    PingAckReceived,
    PingReceived,
    PriorityUpdated,
    RemoteSettingsChanged,
    SettingsAcknowledged,
    StreamReset,
    UnknownFrameReceived,
    WindowUpdated,
)

# Frames that bring no call on. A peer has a stock of them, which grows again with time and with every message it is sent:
# good clients ping and open windows as they read.
_STOCK = 1000
_STOCK_A_SECOND = 100
_STOCK_A_MESSAGE = 4
_IDLE_TALK = (
    PingAckReceived,
    PingReceived,
    PriorityUpdated,
    RemoteSettingsChanged,
    SettingsAcknowledged,
    StreamReset,
    UnknownFrameReceived,
    WindowUpdated,
)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client may ask for."""

    message_bytes: int
    reader_timeout_s: float
    idle_connection_s: float


class Room:
    """Bytes that may be held at once."""

    def __init__(self, most_bytes: int) -> None:
        self._free_bytes = most_bytes

    @contextmanager
    def held(self, size: int) -> Iterator[None]:
        """Raises GRPCError where there is not so much."""
        if size > self._free_bytes:
            raise GRPCError(Status.RESOURCE_EXHAUSTED, "too many long messages are on their way: send fewer at once")
        self._free_bytes -= size
        try:
            yield
        finally:
            self._free_bytes += size


class Patience:
    """A peer's stock of frames that bring no call on."""

    def __init__(self) -> None:
        self._stock = float(_STOCK)
        self._at = asyncio.get_running_loop().time()

    def message_sent(self) -> None:
        self._earn(_STOCK_A_MESSAGE)

    def bears(self, events: Iterable[Event]) -> bool:
        """Takes what came off the stock; says whether it was enough."""
        now = asyncio.get_running_loop().time()
        self._earn((now - self._at) * _STOCK_A_SECOND)
        self._at = now
        self._stock -= sum(isinstance(event, _IDLE_TALK) or _is_empty(event) for event in events)
        return self._stock >= 0

    def _earn(self, count: float) -> None:
        self._stock = min(_STOCK, self._stock + count)


def _is_empty(event: Event) -> bool:
    return isinstance(event, DataReceived) and not event.data and event.stream_ended is None
