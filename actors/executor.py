"""The model executor: one engine, one thread, and the choice of what runs in the next forward."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import ParamSpec, TypeVar

import trio

from actors.mailbox import Envelope, Inbox
from actors.messages import Forward, Ran
from actors.pace import Pace
from runtime.engine import Engine
from runtime.errors import EngineFailed
from runtime.metrics import Metrics
from runtime.rows import Row, RowBatch

P = ParamSpec("P")
T = TypeVar("T")

# Scheduler passes in which sessions that were just answered come back with their next row, so that sessions once in
# one forward stay in one forward: take the reply, hand the token on, ask again.
_PASSES_TO_COME_BACK = 3

# However many streams run, so many rows go to those that wait for their first token.
_ROWS_KEPT_FREE = 8


async def settled(future: Future[T]) -> T:
    """The result of a future that another thread settles, or its error raised."""
    done = trio.Event()
    token = trio.lowlevel.current_trio_token()

    def wake(_: Future[T]) -> None:
        with suppress(trio.RunFinishedError):  # Then nobody is left to be woken.
            token.run_sync_soon(done.set)

    future.add_done_callback(wake)
    await done.wait()
    return future.result()


class EngineThread:
    """The one thread that loads and runs an engine: some backends bind their state to a thread."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The function's result. It cannot be stopped, so a cancelled caller waits for its end."""
        future = self._pool.submit(function, *args, **kwargs)
        with trio.CancelScope(shield=True):
            await settled(future)
        return future.result()


class ModelExecutor:
    """Batches what sessions ask for: decode rows first, then prefill rows in turn."""

    def __init__(self, engine: Engine, thread: EngineThread, inbox: Inbox, metrics: Metrics) -> None:
        self._engine = engine
        self._thread = thread
        self._inbox = inbox
        self._metrics = metrics
        self._waiting: list[Envelope[Ran]] = []
        self._pace = Pace()

    async def run(self) -> None:
        """Runs forwards until cancelled. Raises EngineFailed; everyone who waits is told."""
        with self._inbox:
            try:
                while True:
                    if not self._waiting:
                        self._waiting.append(await self._inbox.take())
                    self._waiting += self._inbox.take_waiting()
                    if chosen := self._choose():
                        await self._forward(chosen)
                        for _ in range(_PASSES_TO_COME_BACK):
                            await trio.lowlevel.checkpoint()
            finally:
                for envelope in self._waiting:
                    envelope.replies.close()

    def _choose(self) -> list[tuple[Envelope[Ran], tuple[Row, ...]]]:
        """What runs next, taken from those that wait. An asker that has left is passed over."""
        decodes = [envelope for envelope in self._waiting if not _forward_of(envelope).is_prefill]
        prefills = [envelope for envelope in self._waiting if _forward_of(envelope).is_prefill]
        facts = self._engine.facts
        tile = facts.row_tile
        kept_free = min(tile // 4, _ROWS_KEPT_FREE) if prefills else 0
        chosen: list[tuple[Envelope[Ran], tuple[Row, ...]]] = []
        left: list[Envelope[Ran]] = []
        used = 0

        def take(envelopes: list[Envelope[Ran]], limit: int) -> None:
            nonlocal used
            for envelope in envelopes:
                if used >= limit:
                    left.append(envelope)
                elif envelope.begin():
                    rows = _forward_of(envelope).rows[: limit - used]
                    chosen.append((envelope, rows))
                    used += len(rows)

        take(decodes, tile - kept_free)
        # A whole tile of prompt would hold streams up for as long as it takes.
        take(prefills, self._pace.rows_beside(used, facts.row_step, tile) if used else tile)
        self._waiting = left
        return chosen

    async def _forward(self, chosen: list[tuple[Envelope[Ran], tuple[Row, ...]]]) -> None:
        batch = RowBatch(tuple(row for _, rows in chosen for row in rows))
        with ExitStack() as stack:
            # Those who wait to the end wait shielded: whatever happens here, none may be left without a word.
            for envelope, _ in chosen:
                stack.enter_context(envelope.replies)
            started = time.perf_counter()
            try:
                tokens = await self._thread.run(self._engine.forward, batch)
            except Exception as error:
                raise EngineFailed(f"the engine failed: {error}") from error
            wanted = sum(row.draw is not None for row in batch.rows)
            if len(tokens) != wanted:
                raise EngineFailed(f"the engine failed: {len(tokens)} tokens drawn where {wanted} were asked for")
            seconds = time.perf_counter() - started
            prefill_rows = sum(len(rows) for envelope, rows in chosen if _forward_of(envelope).is_prefill)
            self._pace.record(len(batch.rows) - prefill_rows, prefill_rows, seconds)
            self._metrics.forward_duration_seconds.observe(seconds)
            self._metrics.forward_rows.observe(len(batch.rows))
            drawn = iter(tokens)
            for envelope, rows in chosen:
                envelope.finish(Ran(len(rows), tuple(next(drawn) for row in rows if row.draw is not None)))


def _forward_of(envelope: Envelope[Ran]) -> Forward:
    message = envelope.message
    assert isinstance(message, Forward)
    return message
