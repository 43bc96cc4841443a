"""The thread on which a model runs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, ParamSpec, TypeVar

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
        future = self._pool.submit(function, *args, **kwargs)
        _call_after(future, lambda _: ended.set())
        with trio.CancelScope(shield=True):
            await ended.wait()
        return future.result()

    def begin(self, then: Callable[[Future[T]], None], function: Callable[..., T], *args: Any) -> None:
        """Begins the function; when it has ended, `then` is called in trio's thread with what came of it."""
        _call_after(self._pool.submit(function, *args), then)


def _call_after(future: Future[T], then: Callable[[Future[T]], None]) -> None:
    token = trio.lowlevel.current_trio_token()

    def wake(_: Future[T]) -> None:
        with suppress(trio.RunFinishedError):  # Then nobody is left to be called.
            token.run_sync_soon(then, future)

    future.add_done_callback(wake)
