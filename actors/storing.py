"""Calls of a store, made where they may take their time."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import trio

from runtime.durable import Durable, SessionStore

P = ParamSpec("P")
T = TypeVar("T")


async def stored(place: SessionStore | Durable, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """What `call`, a method of `place`, returns. One that is remote is called beside the event loop.

    A directory answers in some ten microseconds, within which there is no checkpoint. A call that has begun is not given up.
    """
    if not place.is_remote:
        return call(*args, **kwargs)
    return await trio.to_thread.run_sync(lambda: call(*args, **kwargs))
