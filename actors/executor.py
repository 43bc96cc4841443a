"""The model executor: one engine, one thread, and the choice of what runs in the next forward."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Self, cast

import outcome
import trio

from actors.alarm import Alarm
from actors.engine_thread import EngineThread
from actors.leases import Leases
from actors.mailbox import ActorFailed, ActorStopped
from actors.messages import Forward, Ran
from actors.pace import Pace
from runtime.engine import Engine
from runtime.errors import EngineFailed
from runtime.events import Token
from runtime.metrics import Metrics
from runtime.rows import Row, RowBatch

# However many streams run, a quarter of a forward is left for prompts, one row at least and at most this many.
_ROWS_KEPT_FREE = 8


class Asker:
    """A task that waits for rows to run."""

    def __init__(self, forward: Forward, lease: Lease) -> None:
        self.forward = forward
        self.lease = lease
        self._task = trio.lowlevel.current_task()
        self._has_begun = False

    def begin(self) -> None:
        """From now on the asker must stay until its rows have run, for they write into its slab."""
        self._has_begun = True

    async def wait(self, leave: Callable[[Asker], None]) -> Ran:
        """The result passed to `tell`. If cancelled before its rows have begun, it calls `leave` and ends at once."""

        def abort(_: object) -> trio.lowlevel.Abort:
            if self._has_begun:
                # Its rows are written, so the asker must learn the result; its next checkpoint raises Cancelled again.
                return trio.lowlevel.Abort.FAILED
            leave(self)
            return trio.lowlevel.Abort.SUCCEEDED

        return cast(Ran, await trio.lowlevel.wait_task_rescheduled(abort))

    def tell(self, result: outcome.Maybe[Ran]) -> None:
        trio.lowlevel.reschedule(self._task, result)


class ModelExecutor:
    """Batches the rows that sessions ask for: decode rows first, then prefill rows in turn.

    A forward begins as soon as the last session that it waits for has asked. The tokens of the forward before are written to
    sockets while the engine works on this one.
    """

    def __init__(self, engine: Engine, thread: EngineThread, metrics: Metrics) -> None:
        self._engine = engine
        self._thread = thread
        self._metrics = metrics
        self._waiting: list[Asker] = []
        self._running: list[tuple[Asker, tuple[Row, ...]]] = []
        self._leases = Leases()
        self._alarm = Alarm()
        self._pace = Pace()
        self._is_open = True
        self._is_quiet = trio.Event()
        self._error: BaseException | None = None

    async def run(self) -> None:
        """Runs forwards until cancelled. Raises EngineFailed, after every waiting asker has been told."""
        try:
            while self._error is None:
                await self._alarm.wait()
                self._begin()
        finally:
            await self._close()

    def lease(self) -> Lease:
        """A lease for one session, or another asker, that asks for rows again and again."""
        return Lease(self, self._leases, self._consider)

    async def ask(self, forward: Forward, lease: Lease) -> Ran:
        """Runs these rows. Raises ActorStopped if none of them ran, and ActorFailed if their forward failed.

        A caller cancelled before they begin leaves at once; one cancelled later leaves when they have run.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if not self._is_open:
            raise ActorStopped
        asker = Asker(forward, lease)
        self._waiting.append(asker)
        is_new = not self._leases.arrive(lease, trio.current_time())
        self._consider(is_new=is_new)
        return await asker.wait(leave=self._forget)

    def _forget(self, asker: Asker) -> None:
        self._waiting.remove(asker)

    def runs_for(self, lease: Lease) -> bool:
        """Whether rows asked for under this lease are in the forward that is running."""
        return any(asker.lease is lease for asker, _ in self._running)

    def _consider(self, *, is_new: bool = False) -> None:
        """Begins a forward now, or sets the alarm if a holder of a lease is due: the forward then waits for it a while.

        If the asker `is_new`, others may be about to ask too, and the forward begins after their tasks have run.
        """
        if self._running or not self._waiting:
            return
        if self._leases.is_anyone_due:
            if not self._alarm.is_set:
                self._alarm.set(self._leases.patience_s)
        elif is_new:
            self._alarm.set(0)
        else:
            self._begin()

    def _begin(self) -> None:
        """Begins a forward with the rows that wait, unless there are none or a forward is running."""
        if self._running or not self._waiting or not self._is_open:
            return
        if self._alarm.is_set:
            self._alarm.clear()
        self._leases.give_up()
        self._running = self._choose()
        batch = RowBatch(tuple(row for _, rows in self._running for row in rows))
        self._thread.begin(partial(self._end, time.perf_counter()), self._engine.forward, batch)

    def _choose(self) -> list[tuple[Asker, tuple[Row, ...]]]:
        """Picks the rows of the next forward and removes their askers from those that wait."""
        decodes = [asker for asker in self._waiting if not asker.forward.is_prefill]
        prefills = [asker for asker in self._waiting if asker.forward.is_prefill]
        facts = self._engine.facts
        tile = facts.row_tile
        kept_free = min(max(1, tile // 4), _ROWS_KEPT_FREE) if prefills else 0
        chosen: list[tuple[Asker, tuple[Row, ...]]] = []
        left: list[Asker] = []
        used = 0

        def take(askers: list[Asker], limit: int) -> None:
            nonlocal used
            for asker in askers:
                if used >= limit:
                    left.append(asker)
                else:
                    asker.begin()
                    rows = asker.forward.rows[: limit - used]
                    chosen.append((asker, rows))
                    used += len(rows)

        if tile == 1:
            # Streams and prompts take turns, in the order in which they asked.
            take(self._waiting, 1)
            self._waiting = left
            return chosen
        take(decodes, tile - kept_free)
        # A whole tile of prompt rows would hold up every stream beside it.
        take(prefills, self._pace.rows_beside(used, facts.row_step, tile) if used else tile)
        self._waiting = left
        return chosen

    def _end(self, began_at: float, ended: outcome.Maybe[tuple[Token, ...]]) -> None:
        """Tells the askers whose rows ran. Trio calls this outside any task, so an error is stored and `run` raises it."""
        try:
            results = self._results(ended, time.perf_counter() - began_at)
        except BaseException as error:
            self._error = error
            self._alarm.go_off()
        else:
            ran, self._running = self._running, []
            now = trio.current_time()
            for (asker, _), result in zip(ran, results, strict=True):
                self._leases.expect(asker.lease, now)
                asker.tell(outcome.Value(result))
            self._consider()
        if not self._is_open:
            self._is_quiet.set()

    def _results(self, ended: outcome.Maybe[tuple[Token, ...]], seconds: float) -> list[Ran]:
        """The result for each asker whose rows ran, in the order in which they run; the forward took `seconds`.

        Raises EngineFailed.
        """
        try:
            tokens = ended.unwrap()
        except Exception as error:
            raise EngineFailed(f"the engine failed: {error}") from error
        rows = [row for _, each in self._running for row in each]
        wanted = sum(row.draw is not None for row in rows)
        if len(tokens) != wanted:
            raise EngineFailed(f"the engine failed: {len(tokens)} tokens drawn where {wanted} were asked for")
        prefill_rows = sum(len(each) for asker, each in self._running if asker.forward.is_prefill)
        self._pace.record(len(rows) - prefill_rows, prefill_rows, seconds)
        self._leases.measure(seconds)
        self._metrics.forward_duration_seconds.observe(seconds)
        self._metrics.forward_rows.observe(len(rows))
        drawn = iter(tokens)
        return [Ran(len(each), tuple(next(drawn) for row in each if row.draw is not None)) for _, each in self._running]

    async def _close(self) -> None:
        self._is_open = False
        if self._running and self._error is None:
            with trio.CancelScope(shield=True):
                await self._is_quiet.wait()
        # Whoever still knows this executor must not keep a model in memory: gauges of metrics, or a closed runtime.
        del self._engine
        # Told in the same step in which `run` raises, so that no session reports the failure before the tree begins to end.
        for asker, _ in self._running:
            asker.tell(outcome.Error(ActorFailed()))
        for asker in self._waiting:
            asker.tell(outcome.Error(ActorStopped()))
        if self._error is not None:
            raise self._error


class Lease:
    """Held, as a context, by an asker that comes back with its next rows after each result: forwards wait a while for it.

    An asker may also ask without holding its lease; then no forward waits for it.
    """

    def __init__(self, executor: ModelExecutor, leases: Leases, consider: Callable[[], None]) -> None:
        self._executor = executor
        self._leases = leases
        self._consider = consider

    def __enter__(self) -> Self:
        self._leases.begin(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leases.end(self)
        self._consider()

    @contextmanager
    def held_up(self) -> Iterator[None]:
        """While the block runs its holder is held up by somebody else, such as a slow reader, and no forward waits for it."""
        self._leases.excuse(self)
        self._consider()
        try:
            yield
        finally:
            self._leases.expect(self, trio.current_time())

    @property
    def is_running(self) -> bool:
        """Whether its rows are in the forward that is running."""
        return self._executor.runs_for(self)

    async def ask(self, forward: Forward) -> Ran:
        """As `ModelExecutor.ask`."""
        return await self._executor.ask(forward, self)
