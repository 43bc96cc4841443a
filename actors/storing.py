"""Calls of a store, made where they may take their time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

import trio

from runtime.durable import Durable, SessionStore

P = ParamSpec("P")
T = TypeVar("T")

# Threads for calls of a store: one that does not answer must not take those that others need.
_MOST_CALLS = 64
_limiter: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("calls of a store")


async def stored(place: SessionStore | Durable, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """What `call`, a method of `place`, returns. One that is remote is called beside the event loop.

    A directory answers in some ten microseconds, within which there is no checkpoint.
    """
    if place.is_remote:
        return await beside(call, *args, **kwargs)
    return call(*args, **kwargs)


async def beside(call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """What a method of a store returns that takes its time in every one. A call that has begun is not given up."""
    try:
        limiter = _limiter.get()
    except LookupError:
        limiter = trio.CapacityLimiter(_MOST_CALLS)
        _limiter.set(limiter)
    return await trio.to_thread.run_sync(partial(call, *args, **kwargs), limiter=limiter)
