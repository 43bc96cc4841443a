"""Answers as server-sent events, with events that keep the connection alive while nothing is generated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable
from typing import Self

import trio
from quart.wrappers.response import ResponseBody

# Clients give up on a stream that is silent for minutes. This is shorter than the shortest timeout seen in agents.
KEEPALIVE_S = 10.0


class EventStream(ResponseBody, ABC):
    """The body of a response: events as they come. An event that reports a failure is the last."""

    def __init__(self, events: Iterable[bytes] = ()) -> None:
        self._ready = deque(events)
        self._is_closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        while not self._ready:
            if self._is_closed:
                raise StopAsyncIteration
            self._ready += await self._next()
        return self._ready.popleft()

    async def _next(self) -> list[bytes]:
        try:
            with trio.move_on_after(KEEPALIVE_S):
                return await self.next_events()
        except Exception as error:
            self.close()
            return self.failure(error)
        return self.silence()

    def close(self) -> None:
        """Ends the stream after the events that are ready."""
        self._is_closed = True

    @abstractmethod
    async def next_events(self) -> list[bytes]:
        """Waits for the next events."""

    @abstractmethod
    def silence(self) -> list[bytes]:
        """What is sent when nothing has come for a while."""

    @abstractmethod
    def failure(self, error: Exception) -> list[bytes]:
        """The events that report a failure."""


def data_event(data: str) -> bytes:
    return f"data: {data}\n\n".encode()


def named_event(name: str, data: str) -> bytes:
    return f"event: {name}\ndata: {data}\n\n".encode()
