"""Both event loops that a client may run in."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
import trio

# The longest that a test waits for an answer: only one that never comes takes so long on a slow machine.
MOST_S = 240

Run = Callable[[Callable[[], Awaitable[None]]], None]


def in_asyncio(function: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        await asyncio.wait_for(function(), MOST_S)

    # A loop of asyncio's own: the default one is trio_asyncio's where that was imported.
    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        runner.run(run())


def in_trio(function: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        with trio.fail_after(MOST_S):
            await function()

    trio.run(run)


in_either_loop = pytest.mark.parametrize("run", [in_asyncio, in_trio], ids=["asyncio", "trio"])
