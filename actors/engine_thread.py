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
    """The one thread that loads and runs an engine: some backends bind their state to a thread.

    It lives while its block runs, which ends when the function that runs has ended. A pool of one thread would do the same,
    and take twice as long to begin.
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
        """The function's result. It cannot be stopped, so a cancelled caller waits for its end."""
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
        """Begins the function; when it has ended, trio's thread calls `end` with what came of it."""
        token = trio.lowlevel.current_trio_token()

        def work() -> None:
            result = outcome.capture(function, *args)
            with suppress(trio.RunFinishedError):  # Then nobody is left to be told.
                token.run_sync_soon(end, result)

        self._work.put(work)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()
            # What it holds, such as a forward's rows, is not to live until the next one comes.
            del work
