"""The tree of actors, whose start and stop order can be read as indentation, and the runtime built on it."""

from __future__ import annotations

import logging
from array import array
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, closing

import trio

from actors.admission import Admission
from actors.conversations import MOST_BYTES, Conversations
from actors.engine_thread import EngineThread
from actors.executor import ModelExecutor
from actors.handles import CompletionSessions, SessionHandle, digest_of
from actors.messages import Load
from actors.nursery import open_nursery
from actors.proposing import NewProposals, open_proposing
from actors.registry import SessionRegistry
from actors.storing import call_in_thread
from runtime.checks import check_whole, checked_eos_ids, checked_label
from runtime.durable import HistoryIdentity, SessionStore, SlabIdentity, Terms, fingerprint, open_store
from runtime.engine import Engine, EngineFacts, load_engine
from runtime.errors import NotDurable
from runtime.events import Overflow, checked_overflow
from runtime.metrics import Metrics
from runtime.models import find_model
from runtime.sessions import ModelInfo, Saved, SessionSummary, Snapshot
from runtime.settings import Settings
from runtime.slab import Slab
from runtime.text import Text

_log = logging.getLogger("perennial")


class Runtime:
    """An engine and its sessions; no network. Made by `open_runtime`."""

    def __init__(
        self,
        settings: Settings,
        facts: EngineFacts,
        text: Text,
        registry: SessionRegistry,
        admission: Admission,
        metrics: Metrics,
        store: SessionStore | None,
    ) -> None:
        self.settings = settings
        self.facts = facts
        self.shape = facts.shape
        self.text = text
        self.metrics = metrics
        points = store.open_points(MOST_BYTES) if store else None
        self.conversations = Conversations(self, facts.slab, text.eos_token_ids, points, are_kept=points is not None)
        self._registry = registry
        self._admission = admission
        self._store = store

    async def create_session(
        self,
        eos_token_ids: Iterable[int] = (),
        *,
        overflow: Overflow = Overflow.EVICT,
        label: str = "",
        is_kept: bool = True,
    ) -> SessionHandle:
        """A new long-lived session. One that is not kept is not written to `state_dir`, and ends with the server.

        Raises CapacityExhausted when every slab is held by a session at work, StorageFailed where it cannot be recorded, and
        InvalidRequest for more than 64 different eos ids, a label of more than 256 bytes, or arguments of the wrong type.
        """
        return await self.create_session_of(_terms(eos_token_ids, overflow, label), is_kept=is_kept)

    async def create_session_of(self, terms: Terms, *, is_kept: bool) -> SessionHandle:
        """As `create_session`, of terms that were checked. One that `is_lent` is deleted at a start if no conversation has it.

        Raises CapacityExhausted, StorageFailed.
        """
        async with self._registry.free_slab() as slab:
            return await self._open_session(slab, terms, is_kept=is_kept)

    async def fork_session(self, session_id: str) -> SessionHandle:
        """A new session that continues from where this one stands, on a copy of its slab; no forward runs.

        It is kept if this one is.

        Raises SessionNotFound, CapacityExhausted, StorageFailed.
        """
        session = self.find_session(session_id)
        await self._registry.mailbox(session_id)
        async with self._registry.free_slab(beside=session_id) as target:
            branch = await session.fork_into(target)
            return await self._open_session(target, branch.terms, branch.history, is_kept=branch.is_kept)

    async def save_session(self, session_id: str) -> Saved:
        """Writes a snapshot of the session under `state_dir`. Raises SessionNotFound, NotDurable, StorageFailed."""
        self._durable()
        return await self.find_session(session_id).save()

    async def restore_session(self, snapshot_id: str) -> SessionHandle:
        """A new session that continues from where the saved one stood.

        Raises NotDurable, SnapshotNotFound, SnapshotMismatch, SnapshotUnreadable, CapacityExhausted, StorageFailed.
        """
        store = self._durable()
        async with self._registry.free_slab() as slab:
            terms, history = await call_in_thread(store.load, snapshot_id, slab)
            return await self._open_session(slab, terms, history)

    def list_snapshots(self) -> list[Snapshot]:
        """Every snapshot, the oldest first. Raises NotDurable."""
        return self._durable().snapshots()

    async def delete_snapshot(self, snapshot_id: str) -> int:
        """Deletes a snapshot; returns the bytes that it took. Raises NotDurable, SnapshotNotFound, StorageFailed."""
        return await call_in_thread(self._durable().delete_snapshot, snapshot_id)

    async def model_info(self) -> ModelInfo:
        """What a client needs to know to make tokens for the model that runs."""
        digest = await trio.to_thread.run_sync(digest_of, self.text)
        name = self.settings.model_label or self.settings.model
        return ModelInfo(name, self.facts.vocabulary, digest, self.text.eos_token_ids, self.facts.kernel_class)

    def list_sessions(self) -> list[SessionSummary]:
        """A summary of each long-lived session, without its id."""
        return self._registry.summaries()

    def load(self) -> Load:
        """How busy the runtime is."""
        registry, admission = self._registry, self._admission
        return Load(registry.slab_total, registry.slab_in_use, admission.running, admission.waiting)

    def _durable(self) -> SessionStore:
        if self._store is None:
            raise NotDurable("the server keeps no sessions on disk: start it with state_dir")
        return self._store

    async def _open_session(
        self, slab: Slab, terms: Terms, history: array[int] | None = None, *, is_kept: bool = True
    ) -> SessionHandle:
        return self.find_session(await self._registry.open(slab, terms, history, is_kept=is_kept))

    def find_session(self, session_id: str) -> SessionHandle:
        """The session with this id.

        Raises SessionNotFound; with a store that servers share, the session's first call may raise it instead.
        """
        self._registry.check(session_id)
        return SessionHandle(session_id, self._registry, self.text)

    @asynccontextmanager
    async def permit(self) -> AsyncIterator[None]:
        """A permit for one turn of a conversation, as a completion needs one. Raises Saturated."""
        async with self._admission.permits():
            yield

    @asynccontextmanager
    async def completion(
        self, eos_token_ids: Iterable[int], overflow: Overflow, count: int = 1
    ) -> AsyncIterator[CompletionSessions]:
        """Permits and sessions for `count` answers to one prompt; all are free again when the block ends.

        Raises Saturated, and InvalidRequest if the server has fewer permits than `count`.
        """
        check_whole("n", count, 1)
        terms = _terms(eos_token_ids, overflow, "http")
        async with self._admission.permits(count), AsyncExitStack() as held:
            yield CompletionSessions(self._registry, self.text, terms, count, held)


