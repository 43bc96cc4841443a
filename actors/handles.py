"""What users hold: handles on sessions and generations, and the sessions of one completion."""

from __future__ import annotations

import secrets
from array import array
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from typing import TypeVar

import trio

from actors.mailbox import ActorFailed, ActorStopped, Message, Replies
from actors.messages import Append, Branch, Close, Fork, Generate, Info, Rewind, Rewound, Save
from actors.registry import NO_SESSION, SessionRegistry
from runtime.checks import checked_tokens
from runtime.durable import Terms
from runtime.errors import InvalidRequest, SessionFailed, SessionNotFound
from runtime.events import Done, Event, Sampling
from runtime.grammar import Grammar
from runtime.sessions import Appended, Saved, SessionInfo
from runtime.slab import Slab
from runtime.text import Text

R = TypeVar("R")


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
        with as_session_errors():
            event = await self._replies.receive()
        if isinstance(event, Done):
            self._is_done = True
            with trio.CancelScope(shield=True), suppress(ActorFailed):
                # Wait until the session is back at its inbox, so that a caller who has seen Done finds it idle.
                await self._replies.receive()
        return event


class SessionHandle:
    """A user's handle on one session. Calls on one session are served in the order in which they come.

    A session that sleeps on disk is woken by the next call. Every call raises SessionNotFound once the session was closed, or
    evicted without a place to sleep, CapacityExhausted if it sleeps and no slab is free, and StorageFailed if it cannot be woken.
    """

    def __init__(self, session_id: str, registry: SessionRegistry, text: Text) -> None:
        self.id = session_id
        self._registry = registry
        self._text = text

    async def append(self, token_ids: Iterable[int], expected_history_length: int | None = None) -> Appended:
        """Adds to the history, and returns once the model has read it.

        Raises InvalidRequest for an id outside the vocabulary, HistoryMismatch where the history is not of
        `expected_history_length`, SlabOverflow where the session refuses to forget; then nothing was appended.
        """
        append = Append(checked_tokens(token_ids), expected_history_length)
        with as_session_errors():
            return await self._ask(append)

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
        logprobs; under a `grammar`, one of `Runtime.text`, the text is one of it unless `max_tokens` cut it. Raises
        InvalidRequest.
        """
        sampling = Sampling(temperature, top_p, top_k, secrets.randbits(64) if seed is None else seed)
        generate = Generate(max_tokens, sampling, top_logprobs, grammar)
        # A grammar's masks index tokens of its own tokenizer: with another tokenizer they would allow the wrong text.
        if grammar is not None and grammar.tokenizer_digest != await trio.to_thread.run_sync(digest_of, self._text):
            raise InvalidRequest("the grammar is of another tokenizer: make it with Runtime.text", "grammar")
        async with AsyncExitStack() as stack:
            with as_session_errors():
                replies = await stack.enter_async_context(self._stream(generate))
            yield Events(replies)

    async def info(self) -> SessionInfo:
        """What the session holds. Raises SessionNotFound, SessionFailed, and what waking it raises, as every call does."""
        with as_session_errors():
            return await self._ask(Info())

    async def save(self) -> Saved:
        """Writes a snapshot. Raises NotDurable, StorageFailed."""
        with as_session_errors():
            return await self._ask(Save())

    async def rewind(self, history: array[int]) -> Rewound:
        """Cuts the session's history back to the beginning that it shares with `history`; returns what is left."""
        with as_session_errors():
            return await self._ask(Rewind(history))

    async def fork_into(self, target: Slab) -> Branch:
        """Copies the slab into `target`, an empty one that the caller owns."""
        with as_session_errors():
            # A copy that has begun is waited for, because it writes into the caller's slab.
            mailbox = await self._registry.mailbox(self.id)
            return await mailbox.ask_to_the_end(Fork(target))

    async def close(self) -> int:
        """Ends the session and returns the length of its history. When it returns, the slab is free."""
        with as_session_errors():
            async with self._stream(Close()) as replies:
                length = await replies.receive()
                # The end of the stream shows that the session's task has ended and its slab is free.
                with suppress(ActorFailed):
                    await replies.receive()
                return length

    async def _ask(self, message: Message[R]) -> R:
        async with self._stream(message) as replies:
            return await replies.receive()

    @asynccontextmanager
    async def _stream(self, message: Message[R]) -> AsyncIterator[Replies[R]]:
        async with AsyncExitStack() as stack:
            while True:
                mailbox = await self._registry.mailbox(self.id)
                try:
                    replies = await stack.enter_async_context(mailbox.stream(message))
                    break
                except ActorStopped:
                    # The session fell asleep before it took the message, or has ended; the registry knows which, once the
                    # session's task has run on.
                    await trio.lowlevel.checkpoint()
            yield replies


def digest_of(text: Text) -> bytes:
    """The digest of a tokenizer. The first call takes long for a large vocabulary: make it in a thread."""
    return text.digest


@contextmanager
def as_session_errors() -> Iterator[None]:
    try:
        yield
    except ActorStopped:
        raise SessionNotFound(NO_SESSION) from None
    except ActorFailed:
        raise SessionFailed("the session has failed: make a new one and append its history again") from None


class CompletionSessions:
    """One prompt and its answers: one session reads the prompt, and is forked for each further answer."""

    def __init__(self, registry: SessionRegistry, text: Text, terms: Terms, count: int, held: AsyncExitStack) -> None:
        """It opens at most `count` sessions, for which the caller has permits. They are closed when `held` is."""
        self._registry = registry
        self._text = text
        self._terms = terms
        self._count = count
        self._held = held

    def open(self, prompt: array[int]) -> tuple[SessionHandle, int]:
        """The first session, and how many of the prompt's first tokens its slab has read for an earlier session."""
        with self._registry.completion_slab(prompt) as slab:
            held = prompt[: slab.frontier]
            return self._open(slab, self._terms, held or None), len(held)

    async def fork(self, session: SessionHandle) -> list[SessionHandle]:
        """All sessions that answer, the first included. The prompt must have been appended to the first."""
        sessions = [session]
        for _ in range(self._count - 1):
            with self._registry.completion_slab() as slab:
                branch = await session.fork_into(slab)
                sessions.append(self._open(slab, branch.terms, branch.history))
        return sessions

    def _open(self, slab: Slab, terms: Terms, history: array[int] | None = None) -> SessionHandle:
        session_id = self._registry.open_completion(slab, terms, history)
        session = SessionHandle(session_id, self._registry, self._text)
        self._held.push_async_callback(_end, session)
        return session


async def _end(session: SessionHandle) -> None:
    # Nobody appends or generates any more, so the session is back at its inbox within one forward. A failed one has no slab.
    with trio.CancelScope(shield=True), suppress(SessionNotFound, SessionFailed):
        await session.close()
