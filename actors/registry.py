"""The registry: which sessions there are, who gets a slab, and what happens when one ends.

It is a plain object and not an actor with a mailbox: each change is made between two awaits, so nobody sees half of one. A
durable session without a slab sleeps in the store, and is woken when it is asked for.
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from array import array
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import trio

from actors.executor import ModelExecutor
from actors.mailbox import Mailbox, open_mailbox
from actors.messages import Evict
from actors.proposing import NewProposals, Proposals
from actors.session import EndReason, Session
from actors.storing import call_in_thread, call_store
from runtime.durable import Durable, SessionStore, Terms
from runtime.errors import CapacityExhausted, EngineFailed, InvariantViolation, SessionNotFound
from runtime.metrics import Metrics
from runtime.sessions import SessionSummary
from runtime.slab import Slab, SlabPool

# The same words whatever became of the session, so that they reveal nothing about ids.
NO_SESSION = "no session has this id: it was never made, was closed, or was evicted"

_log = logging.getLogger("perennial.registry")


@dataclass(frozen=True, slots=True)
class Entry:
    session: Session
    mailbox: Mailbox
    slab: Slab
    pool: SlabPool
    proposals: Proposals | None
    durable: Durable | None


class SessionRegistry:
    """Owns the map of ids and the slab pools, and supervises sessions, so that the failure of one ends no other."""

    def __init__(
        self,
        nursery: trio.Nursery,
        executor: ModelExecutor,
        metrics: Metrics,
        *,
        vocabulary: int,
        idle_ttl_s: float,
        long_lived: SlabPool,
        completions: SlabPool,
        store: SessionStore | None = None,
        new_proposals: NewProposals = lambda: None,
    ) -> None:
        self._nursery = nursery
        self._executor = executor
        self._metrics = metrics
        self._vocabulary = vocabulary
        self._idle_ttl_s = idle_ttl_s or math.inf
        self._long_lived = long_lived
        self._completions = completions
        self._store = store
        self._new_proposals = new_proposals
        self._entries: dict[str, Entry] = {}
        self._passing: dict[str, trio.Event] = {}
        metrics.slab_total.set(self.slab_total)
        metrics.slab_in_use.set_function(lambda: self.slab_in_use)
        metrics.session_active.set_function(lambda: len(self._entries))
        metrics.session_kv_live_bytes.set_function(lambda: sum(e.slab.live_bytes for e in self._entries.values()))
        metrics.session_history_tokens.set_function(
            lambda: sum(entry.session.history_length for entry in self._entries.values())
        )

    @property
    def slab_total(self) -> int:
        """The number of slabs, including those for completions."""
        return self._long_lived.total + self._completions.total

    @property
    def slab_in_use(self) -> int:
        """The number of slabs held by sessions, including those of completions."""
        return self._long_lived.in_use + self._completions.in_use

    @asynccontextmanager
    async def free_slab(self, beside: str | None = None) -> AsyncIterator[Slab]:
        """An empty slab, for the block to fill and to open a session on; it is given back if the block raises.

        If none is free, the session idle longest is evicted, except the one with the id `beside`. Raises CapacityExhausted
        if every session is at work.
        """
        await trio.lowlevel.checkpoint()
        while self._long_lived.in_use == self._long_lived.total and not self._evict_one(beside):
            sessions = [entry.session for _, entry in self._by_last_use(beside)]
            nearly_idle = next((session for session in sessions if session.is_nearly_idle), None)
            if nearly_idle is None:
                raise CapacityExhausted(f"all {self._long_lived.total} slabs are at work: try again, or raise capacity")
            await nearly_idle.idleness()
        with _given_back(self._long_lived) as slab:
            yield slab

    @contextmanager
    def completion_slab(self, history: array[int] | None = None) -> Iterator[Slab]:
        """A slab of the completions' own pool; nothing is evicted for it.

        Of the free ones, that which has read most of `history`.
        """
        with _given_back(self._completions, history) as slab:
            yield slab

    async def open(self, slab: Slab, terms: Terms, history: array[int] | None = None, *, is_kept: bool = True) -> str:
        """Opens a long-lived session on a slab that has read `history` up to its frontier; returns its id. Raises StorageFailed.

        A session that is not kept in the store ends with the server, or when its slab is needed.
        """
        store = self._store if is_kept else None
        durable = await call_store(store, store.create, terms, history) if store else None
        session_id = durable.id if durable else secrets.token_urlsafe(24)
        self._start(session_id, self._long_lived, slab, terms, self._idle_ttl_s, history, durable)
        return session_id

    def open_completion(self, slab: Slab, terms: Terms, history: array[int] | None = None) -> str:
        """Opens a session on a completion's slab and returns its id. It is never evicted."""
        session_id = secrets.token_urlsafe(24)
        self._start(session_id, self._completions, slab, terms, math.inf, history)
        return session_id

    def check(self, session_id: str) -> None:
        """Raises SessionNotFound if no session with this id is awake, and none can be asleep in the store."""
        if not isinstance(session_id, str):
            raise SessionNotFound(NO_SESSION)
        is_asleep = self._store is not None and self._store.may_wake(session_id)
        if not is_asleep and session_id not in self._entries and session_id not in self._passing:
            raise SessionNotFound(NO_SESSION)

    async def mailbox(self, session_id: str) -> Mailbox:
        """The mailbox of a session, which is woken if it sleeps.

        Raises SessionNotFound, SessionMoved if another server holds it, CapacityExhausted if no slab is free for it, or
        StorageFailed.
        """
        while True:
            if (entry := self._entries.get(session_id)) is not None:
                return entry.mailbox
            if (passed := self._passing.get(session_id)) is not None:
                await passed.wait()
            elif self._store is None or not self._store.may_wake(session_id):
                raise SessionNotFound(NO_SESSION)
            else:
                await self._wake(self._store, session_id)

    async def expire(self) -> None:
        """Deletes sessions that have slept for too long, until cancelled."""
        while self._store is not None and self._idle_ttl_s < math.inf:
            asleep = self._store.sleeping()
            left = asleep[0].used_at + self._idle_ttl_s - time.time() if asleep else self._idle_ttl_s
            await trio.sleep(max(left, 1.0))
            count = await call_in_thread(self._store.expire, self._idle_ttl_s)
            self._metrics.session_total.labels("evicted").inc(count)
            self._metrics.session_evicted_total.labels(EndReason.IDLE.value).inc(count)

    def summaries(self) -> list[SessionSummary]:
        """A summary of every long-lived session for operators. It has no ids, for an id gives access to its session."""
        now = trio.current_time()
        visible = self._long_lived.spec.visible
        asleep = [
            SessionSummary(
                label=record.terms.label,
                history_length=record.length,
                evicted_token_count=max(0, record.length - visible),
                kv_live_bytes=0,
                idle_seconds=max(0.0, time.time() - record.used_at),
            )
            for record in (self._store.sleeping() if self._store else ())
        ]
        return asleep + [
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

    def _start(
        self,
        session_id: str,
        pool: SlabPool,
        slab: Slab,
        terms: Terms,
        idle_ttl_s: float,
        history: array[int] | None = None,
        durable: Durable | None = None,
        woken_length: int = 0,
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
            durable=durable,
            proposals=proposals,
            woken_length=woken_length,
        )
        self._entries[session_id] = Entry(session, mailbox, slab, pool, proposals, durable)
        self._nursery.start_soon(self._supervise, session_id, session, durable)

    async def _wake(self, store: SessionStore, session_id: str) -> None:
        with self._unseen(session_id):
            durable, history = await call_in_thread(store.wake, session_id)
            try:
                async with self.free_slab() as slab:
                    kept = await call_in_thread(durable.read_slab, slab, history)
                    self._metrics.reread_tokens_total.labels(kept.value).inc(len(history) - slab.frontier)
                    if durable.has_moved_here:
                        self._metrics.session_moved_here_total.labels(kept.value).inc()
                    self._start(
                        session_id,
                        self._long_lived,
                        slab,
                        durable.terms,
                        self._idle_ttl_s,
                        history,
                        durable,
                        woken_length=len(history),
                    )
            except BaseException:
                with trio.CancelScope(shield=True):
                    await call_store(durable, durable.close)
                raise

    @contextmanager
    def _unseen(self, session_id: str) -> Iterator[None]:
        """While the block runs, callers who ask for the session wait."""
        self._passing[session_id] = trio.Event()
        try:
            yield
        finally:
            self._release_waiters(session_id)

    def _release_waiters(self, session_id: str) -> None:
        """Releases the callers who waited for a session that was waking or falling asleep."""
        self._passing.pop(session_id).set()

    def _evict_one(self, beside: str | None) -> bool:
        """Evicts the least recently used of the sessions that wait at their inbox; returns whether there was one.

        A durable session falls asleep.
        """
        for session_id, entry in self._by_last_use(beside):
            if entry.mailbox.offer(Evict()):
                self._withdraw(session_id)
                self._give_up(entry, entry.session.read)
                return True
        return False

    def _by_last_use(self, beside: str | None) -> list[tuple[str, Entry]]:
        """Long-lived sessions, the least recently used first, without the one with the id `beside`."""
        held = [
            (session_id, entry)
            for session_id, entry in self._entries.items()
            if entry.pool is self._long_lived and session_id != beside
        ]
        return sorted(held, key=lambda pair: pair[1].session.last_used)

    def _withdraw(self, session_id: str) -> Entry | None:
        """Takes a session out of the map; from then on callers who ask for a durable one wait until its record is closed."""
        entry = self._entries.pop(session_id, None)
        if entry is not None and entry.durable is not None:
            self._passing[session_id] = trio.Event()
        return entry

    def _give_up(self, entry: Entry, read: array[int] | None) -> None:
        """Gives back what a session held that was withdrawn; its slab has read these tokens, or is emptied."""
        entry.pool.release(entry.slab, read)
        if entry.proposals is not None:
            entry.proposals.close()

    async def _supervise(self, session_id: str, session: Session, durable: Durable | None) -> None:
        # A fault deletes no record: a session that failed is read from its record when it is next asked for.
        has_ended = False
        read: array[int] | None = None
        # None once it was evicted, which took it out of the map and gave up its slab before its task has run to its end.
        entry: Entry | None = None
        try:
            try:
                ending = await session.run()
            finally:
                # Before anything is waited for: callers must not find a mailbox that nobody reads.
                entry = self._withdraw(session_id)
            read = session.read
            has_ended = durable is None or ending in (EndReason.CLOSED, EndReason.IDLE)
            if ending is EndReason.MOVED:
                self._metrics.session_moved_away_total.inc()
            if has_ended:
                self._metrics.session_total.labels("closed" if ending is EndReason.CLOSED else "evicted").inc()
                self._metrics.session_evicted_total.labels(ending.value).inc()
        except EngineFailed:
            self._metrics.session_total.labels("failed").inc()
        except Exception as error:
            if isinstance(error, InvariantViolation):
                self._metrics.cache_invariant_violations_total.labels(error.kind).inc()
            self._metrics.session_total.labels("failed").inc()
            _log.error("session failed", exc_info=error)
            if durable is not None:
                with trio.CancelScope(shield=True):
                    await call_in_thread(durable.forget_slab)
        except BaseException:
            # The whole tree is ending.
            if self._store is not None:
                with trio.CancelScope(deadline=trio.current_time() + self._store.leaving_s, shield=True):
                    await session.leave_slab_on_disk()
            raise
        finally:
            if entry is not None:
                self._give_up(entry, read)
            if durable is not None:
                with trio.CancelScope(shield=True):
                    if has_ended:
                        await call_in_thread(durable.delete)
                    else:
                        await call_store(durable, durable.close)
                self._release_waiters(session_id)


@contextmanager
def _given_back(pool: SlabPool, history: array[int] | None = None) -> Iterator[Slab]:
    """A slab of the pool, given back if the block raises; of the free ones, that which has read most of `history`."""
    slab = pool.acquire(history)
    try:
        yield slab
    except BaseException:
        pool.release(slab)
        raise
