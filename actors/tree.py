"""The tree of actors: start and stop order read as indentation. And the handles that users hold."""

from __future__ import annotations

import logging
import secrets
from array import array
from collections.abc import AsyncIterator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager, suppress

import trio

from actors.admission import Admission
from actors.executor import EngineThread, ModelExecutor
from actors.mailbox import ActorFailed, ActorStopped, Mailbox, Replies, open_mailbox
from actors.messages import Append, Appended, Close, Export, Generate, Info, Load, Saved, SessionInfo, SessionSummary
from actors.nursery import open_nursery
from actors.registry import NO_SESSION, SessionRegistry
from runtime.engine import Engine, EngineFacts, load_engine
from runtime.errors import CapacityExhausted, InvalidRequest, NotDurable, SessionFailed, SessionNotFound
from runtime.events import Done, Event, Overflow, Sampling
from runtime.grammar import Grammar
from runtime.metrics import Metrics
from runtime.models import find_model
from runtime.settings import Settings
from runtime.slab import Slab
from runtime.snapshot import Identity, Terms, fingerprint
from runtime.state import StateDirectory
from runtime.text import Text

_log = logging.getLogger("perennial")

# Scheduler passes in which a session that was made or answered just now comes to its inbox, where it can be evicted.
_PASSES_TO_INBOX = 2


class Events:
    """The events of one generation: at most one HistoryTruncated, tokens, exactly one Done."""

    def __init__(self, replies: Replies[Event]) -> None:
        self._replies = replies
        self._is_done = False

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        """The next event. Raises SessionFailed where the session ended before its last word."""
        if self._is_done:
            raise StopAsyncIteration
        with _as_session_errors():
            event = await self._replies.receive()
        self._is_done = isinstance(event, Done)
        return event


class SessionHandle:
    """A user's end of one session. Calls on one session are served in the order in which they come.

    Every call raises SessionNotFound once the session was closed or evicted.
    """

    def __init__(self, session_id: str, mailbox: Mailbox) -> None:
        self.id = session_id
        self._mailbox = mailbox

    async def append(self, token_ids: Iterable[int], expected_history_length: int | None = None) -> Appended:
        """Adds to the history, and returns once the model has read it.

        Raises InvalidRequest for an id outside the vocabulary, HistoryMismatch where the history is not of
        `expected_history_length`, SlabOverflow where the session refuses to forget; then nothing was appended.
        """
        try:
            tokens = tuple(array("I", token_ids))
        except (TypeError, OverflowError) as error:
            raise InvalidRequest(f"token ids must be whole numbers of 32 bits: {error}", "token_ids") from None
        with _as_session_errors():
            return await self._mailbox.ask(Append(tokens, expected_history_length))

    @asynccontextmanager
    async def generate(
        self,
        max_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        top_logprobs: int | None = None,
        grammar: Grammar | None = None,
    ) -> AsyncIterator[Events]:
        """The events of a generation of at most `max_tokens`; leaving the block cancels the work.

        Greedy unless `temperature` > 0; without a seed one is drawn. With `top_logprobs` tokens come with their
        logprobs; under a `grammar` the text is one of it unless `max_tokens` cut it. Raises InvalidRequest.
        """
        sampling = Sampling(temperature, top_p, top_k, secrets.randbits(64) if seed is None else seed)
        generate = Generate(max_tokens, sampling, top_logprobs, grammar)
        async with AsyncExitStack() as stack:
            with _as_session_errors():
                replies = await stack.enter_async_context(self._mailbox.stream(generate))
            yield Events(replies)

    async def info(self) -> SessionInfo:
        with _as_session_errors():
            return await self._mailbox.ask(Info())

    async def close(self) -> int:
        """Ends the session and returns the length of its history; by then its slab is free again."""
        with _as_session_errors():
            async with self._mailbox.stream(Close()) as replies:
                length = await replies.receive()
                # After its answer the session runs to its end without a pause; only the stream's end tells that it has.
                with suppress(ActorFailed):
                    await replies.receive()
                return length


