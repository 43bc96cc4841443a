"""The task that grpclib runs in, where asyncio's loop is a guest of trio's."""

from __future__ import annotations

import asyncio

from grpclib import utils


def use_asyncios_current_task() -> None:
    """Makes grpclib ask asyncio for the current task as asyncio is now, and not as it was when grpclib was imported.

    From Python 3.12 on trio-asyncio replaces the function, without which asyncio finds no loop. Call it after its import.
    """
    utils._current_task = asyncio.current_task  # noqa: SLF001 # It has no other name.
