"""Actors: who owns what.

| actor | owns, nobody else writes or holds it | takes | asks | its failure |
| --- | --- | --- | --- | --- |
| Session | history, slab contents, terms, durable record, last-used time | its SessionMessages | executor | this session |
| ModelExecutor | engine, its thread, rows that wait or run, leases, pace of forwards | (leases) | nobody | all: the tree ends |
| SessionRegistry | ids to sessions, sessions on the way to or from sleep, slab pools | (methods) | nobody | all: the tree ends |
| Conversations | the tree of points, which sessions stand where, reads ahead, turn reports | (methods) | sessions | that turn |
| Admission | permits, FIFO of waiters | (a context manager) | nobody | cannot fail |

Asks go from a door, or from conversations for it, to a session and from a session to the executor, never back, so nothing
waits in a circle.
"""

import os

# OpenMP's threads spin while they wait, which takes cores from every other program here and from our own event loop: a
# forward beside another busy program takes many times as long. The variable must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from actors.handles import Events, SessionHandle
from actors.tree import Runtime, open_runtime

__all__ = ["Events", "Runtime", "SessionHandle", "open_runtime"]
