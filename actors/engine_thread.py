"""The thread on which a model runs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, ParamSpec, TypeVar

import outcome
import trio

P = ParamSpec("P")
T = TypeVar("T")


class EngineThread:
    """The one thread that loads and runs an engine: some backends bind their state to a thread."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool

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
        self._pool.submit(_work, trio.lowlevel.current_trio_token(), end, function, *args)


def _work(
    token: trio.lowlevel.TrioToken, end: Callable[[outcome.Maybe[T]], None], function: Callable[..., T], *args: Any
) -> None:
    # Trio's thread is told from in here, and not by the pool's future, whose own end it would have to wait for.
    result = outcome.capture(function, *args)
    with suppress(trio.RunFinishedError):  # Then nobody is left to be told.
        token.run_sync_soon(end, result)
