"""Nurseries that raise a single error as it is, and not wrapped in an exception group."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from runtime.errors import lone_errors

__all__ = ["lone_errors", "open_nursery"]


@asynccontextmanager
async def open_nursery() -> AsyncIterator[trio.Nursery]:
    """A nursery that raises a lone error as it is."""
    with lone_errors():
        async with trio.open_nursery() as nursery:
            yield nursery