@contextmanager
def _as_session_errors() -> Iterator[None]:
    try:
        yield
    except ActorStopped:
        raise SessionNotFound(NO_SESSION) from None
    except ActorFailed:
        raise SessionFailed("the session has failed: make a new one and append its history again") from None


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
        state: StateDirectory | None,
    ) -> None:
        self.settings = settings
        self.facts = facts
        self.text = text
        self.metrics = metrics
        self._registry = registry
        self._admission = admission
        self._state = state

    async def create_session(
        self, eos_token_ids: Iterable[int] = (), *, overflow: Overflow = Overflow.EVICT, label: str = ""
    ) -> SessionHandle:
        """A new long-lived session. Raises CapacityExhausted when every slab is held by a session at work."""
        terms = Terms(frozenset(eos_token_ids), overflow, label)
        for _ in range(_PASSES_TO_INBOX):
            await trio.lowlevel.checkpoint()
            with suppress(CapacityExhausted):
                return self.find_session(self._registry.create(terms))
        await trio.lowlevel.checkpoint()
        return self.find_session(self._registry.create(terms))

    async def fork_session(self, session_id: str) -> SessionHandle:
        """A new session that goes on where this one stands, on a copy of its slab; no forward runs for it.

        Raises SessionNotFound, CapacityExhausted.
        """
        mailbox = self._registry.find(session_id)
        await trio.lowlevel.checkpoint()
        with self._registry.free_slab(beside=session_id) as target:
            return self.find_session(self._registry.open(target, *await _copied(mailbox, target)))

    async def save_session(self, session_id: str) -> Saved:
        """Writes a snapshot of the session under `state_dir`. Raises SessionNotFound, NotDurable, StorageFailed."""
        state = self._durable()

        def save(terms: Terms, slab: Slab, history: array[int]) -> Saved:
            return Saved(*state.save(terms, slab, history), len(history))

        with _as_session_errors():
            return await self._registry.find(session_id).ask(Export(save))

    async def restore_session(self, snapshot_id: str) -> SessionHandle:
        """A new session that goes on where the saved one stood.

        Raises NotDurable, SnapshotNotFound, SnapshotMismatch, SnapshotUnreadable, CapacityExhausted.
        """
        state = self._durable()
        await trio.lowlevel.checkpoint()
        with self._registry.free_slab() as slab:
            terms, history = await trio.to_thread.run_sync(state.load, snapshot_id, slab)
            return self.find_session(self._registry.open(slab, terms, history))

    def list_sessions(self) -> list[SessionSummary]:
        """What an operator may know of the long-lived sessions."""
        return self._registry.summaries()

    def load(self) -> Load:
        """How busy the runtime is."""
        registry, admission = self._registry, self._admission
        return Load(registry.slab_total, registry.slab_in_use, admission.running, admission.waiting)

    def _durable(self) -> StateDirectory:
        if self._state is None:
            raise NotDurable("the server keeps no sessions on disk: start it with state_dir")
        return self._state

    def find_session(self, session_id: str) -> SessionHandle:
        """The session with this id. Raises SessionNotFound."""
        return SessionHandle(session_id, self._registry.find(session_id))

    @asynccontextmanager
    async def completion(
        self, eos_token_ids: Iterable[int], overflow: Overflow, count: int = 1
    ) -> AsyncIterator[Completion]:
        """Permits and sessions for `count` answers to one prompt; all are free again when the block ends.

        Raises Saturated, and InvalidRequest where there will never be so many permits.
        """
        async with self._admission.permits(count), AsyncExitStack() as held:
            yield Completion(self._registry, Terms(frozenset(eos_token_ids), overflow, "http"), count, held)


class Completion:
    """One prompt and its answers: a session reads the prompt and is forked into those that answer besides it."""

    def __init__(self, registry: SessionRegistry, terms: Terms, count: int, held: AsyncExitStack) -> None:
        """Its `count` sessions, at most so many slabs as there are permits for, are closed with `held`."""
        self._registry = registry
        self._count = count
        self._held = held
        with registry.completion_slab() as slab:
            self.session = self._open(slab, terms)

    async def fork(self) -> tuple[SessionHandle, ...]:
        """Every session that answers, the first included, once the prompt was appended to that one."""
        sessions = [self.session]
        for _ in range(self._count - 1):
            with self._registry.completion_slab() as slab:
                sessions.append(self._open(slab, *await _copied(self._registry.find(self.session.id), slab)))
        return tuple(sessions)

    def _open(self, slab: Slab, terms: Terms, history: array[int] | None = None) -> SessionHandle:
        session_id = self._registry.open_completion(slab, terms, history)
        session = SessionHandle(session_id, self._registry.find(session_id))
        self._held.push_async_callback(_end, session)
        return session


