"""The thread on which a model runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

import outcome
import trio

P = ParamSpec("P")
T = TypeVar("T")


class EngineThread:
    """The one thread that loads and runs an engine, because some backends bind their state to a thread.

    Use it as a context: leaving the block waits for the function that is running. A pool of one thread would take twice as
    long to begin each function.
    """

    def __init__(self) -> None:
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = Thread(target=self._run, name="engine")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._work.put(None)
        self._thread.join()

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The function's result. A running function cannot be stopped, so a cancelled caller waits for it to end."""
        ended = trio.Event()
        results: list[outcome.Maybe[T]] = []

        def end(result: outcome.Maybe[T]) -> None:
            results.append(result)
            ended.set()

        self.begin(end, partial(function, *args, **kwargs))
        with trio.CancelScope(shield=True):
            await ended.wait()
        return results[0].unwrap()

    def begin(self, end: Callable[[outcome.Maybe[T]], None], function: Callable[..., T], *args: Any) -> None:
        """Starts the function and returns; when it has ended, `end` is called in trio's thread with its outcome."""
        token = trio.lowlevel.current_trio_token()

        def work() -> None:
            result = outcome.capture(function, *args)
            with suppress(trio.RunFinishedError):  # Trio's loop has ended, and nobody waits for the result.
                token.run_sync_soon(end, result)

        self._work.put(work)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()
            # Otherwise what it refers to, such as a forward's rows, would live until the next function comes.
            del work
