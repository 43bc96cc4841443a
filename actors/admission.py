"""Admission: how many HTTP completions run at once, and who waits."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from runtime.errors import Saturated
from runtime.metrics import Metrics
from runtime.settings import Settings


class Admission:
    """Permits for completions. Waiters are served in the order in which they came; one that leaves is gone at once."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._permits = trio.Semaphore(settings.max_concurrent, max_value=settings.max_concurrent)
        is_queue = settings.admission_policy == "queue"
        self._longest_wait_s = (settings.queue_max_wait_s or math.inf) if is_queue else 0.0
        self._results = metrics.admission_total
        metrics.admission_pending.set_function(lambda: self._permits.statistics().tasks_waiting)

    @asynccontextmanager
    async def permit(self) -> AsyncIterator[None]:
        """The right to run one completion, for as long as the block lasts. Raises Saturated."""
        await self._acquire()
        self._results.labels("admitted").inc()
        try:
            yield
        finally:
            self._permits.release()

    async def _acquire(self) -> None:
        try:
            self._permits.acquire_nowait()
            return
        except trio.WouldBlock:
            pass
        if not self._longest_wait_s:
            self._results.labels("rejected").inc()
            raise Saturated("all permits for completions are taken: try again later, or raise max_concurrent")
        with trio.move_on_after(self._longest_wait_s) as patience:
            await self._permits.acquire()
        if patience.cancelled_caught:
            self._results.labels("timed_out").inc()
            raise Saturated(f"no permit within {self._longest_wait_s:g} s: try again later, or raise max_concurrent")
