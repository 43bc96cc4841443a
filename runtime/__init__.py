"""The synchronous core: settings, errors, events, slabs, engines, sampling, text. No event loop, no network."""

import os

# Threads of OpenMP that spin while they wait take the cores of whatever else runs here, our own event loop among it, and a
# forward beside another busy program takes many times as long. It has to be said before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

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