def _terms(eos_token_ids: Iterable[int], overflow: Overflow, label: str) -> Terms:
    """The terms of a session, checked, and bounded in size. Raises InvalidRequest."""
    return Terms(checked_eos_ids(eos_token_ids), checked_overflow(overflow), checked_label(label))


@asynccontextmanager
async def open_runtime(settings: Settings, metrics: Metrics | None = None) -> AsyncIterator[Runtime]:
    """Loads the model and runs sessions until the block ends, counting in `metrics`.

    Raises InvalidSetting, ModelUnavailable or NotEnoughMemory.
    """
    metrics = metrics or Metrics()
    directory = await trio.to_thread.run_sync(find_model, settings.model)
    text = await trio.to_thread.run_sync(Text.load, directory)
    with EngineThread() as thread:
        engine = await thread.run(load_engine, settings, directory)
        _log_start(settings, engine.facts)
        with ExitStack() as stack:
            store = None
            if settings.state_dir:
                identities = _identities(engine.facts, await trio.to_thread.run_sync(fingerprint, directory))
                opened = open_store(
                    settings.state_dir,
                    *identities,
                    most_bytes=settings.state_max_bytes,
                    lease_s=settings.state_lease_s,
                )
                store = await trio.to_thread.run_sync(stack.enter_context, opened)
            async with (
                open_proposing(settings, engine.facts, thread) as new_proposals,
                open_sessions(settings, engine, thread, text, metrics, new_proposals, store) as runtime,
            ):
                yield runtime


@asynccontextmanager
async def open_sessions(
    settings: Settings,
    engine: Engine,
    thread: EngineThread,
    text: Text,
    metrics: Metrics,
    new_proposals: NewProposals = lambda: None,
    store: SessionStore | None = None,
) -> AsyncIterator[Runtime]:
    """Executor, registry and admission over a loaded engine; `new_proposals` is called for each session.

    Raises EngineFailed if the engine fails. What the block raises comes out as it is, and not in an exception group.
    """
    executor = ModelExecutor(engine, thread, metrics)
    with (
        closing(engine.new_pool(settings.capacity)) as long_lived,
        closing(engine.new_pool(settings.max_concurrent)) as completions,
    ):
        async with open_nursery() as executor_nursery:
            executor_nursery.start_soon(executor.run)
            async with open_nursery() as session_nursery:
                registry = SessionRegistry(
                    session_nursery,
                    executor,
                    metrics,
                    vocabulary=engine.facts.vocabulary,
                    idle_ttl_s=settings.idle_ttl_s,
                    long_lived=long_lived,
                    completions=completions,
                    store=store,
                    new_proposals=new_proposals,
                )
                session_nursery.start_soon(registry.expire)
                runtime = Runtime(settings, engine.facts, text, registry, Admission(settings, metrics), metrics, store)
                if store is not None:
                    _delete_lost(store, runtime.conversations)
                yield runtime
                session_nursery.cancel_scope.cancel()
            executor_nursery.cancel_scope.cancel()


def _delete_lost(store: SessionStore, conversations: Conversations) -> None:
    """Deletes the conversation sessions that were lent when an earlier server ended: nobody knows where they stand."""
    if store.has_lost_points:
        # Those may be lost that stood at the points: a fault deletes nothing.
        return
    for record in store.sleeping():
        if record.terms.is_lent and not conversations.stands(record.id):
            store.delete(record)


def _identities(facts: EngineFacts, model: str) -> tuple[HistoryIdentity, SlabIdentity]:
    slab = facts.slab
    kernels = f"{facts.kernel_class}, {'strict' if facts.is_bit_exact else 'fast'}"
    of_slab = SlabIdentity(
        model, facts.backend, kernels, facts.weights, facts.dtype, slab.dtype, slab.sink, slab.window, slab.slots
    )
    return HistoryIdentity(model, facts.vocabulary), of_slab


def _log_start(settings: Settings, facts: EngineFacts) -> None:
    slabs = settings.capacity + settings.max_concurrent
    _log.info(
        "model loaded model=%s architecture=%s device=%s dtype=%s kv_dtype=%s weights=%s form=%r row_tile=%d sink=%d window=%d "
        "session_ceiling_bytes=%d slabs=%d all_slabs_ceiling_bytes=%d",
        *(
            settings.model,
            facts.architecture,
            facts.device,
            facts.dtype,
            facts.slab.dtype,
            facts.weights,
            facts.form_reason,
            facts.row_tile,
        ),
        *(facts.slab.sink, facts.slab.window, facts.slab.ceiling_bytes, slabs, slabs * facts.slab.ceiling_bytes),
    )
    if facts.tensors:
        _log.info("tensors of the file: %s", "; ".join(facts.tensors))
