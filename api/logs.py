"""One-line logs on stderr: time, level, where from, what. Never a prompt, a completion or a key."""

from __future__ import annotations

import logging
import sys


class OneLine(logging.Formatter):
    """Puts a traceback, where there is one, on the same line."""

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).replace("\n", " | ")


def configure_logging(level: str) -> None:
    """Sends what the server says to stderr from `level` on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLine("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logger = logging.getLogger("perennial")
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False


def where(error: BaseException) -> str:
    """An error's type and the line that raised it: all that a log can say of it without what a client has sent."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f" at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else ""
    return f"{type(error).__name__}{place}"
