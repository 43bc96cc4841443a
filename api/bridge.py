"""The only file that knows two event loops: trio's, in which the server lives, and asyncio's, of others.

Hypercorn's default worker class runs asyncio. There the server has a trio loop in a thread of its own, and every request
crosses over. A guest run, trio on the worker's own loop, would save the crossing; but grpclib runs under trio as a guest of
trio-asyncio, and an asyncio loop inside trio inside an asyncio loop on one thread is more than either promises.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, ParamSpec, Protocol, TypeVar

import sniffio
import trio
import trio_asyncio
from anyio.from_thread import BlockingPortal, start_blocking_portal

from api.foreign.grpclib import use_asyncios_current_task
from api.logs import where
from runtime.errors import lone_errors

# Once imported, trio_asyncio makes each new asyncio loop run over trio, also that of an asyncio server that hosts us, unless
# the thread has set a policy; so set the present one. Inside trio that is not possible, nor needed: no server is hosted
# there.
if not trio.lowlevel.in_trio_run():
    asyncio.set_event_loop_policy(asyncio.get_event_loop_policy())

_log = logging.getLogger("perennial.server")

P = ParamSpec("P")
T = TypeVar("T")

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
TrioApplication = Callable[[Scope, Receive, Send], Awaitable[None]]


def _is_trio() -> bool:
    return sniffio.current_async_library() == "trio"


class FromAsyncio(Protocol):
    """Turns a coroutine function of an asyncio library into one that trio can await."""

    def __call__(self, function: Callable[P, Awaitable[T]], /) -> Callable[P, Awaitable[T]]: ...


@asynccontextmanager
async def asyncio_loop() -> AsyncIterator[FromAsyncio]:
    """An asyncio loop for the block, as a guest of trio; yields the way to call asyncio's libraries.

    That way is bound to the loop, so any task can use it, and not only tasks started in the block.
    """
    use_asyncios_current_task()
    with lone_errors():
        async with trio_asyncio.open_loop() as loop:
            loop.set_exception_handler(_log_failure)
            yield partial(trio_asyncio.aio_as_trio, loop=loop)


def _log_failure(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Logs that a callback failed, in one line. By default trio-asyncio would end the loop, and all that runs on it."""
    error = context.get("exception")
    _log.error("a callback of asyncio's failed: %s", where(error) if error is not None else "no error was named")


def for_asyncio(function: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
    """Wraps a trio function for an asyncio library to await. When asyncio cancels the task, trio cancels the function."""
    adapted: Callable[P, Awaitable[T]] = trio_asyncio.trio_as_aio(function)
    return adapted


def _leave_signals_to_the_host() -> None:
    """Keeps a worker of Hypercorn running until its host tells it to stop.

    A terminal that is closed, or a service manager, signals all processes at once: the host, which tells its workers to
    drain, and the workers too, which it would end in the middle of their calls. A worker whose host is gone ends on a signal
    as usual.
    """
    host = multiprocessing.parent_process()
    if host is None or threading.current_thread() is not threading.main_thread():
        return

    def stop_if_alone(number: int, _: object) -> None:
        if not host.is_alive():
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        # `nohup` has hangups ignored.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop_if_alone)


class EitherLoop:
    """An ASGI application written for trio, served by a trio or by an asyncio server.

    When the application returns from its lifespan, the server is told that the shutdown is complete.
    """

    def __init__(self, application: TrioApplication) -> None:
        self._application = application
        self._trio_thread: BlockingPortal | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
        elif _is_trio():
            await self._application(scope, receive, send)
        else:
            await self._cross(scope, receive, send)

    async def call(self, function: Callable[..., Awaitable[T]], *args: object) -> T:
        """Awaits a function written in trio where the application lives, for an asyncio server; cancellation crosses."""
        assert self._trio_thread is not None, "an asyncio server has to start the lifespan first"
        return await self._trio_thread.call_async(function, *args)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        _leave_signals_to_the_host()
        if _is_trio():
            await self._application(scope, receive, send)
        else:
            with start_blocking_portal("trio", name="trio") as self._trio_thread:
                await self._cross(scope, receive, send)
        # Hypercorn cancels a lifespan that goes on after this, so it comes when the trio thread has ended.
        await send({"type": "lifespan.shutdown.complete"})

    async def _cross(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the application in the trio thread; cancellation crosses too, in both directions."""
        async with BlockingPortal() as here:
            await self.call(self._application, scope, partial(here.call_async, receive), partial(here.call_async, send))
