"""Nurseries that keep quiet: one error comes out of them as it went in."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import trio


@contextmanager
def lone_errors() -> Iterator[None]:
    """Raises an error that exception groups hold alone as it is: that there are nurseries is no caller's concern."""
    try:
        yield
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            if len(error.exceptions) > 1:
                raise
            error = error.exceptions[0]
        context = error.__context__
        try:
            raise error
        finally:
            # The group holds the error, and is not what it came of.
            error.__context__ = context


@asynccontextmanager
async def open_nursery() -> AsyncIterator[trio.Nursery]:
    """A nursery that raises a lone error as it is."""
    with lone_errors():
        async with trio.open_nursery() as nursery:
            yield nursery
