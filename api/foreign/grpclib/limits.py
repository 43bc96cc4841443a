"""Bounds on what one client can make a server hold and do."""

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

# Frames that advance no call. A peer has a budget of them, which refills with time and with every message sent to it, for
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
    """Bounds on what one client may ask for."""

    message_bytes: int
    reader_timeout_s: float
    idle_connection_s: float


class Room:
    """A budget of bytes that may be held at once."""

    def __init__(self, most_bytes: int) -> None:
        self._free_bytes = most_bytes

    @contextmanager
    def held(self, size: int) -> Iterator[None]:
        """Takes `size` bytes while the block runs. Raises GRPCError if fewer are free."""
        if size > self._free_bytes:
            raise GRPCError(Status.RESOURCE_EXHAUSTED, "too many long messages are on their way: send fewer at once")
        self._free_bytes -= size
        try:
            yield
        finally:
            self._free_bytes += size


class Patience:
    """A peer's budget of frames that advance no call."""

    def __init__(self) -> None:
        self._stock = float(_STOCK)
        self._at = asyncio.get_running_loop().time()

    def message_sent(self) -> None:
        self._earn(_STOCK_A_MESSAGE)

    def bears(self, events: Iterable[Event]) -> bool:
        """Takes these events out of the budget; returns whether it was enough."""
        now = asyncio.get_running_loop().time()
        self._earn((now - self._at) * _STOCK_A_SECOND)
        self._at = now
        self._stock -= sum(isinstance(event, _IDLE_TALK) or _is_empty(event) for event in events)
        return self._stock >= 0

    def _earn(self, count: float) -> None:
        self._stock = min(_STOCK, self._stock + count)


def _is_empty(event: Event) -> bool:
    return isinstance(event, DataReceived) and not event.data and event.stream_ended is None
