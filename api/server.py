"""One server: the phase it is in, the runtime that its doors share, and the calls that a drain waits for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager, nullcontext
from enum import Enum

import trio

from actors import Runtime, open_runtime
from actors.nursery import open_nursery
from api.reader import Reader, open_reader, process_ahead
from api.reading import Terms
from runtime.checks import MAX_APPEND_TOKENS
from runtime.errors import EngineFailed, NotServing
from runtime.garbage import frozen
from runtime.metrics import Metrics
from runtime.settings import Settings

# How long a drain waits for running calls, in seconds.
DRAIN_S = 10.0
# How long the clients of calls that were ended may take to read the error, in seconds.
LAST_WORDS_S = 1.0

Opening = Callable[[Settings, Metrics], AbstractAsyncContextManager[Runtime]]

_log = logging.getLogger("perennial.server")


class Phase(Enum):
    """The phases of a server's life. Calls are accepted only while SERVING."""

    LOADING = "loading"
    SERVING = "ok"
    DRAINING = "draining"
    STOPPED = "stopped"


class Server:
    """Settings, metrics and, while it serves, the runtime that `opening` opens. Both doors share one Server."""

    def __init__(self, settings: Settings, opening: Opening = open_runtime, *, is_warmed: bool = True) -> None:
        """Unless `is_warmed`, the process that reads requests starts with the first request, which then takes longer."""
        self.settings = settings
        self._is_warmed = is_warmed
        self._opening = opening
        self.metrics = Metrics()
        self._phase = Phase.LOADING
        self._phase_waiters = trio.lowlevel.ParkingLot()
        self._runtime: Runtime | None = None
        self._reader: Reader | None = None
        self._calls = 0
        self._drain_waiters = trio.lowlevel.ParkingLot()
        self._of_host, self._others = _Endable(), _Endable()
        self._patience = trio.CancelScope()

    @property
    def phase(self) -> Phase:
        return self._phase

    @property
    def label(self) -> str:
        """The model's name as the HTTP door reports it."""
        return self.settings.model_label or self.settings.model

    @property
    def reader(self) -> Reader:
        """The reader of requests. Use it only within a `call` block."""
        assert self._reader is not None, "nothing is read but in a call"
        return self._reader

    @property
    def load(self) -> float:
        """Calls as a share of `capacity`, or completions that run and wait of `max_concurrent`, whichever is more; 0 while
        nothing is served.
        """
        if self._runtime is None:
            return 0.0
        now = self._runtime.load()
        completions = now.completions_running + now.completions_waiting
        # Each bound by itself has clients refused: free slabs for completions are of no use to a session.
        return max(self._calls / self.settings.capacity, completions / self.settings.max_concurrent)

    async def next_phase(self) -> Phase:
        """Returns once the phase has changed."""
        await self._phase_waiters.park()
        return self._phase

    async def run(self, *, task_status: trio.TaskStatus[Runtime] = trio.TASK_STATUS_IGNORED) -> None:
        """Loads the model and holds its sessions until cancelled. Raises StartError or EngineFailed."""
        try:
            await self._hold(task_status)
        except EngineFailed:
            # The callers know of the failure; give the doors time to tell their clients.
            await self.drain()
            raise

    async def _hold(self, task_status: trio.TaskStatus[Runtime]) -> None:
        try:
            async with (
                process_ahead() if self._is_warmed else nullcontext() as ahead,
                self._opening(self.settings, self.metrics) as runtime,
                self._reading(runtime, ahead) as reader,
            ):
                if self._is_warmed:
                    # The first request would wait for both, some seconds on a busy machine: do them before anybody is served.
                    async with open_nursery() as nursery:
                        nursery.start_soon(reader.warm)
                        nursery.start_soon(trio.to_thread.run_sync, runtime.text.warm)
                with frozen():
                    self._runtime, self._reader = runtime, reader
                    self._enter(Phase.SERVING)
                    task_status.started(runtime)
                    await trio.sleep_forever()
        finally:
            self._runtime = self._reader = None
            self._enter(Phase.STOPPED)

    def _reading(self, runtime: Runtime, ahead: trio.Process | None) -> AbstractAsyncContextManager[Reader]:
        settings = self.settings
        visible = runtime.shape.visible
        most = visible if settings.http_overflow == "error" else MAX_APPEND_TOKENS
        return open_reader(runtime.text, Terms(self.label, most), settings.request_timeout_s, ahead)

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

    def may_be_ended(self, *, by_host: bool = True) -> AbstractContextManager[None]:
        """A part of a call that ends when the server stops; `by_host`, already when a host server closes its connections.

        Raises NotServing if it was ended.
        """
        return (self._of_host if by_host else self._others).part()

    def begin_drain(self) -> None:
        """Refuses new calls."""
        if self._phase is Phase.SERVING:
            self._enter(Phase.DRAINING)

    def end_calls_of_host(self) -> None:
        """Ends the parts of running calls that end when a host server closes its connections."""
        self._of_host.end()

    def end_calls(self) -> None:
        """Ends the parts of running calls that may be ended."""
        self._of_host.end()
        self._others.end()

    async def drain(self) -> None:
        """Refuses new calls; returns when the running ones have ended, by themselves or after `DRAIN_S`."""
        self.begin_drain()
        _log.info("draining calls=%d", self._calls)
        self._patience.deadline = trio.current_time() + DRAIN_S
        with self._patience:
            await self._until_idle()
        self.end_calls()
        with trio.move_on_after(LAST_WORDS_S):
            await self._until_idle()

    def stop_waiting(self) -> None:
        """Cuts the drain short: ends the running calls now."""
        self._patience.cancel()

    async def _until_idle(self) -> None:
        while self._calls:
            await self._drain_waiters.park()

    def _enter(self, phase: Phase) -> None:
        self._phase = phase
        self._phase_waiters.unpark_all()


class _Endable:
    """Parts of calls that can be ended together."""

    def __init__(self) -> None:
        self._scopes: set[trio.CancelScope] = set()
        self._is_ended = False

    @contextmanager
    def part(self) -> Iterator[None]:
        """Runs the block. Raises NotServing if it was ended."""
        with trio.CancelScope() as scope:
            self._scopes.add(scope)
            try:
                if self._is_ended:
                    scope.cancel()
                yield
            finally:
                self._scopes.discard(scope)
        if scope.cancelled_caught:
            raise NotServing("the server is stopping: try again in a moment")

    def end(self) -> None:
        self._is_ended = True
        for scope in self._scopes:
            scope.cancel()
