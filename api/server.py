"""One server: the phase it is in, the runtime that its doors share, and the calls that a drain waits for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from enum import Enum

import trio

from actors import Runtime, open_runtime
from runtime.errors import EngineFailed, NotServing
from runtime.metrics import Metrics
from runtime.settings import Settings

# The longest that running calls are waited for once the server is told to stop.
DRAIN_S = 10.0

Opening = Callable[[Settings, Metrics], AbstractAsyncContextManager[Runtime]]

_log = logging.getLogger("perennial.server")


class Phase(Enum):
    """Where a server is in its life. Only `SERVING` takes calls."""

    LOADING = "loading"
    SERVING = "ok"
    DRAINING = "draining"
    STOPPED = "stopped"


class Server:
    """Settings, metrics and, while it serves, the runtime that `opening` opens. Both doors hold the same one."""

    def __init__(self, settings: Settings, opening: Opening = open_runtime) -> None:
        self.settings = settings
        self._opening = opening
        self.metrics = Metrics()
        self._phase = Phase.LOADING
        self._phase_waiters = trio.lowlevel.ParkingLot()
        self._runtime: Runtime | None = None
        self._calls = 0
        self._drain_waiters = trio.lowlevel.ParkingLot()

    @property
    def phase(self) -> Phase:
        return self._phase

    @property
    def label(self) -> str:
        """The model's name as the HTTP door reports it."""
        return self.settings.model_label or self.settings.model

    async def next_phase(self) -> Phase:
        """Returns once the phase has changed."""
        await self._phase_waiters.park()
        return self._phase

    async def run(self, *, task_status: trio.TaskStatus[Runtime] = trio.TASK_STATUS_IGNORED) -> None:
        """Loads the model and holds its sessions until cancelled. Raises StartError or EngineFailed."""
        try:
            await self._hold(task_status)
        except EngineFailed:
            # Its callers know by now, and the doors have yet to tell their clients.
            await self.drain()
            raise

    async def _hold(self, task_status: trio.TaskStatus[Runtime]) -> None:
        try:
            async with self._opening(self.settings, self.metrics) as runtime:
                self._runtime = runtime
                self._enter(Phase.SERVING)
                task_status.started(runtime)
                await trio.sleep_forever()
        finally:
            self._runtime = None
            self._enter(Phase.STOPPED)

    @contextmanager
    def call(self) -> Iterator[Runtime]:
        """The runtime for one call; a drain waits for the block to end. Raises NotServing."""
        if self._runtime is None or self._phase is not Phase.SERVING:
            raise NotServing(f"the server is {self._phase.value}: try again in a moment")
        self._calls += 1
        try:
            yield self._runtime
        finally:
            self._calls -= 1
            if not self._calls:
                self._drain_waiters.unpark_all()

    async def drain(self) -> None:
        """Refuses new calls and returns when those that run have ended, or after `DRAIN_S`."""
        if self._phase is Phase.SERVING:
            self._enter(Phase.DRAINING)
        _log.info("draining calls=%d", self._calls)
        with trio.move_on_after(DRAIN_S):
            while self._calls:
                await self._drain_waiters.park()

    def _enter(self, phase: Phase) -> None:
        self._phase = phase
        self._phase_waiters.unpark_all()