async def _end(session: SessionHandle) -> None:
    # Nobody appends or generates any more, so the session is within one forward of its inbox. One that has failed has
    # given up its slab already.
    with trio.CancelScope(shield=True), suppress(SessionNotFound, SessionFailed):
        await session.close()


async def _copied(mailbox: Mailbox, target: Slab) -> tuple[Terms, array[int]]:
    """Copies a session's slab into `target`, and returns its terms and history."""

    def copy(terms: Terms, slab: Slab, history: array[int]) -> tuple[Terms, array[int]]:
        target.copy_from(slab)
        return terms, array("I", history)

    with _as_session_errors():
        # To the end, for the copy writes into a slab that is the caller's to give back.
        return await mailbox.ask_to_the_end(Export(copy))


@asynccontextmanager
async def open_runtime(settings: Settings, metrics: Metrics | None = None) -> AsyncIterator[Runtime]:
    """Loads the model and runs sessions until the block ends, counting in `metrics`.

    Raises InvalidSetting, ModelUnavailable or NotEnoughMemory.
    """
    metrics = metrics or Metrics()
    directory = await trio.to_thread.run_sync(find_model, settings.model)
    text = await trio.to_thread.run_sync(Text.load, directory)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine") as pool:
        thread = EngineThread(pool)
        engine = await thread.run(load_engine, settings, directory)
        _log_start(settings, engine.facts)
        with ExitStack() as stack:
            state = None
            if settings.state_dir:
                identity = _identity(engine.facts, settings, await trio.to_thread.run_sync(fingerprint, directory))
                state = stack.enter_context(StateDirectory.open(settings.state_dir, identity))
            async with open_sessions(settings, engine, thread, text, metrics, state) as runtime:
                yield runtime


@asynccontextmanager
async def open_sessions(
    settings: Settings,
    engine: Engine,
    thread: EngineThread,
    text: Text,
    metrics: Metrics,
    state: StateDirectory | None = None,
) -> AsyncIterator[Runtime]:
    """Executor, registry and admission over an engine that is loaded.

    Raises EngineFailed where the engine fails, and what the block raises as it is, in no group.
    """
    asking, inbox = open_mailbox()
    async with open_nursery() as executor_nursery:
        executor_nursery.start_soon(ModelExecutor(engine, thread, inbox, metrics).run)
        async with open_nursery() as session_nursery:
            registry = SessionRegistry(
                session_nursery,
                asking,
                metrics,
                vocabulary=engine.facts.vocabulary,
                idle_ttl_s=settings.idle_ttl_s,
                long_lived=engine.new_pool(settings.capacity),
                completions=engine.new_pool(settings.max_concurrent),
                state=state,
            )
            registry.recover()
            yield Runtime(settings, engine.facts, text, registry, Admission(settings, metrics), metrics, state)
            session_nursery.cancel_scope.cancel()
        executor_nursery.cancel_scope.cancel()


def _identity(facts: EngineFacts, settings: Settings, model: str) -> Identity:
    slab = facts.slab
    return Identity(model, settings.weights, facts.dtype, slab.sink, slab.window, slab.ring)


def _log_start(settings: Settings, facts: EngineFacts) -> None:
    slabs = settings.capacity + settings.max_concurrent
    _log.info(
        "model loaded model=%s architecture=%s device=%s dtype=%s row_tile=%d sink=%d window=%d "
        "session_ceiling_bytes=%d slabs=%d all_slabs_ceiling_bytes=%d",
        *(settings.model, facts.architecture, facts.device, facts.dtype, facts.row_tile),
        *(facts.slab.sink, facts.slab.window, facts.slab.ceiling_bytes, slabs, slabs * facts.slab.ceiling_bytes),
    )
