"""Calls of a store that may take long are made in threads of their own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

import trio

from runtime.durable import Durable, SessionStore

P = ParamSpec("P")
T = TypeVar("T")

# Threads for store calls alone: a store that does not answer must not use up the threads that others need.
_MOST_CALLS = 64
_limiter: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("calls of a store")


async def call_store(place: SessionStore | Durable, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Calls `call`, a method of `place`, in a thread if the place is remote; returns its result.

    A directory answers in some ten microseconds, so it is called directly, without a checkpoint. To delete takes longer.
    """
    if place.is_remote:
        return await call_in_thread(call, *args, **kwargs)
    return call(*args, **kwargs)


async def call_in_thread(call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Calls, in a thread, a method that takes long in every kind of store; returns its result.

    A call that has begun is waited for.
    """
    try:
        limiter = _limiter.get()
    except LookupError:
        limiter = trio.CapacityLimiter(_MOST_CALLS)
        _limiter.set(limiter)
    return await trio.to_thread.run_sync(partial(call, *args, **kwargs), limiter=limiter)
