"""Admission: how many HTTP completions run at once, and who waits."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager

import trio

from runtime.errors import InvalidRequest, Saturated
from runtime.metrics import Metrics
from runtime.settings import Settings


class Admission:
    """Permits for completions. Waiters are served in order of arrival; one that leaves gives up its place at once."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._permits = trio.Semaphore(settings.max_concurrent, max_value=settings.max_concurrent)
        # The first waiter gets all of its permits before the second gets any, so requests for several are served too.
        self._line = trio.StrictFIFOLock()
        is_queue = settings.admission_policy == "queue"
        self._longest_wait_s = (settings.queue_max_wait_s or math.inf) if is_queue else 0.0
        self._results = metrics.admission_total
        metrics.admission_pending.set_function(lambda: self.waiting)

    @property
    def running(self) -> int:
        """Permits that are taken."""
        return (self._permits.max_value or 0) - self._permits.value

    @property
    def waiting(self) -> int:
        """Completions that wait for permits."""
        return self._permits.statistics().tasks_waiting + self._line.statistics().tasks_waiting

    @asynccontextmanager
    async def permits(self, count: int = 1) -> AsyncIterator[None]:
        """The right to run `count` completions while the block runs.

        Raises Saturated, or InvalidRequest if the server has fewer permits than that.
        """
        if count > (most := self._permits.max_value or 0):
            raise InvalidRequest(f"n is {count} and this server runs {most} completions at once: ask for fewer", "n")
        with ExitStack() as held:
            await self._acquire(count, held)
            self._results.labels("admitted").inc()
            yield

    async def _acquire(self, count: int, held: ExitStack) -> None:
        if self._permits.value >= count and not self._line.locked():
            for _ in range(count):
                self._permits.acquire_nowait()
                held.callback(self._permits.release)
            return
        if not self._longest_wait_s:
            self._results.labels("rejected").inc()
            raise Saturated("too few permits for completions are free: try again later, or raise max_concurrent")
        with trio.move_on_after(self._longest_wait_s) as patience:
            async with self._line:
                for _ in range(count):
                    await self._permits.acquire()
                    held.callback(self._permits.release)
        if patience.cancelled_caught:
            self._results.labels("timed_out").inc()
            raise Saturated(f"no permit within {self._longest_wait_s:g} s: try again later, or raise max_concurrent")
