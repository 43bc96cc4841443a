"""When Python's garbage collector looks for circles: not in what stays for good."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

# Collections of younger objects before one of all objects.
_YOUNGER_COLLECTIONS = 50


@contextmanager
def without_collecting() -> Iterator[None]:
    """Collects nothing in the block.

    An import or a load leaves next to no garbage that is a circle; to look through all that libraries have made takes a tenth
    of a second, and it would be done several times.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def frozen() -> Iterator[None]:
    """Keeps the collector from walking again and again over objects that are there before the block.

    Modules and model are some 400,000 objects. To walk them takes 0.2 s, in which nothing else in the process runs.
    The connections of hundreds of clients take half as long, so it walks everything less often than is usual.
    """
    gc.freeze()
    usual = gc.get_threshold()
    gc.set_threshold(*usual[:2], _YOUNGER_COLLECTIONS)
    try:
        yield
    finally:
        gc.set_threshold(*usual)
        gc.unfreeze()
