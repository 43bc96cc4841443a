"""The synchronous core: settings, errors, events, slabs, engines, sampling, text. No event loop, no network."""

from runtime.events import Done, Event, HistoryTruncated, Overflow, Sampling, StopReason, Token
from runtime.settings import Settings

__all__ = [
    "Done",
    "Event",
    "HistoryTruncated",
    "Overflow",
    "Sampling",
    "Settings",
    "StopReason",
    "Token",
]
