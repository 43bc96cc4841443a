"""Ends a process at once whose work is done: to take an interpreter apart that has loaded torch takes seconds."""

from __future__ import annotations

import atexit
import logging
import os
import sys

_is_done = False


def leave_at_once() -> None:
    """From here on the process ends with status 0 as soon as it is told to end. Everything that was open is closed."""
    global _is_done
    _is_done = True


def _leave() -> None:
    if _is_done:
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(0)


# Handlers run from the last to the first: those that send traces or close files come before this one.
atexit.register(_leave)
