"""The registry: which sessions there are, who gets a slab, and what happens when one ends.

Every method is synchronous, so each change is whole; it is an object and not an actor with a mailbox.
"""

from __future__ import annotations

import logging
import math
import secrets
from dataclasses import dataclass

import trio

from actors.mailbox import Mailbox, open_mailbox
from actors.messages import Evict
from actors.session import Ending, Session
from runtime.errors import CapacityExhausted, EngineFailed, InvariantViolation, SessionNotFound
from runtime.events import Overflow
from runtime.metrics import Metrics
from runtime.slab import Slab, SlabPool

_log = logging.getLogger("perennial.registry")


@dataclass(frozen=True, slots=True)
class Entry:
    session: Session
    mailbox: Mailbox
    slab: Slab
    pool: SlabPool
    label: str


class SessionRegistry:
    """Owns the map of ids and the slab pools; supervises: one session's failure is its own."""

    def __init__(
        self,
        nursery: trio.Nursery,
        executor: Mailbox,
        metrics: Metrics,
        *,
        vocabulary: int,
        idle_ttl_s: float,
        long_lived: SlabPool,
        completions: SlabPool,
    ) -> None:
        self._nursery = nursery
        self._executor = executor
        self._metrics = metrics
        self._vocabulary = vocabulary
        self._idle_ttl_s = idle_ttl_s or math.inf
        self._long_lived = long_lived
        self._completions = completions
        self._entries: dict[str, Entry] = {}
        metrics.slab_total.set(long_lived.total + completions.total)
        metrics.slab_in_use.set_function(lambda: long_lived.in_use + completions.in_use)
        metrics.session_active.set_function(lambda: len(self._entries))
        metrics.session_kv_live_bytes.set_function(lambda: sum(e.slab.live_bytes for e in self._entries.values()))
        metrics.session_history_tokens.set_function(
            lambda: sum(entry.session.history_length for entry in self._entries.values())
        )

    def create(self, eos_token_ids: frozenset[int], overflow: Overflow, label: str) -> str:
        """The id of a new long-lived session. When every slab is held, the one idle longest is evicted for it.

        Raises CapacityExhausted when all are at work.
        """
        if self._long_lived.in_use == self._long_lived.total:
            self._evict_one()
        return self._open(self._long_lived, eos_token_ids, overflow, label, self._idle_ttl_s)

    def create_for_completion(self, eos_token_ids: frozenset[int], overflow: Overflow) -> str:
        """The id of a new session on a slab of the completions' own; it never evicts and is never evicted."""
        return self._open(self._completions, eos_token_ids, overflow, "http", math.inf)

    def find(self, session_id: str) -> Mailbox:
        """The mailbox of a session that lives. Raises SessionNotFound."""
        entry = self._entries.get(session_id)
        if entry is None:
            raise SessionNotFound("no session has this id: it was never made, was closed, or was evicted")
        return entry.mailbox

    def _open(
        self, pool: SlabPool, eos_token_ids: frozenset[int], overflow: Overflow, label: str, idle_ttl_s: float
    ) -> str:
        slab = pool.acquire()
        mailbox, inbox = open_mailbox()
        session = Session(
            slab,
            inbox,
            self._executor,
            self._metrics,
            vocabulary=self._vocabulary,
            eos_token_ids=eos_token_ids,
            overflow=overflow,
            idle_ttl_s=idle_ttl_s,
        )
        session_id = secrets.token_urlsafe(24)
        self._entries[session_id] = Entry(session, mailbox, slab, pool, label)
        self._nursery.start_soon(self._supervise, session_id)
        return session_id

    def _evict_one(self) -> None:
        """Ends the session that was used longest ago among those that wait at their inbox."""
        held = [pair for pair in self._entries.items() if pair[1].pool is self._long_lived]
        for session_id, entry in sorted(held, key=lambda pair: pair[1].session.last_used):
            if entry.mailbox.offer(Evict()):
                self._remove(session_id)
                return
        raise CapacityExhausted(f"all {self._long_lived.total} slabs are at work: try again, or raise capacity")

    def _remove(self, session_id: str) -> None:
        # A session to be evicted leaves the map, and gives up its slab, before its task has had its turn to end.
        entry = self._entries.pop(session_id, None)
        if entry is not None:
            entry.pool.release(entry.slab)

    async def _supervise(self, session_id: str) -> None:
        try:
            ending = await self._entries[session_id].session.run()
        except EngineFailed:
            self._metrics.session_total.labels("failed").inc()
        except Exception as error:
            if isinstance(error, InvariantViolation):
                self._metrics.cache_invariant_violations_total.labels(error.kind).inc()
            self._metrics.session_total.labels("failed").inc()
            _log.error("session failed", exc_info=error)
        else:
            outcome = "closed" if ending is Ending.CLOSED else "evicted"
            self._metrics.session_total.labels(outcome).inc()
            self._metrics.session_evicted_total.labels(ending.value).inc()
        finally:
            self._remove(session_id)
