"""One-line logs on stderr: time, level, logger, message. Never a prompt, a completion, a key or words of a client."""

from __future__ import annotations

import logging
import sys
import traceback
from typing import Any

MOST_CHARACTERS = 2000
"""In one line, its time and level included."""

# How many places of a traceback are logged, the innermost ones.
_MOST_PLACES = 6

# Loggers of libraries whose loops and sockets we use, and which would log failures as tracebacks of many lines.
_LIBRARIES = ("asyncio", "trio", "trio_asyncio", "grpclib", "quart")


class OneLine(logging.Formatter):
    """Formats a record as one line of bounded length.

    It logs an error's type and place only, for its message may be a client's words.
    """

    def __init__(self, form: str, *, has_tracebacks: bool) -> None:
        super().__init__(form)
        self._has_tracebacks = has_tracebacks

    def format(self, record: logging.LogRecord) -> str:
        # Another handler may have cached a text that says more.
        record.exc_text = None
        line = super().format(record).replace("\n", " | ").replace("\r", " ")
        return line if len(line) <= MOST_CHARACTERS or self._has_tracebacks else f"{line[: MOST_CHARACTERS - 1]}…"

    def formatException(self, ei: Any) -> str:
        error: BaseException | None = ei[1]
        if self._has_tracebacks or error is None:
            return super().formatException(ei)
        return " ; ".join(describe_error(each) for each in leaves(error))


def leaves(error: BaseException) -> list[BaseException]:
    """The errors in a group and its groups, or the error itself."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for each in error.exceptions for leaf in leaves(each)]
    return [error]


def describe_error(error: BaseException) -> str:
    """An error in words of ours alone: its type and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)[-_MOST_PLACES:]
    places = " > ".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in frames)
    return f"{type(error).__name__} at {places or 'an unknown place'}"


class _Shortened(logging.Filter):
    """Shortens records as `OneLine` does, for handlers of others."""

    def __init__(self, *, has_tracebacks: bool) -> None:
        super().__init__()
        self._form = OneLine("%(message)s", has_tracebacks=has_tracebacks)

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = self._form.format(record), ()
        record.exc_info = record.exc_text = None
        return True


def configure_logging(level: str) -> None:
    """Sends log records to stderr from `level` on."""
    handler = logging.StreamHandler(sys.stderr)
    form = "%(asctime)s %(levelname)s %(name)s %(message)s"
    handler.setFormatter(OneLine(form, has_tracebacks=level == "debug"))
    # Libraries log in the same form, and only warnings.
    for name, least in (("perennial", level.upper()), *((name, "WARNING") for name in _LIBRARIES)):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(least)
        logger.propagate = False
    # A host server makes handlers of its own, perhaps later, so the records themselves are shortened.
    host = logging.getLogger("hypercorn.error")
    host.filters[:] = [_Shortened(has_tracebacks=level == "debug")]


def where(error: BaseException) -> str:
    """An error's type and the line that raised it: all that can be logged of it without words of a client."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f" at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else ""
    return f"{type(error).__name__}{place}"
