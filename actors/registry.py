"""The registry: which sessions there are, who gets a slab, and what happens when one ends.

Every method is synchronous, so each change is whole; it is an object and not an actor with a mailbox.
"""

from __future__ import annotations

import logging
import math
import secrets
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import trio

from actors.mailbox import Mailbox, open_mailbox
from actors.messages import Evict, SessionSummary
from actors.proposing import NewProposals, Proposals
from actors.session import Ending, Session
from runtime.errors import CapacityExhausted, EngineFailed, InvariantViolation, SessionNotFound, SnapshotUnreadable
from runtime.journal import Journal
from runtime.metrics import Metrics
from runtime.slab import Slab, SlabPool
from runtime.snapshot import Terms
from runtime.state import StateDirectory

# The same words whenever the session ended, so that they say nothing about ids.
NO_SESSION = "no session has this id: it was never made, was closed, or was evicted"

_log = logging.getLogger("perennial.registry")


@dataclass(frozen=True, slots=True)
class Entry:
    session: Session
    mailbox: Mailbox
    slab: Slab
    pool: SlabPool
    proposals: Proposals | None


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
        state: StateDirectory | None = None,
        new_proposals: NewProposals = lambda: None,
    ) -> None:
        self._nursery = nursery
        self._executor = executor
        self._metrics = metrics
        self._vocabulary = vocabulary
        self._idle_ttl_s = idle_ttl_s or math.inf
        self._long_lived = long_lived
        self._completions = completions
        self._state = state
        self._new_proposals = new_proposals
        self._entries: dict[str, Entry] = {}
        metrics.slab_total.set(self.slab_total)
        metrics.slab_in_use.set_function(lambda: self.slab_in_use)
        metrics.session_active.set_function(lambda: len(self._entries))
        metrics.session_kv_live_bytes.set_function(lambda: sum(e.slab.live_bytes for e in self._entries.values()))
        metrics.session_history_tokens.set_function(
            lambda: sum(entry.session.history_length for entry in self._entries.values())
        )

    @property
    def slab_total(self) -> int:
        """Slabs there are, the completions' included."""
        return self._long_lived.total + self._completions.total

    @property
    def slab_in_use(self) -> int:
        """Slabs held by sessions, the completions' included."""
        return self._long_lived.in_use + self._completions.in_use

    def create(self, terms: Terms) -> str:
        """The id of a new long-lived session. When every slab is held, the one idle longest is evicted for it.

        Raises CapacityExhausted when all are at work.
        """
        with self.free_slab() as slab:
            return self.open(slab, terms)

    @contextmanager
    def free_slab(self, beside: str | None = None) -> Iterator[Slab]:
        """An empty slab to be filled and opened in the block, free again where the block raises.

        For want of one, the session idle longest is evicted, but not the one with the id `beside`. Raises
        CapacityExhausted.
        """
        if self._long_lived.in_use == self._long_lived.total:
            self._evict_one(beside)
        with _given_back(self._long_lived) as slab:
            yield slab

    @contextmanager
    def completion_slab(self) -> Iterator[Slab]:
        """As `free_slab`, of the completions' own; nothing is evicted for it."""
        with _given_back(self._completions) as slab:
            yield slab

    def open(self, slab: Slab, terms: Terms, history: array[int] | None = None) -> str:
        """The id of a new long-lived session on a slab that has read `history` up to its frontier."""
        session_id = secrets.token_urlsafe(24)
        journal = self._state.new_journal(session_id, terms) if self._state else None
        if journal is not None and history:
            journal.record(0, history)
        self._start(session_id, self._long_lived, slab, terms, self._idle_ttl_s, history, journal)
        return session_id

    def open_completion(self, slab: Slab, terms: Terms, history: array[int] | None = None) -> str:
        """The id of a new session on a completion's slab; it is never evicted."""
        session_id = secrets.token_urlsafe(24)
        self._start(session_id, self._completions, slab, terms, math.inf, history)
        return session_id

    def recover(self) -> None:
        """Starts the sessions that an earlier server left on disk, the one used last first, as many as there are slabs."""
        if self._state is None:
            return
        for session_id, journal in self._state.journals():
            if self._long_lived.in_use == self._long_lived.total:
                journal.delete()
                _log.warning("session on disk evicted: capacity is %d", self._long_lived.total)
                continue
            slab = self._long_lived.acquire()
            try:
                history = journal.recover(slab)
            except SnapshotUnreadable as error:
                self._long_lived.release(slab)
                journal.close()
                self._state.set_aside(session_id, error)
            else:
                self._start(session_id, self._long_lived, slab, journal.terms, self._idle_ttl_s, history, journal)
        _log.info("sessions recovered count=%d", len(self._entries))

    def summaries(self) -> list[SessionSummary]:
        """What an operator may know of every long-lived session; ids are for those who made them."""
        now = trio.current_time()
        return [
            SessionSummary(
                label=entry.session.terms.label,
                history_length=entry.session.history_length,
                evicted_token_count=entry.session.evicted_token_count,
                kv_live_bytes=entry.slab.live_bytes,
                idle_seconds=now - entry.session.last_used,
            )
            for entry in self._entries.values()
            if entry.pool is self._long_lived
        ]

    def find(self, session_id: str) -> Mailbox:
        """The mailbox of a session that lives. Raises SessionNotFound."""
        entry = self._entries.get(session_id)
        if entry is None:
            raise SessionNotFound(NO_SESSION)
        return entry.mailbox

    def _start(
        self,
        session_id: str,
        pool: SlabPool,
        slab: Slab,
        terms: Terms,
        idle_ttl_s: float,
        history: array[int] | None = None,
        journal: Journal | None = None,
    ) -> None:
        mailbox, inbox = open_mailbox()
        proposals = self._new_proposals()
        session = Session(
            slab,
            inbox,
            self._executor,
            self._metrics,
            vocabulary=self._vocabulary,
            terms=terms,
            idle_ttl_s=idle_ttl_s,
            history=history,
            journal=journal,
            proposals=proposals,
        )
        self._entries[session_id] = Entry(session, mailbox, slab, pool, proposals)
        self._nursery.start_soon(self._supervise, session_id, session, journal)

    def _evict_one(self, beside: str | None) -> None:
        """Ends the session that was used longest ago among those that wait at their inbox."""
        held = [
            (session_id, entry)
            for session_id, entry in self._entries.items()
            if entry.pool is self._long_lived and session_id != beside
        ]
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
            if entry.proposals is not None:
                entry.proposals.close()

    async def _supervise(self, session_id: str, session: Session, journal: Journal | None) -> None:
        goes_on = False
        try:
            ending = await session.run()
        except trio.Cancelled:
            goes_on = True
            session.leave_slab_on_disk()
            raise
        except EngineFailed:
            goes_on = True
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
            if journal is not None:
                if goes_on:
                    journal.close()
                else:
                    journal.delete()


@contextmanager
def _given_back(pool: SlabPool) -> Iterator[Slab]:
    """A slab of the pool, free again where the block raises."""
    slab = pool.acquire()
    try:
        yield slab
    except BaseException:
        pool.release(slab)
        raise
