"""What users hold: the ends of sessions and generations, and the sessions of one completion."""

from __future__ import annotations

import secrets
from array import array
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from itertools import islice
from typing import TypeVar

import trio

from actors.mailbox import ActorFailed, ActorStopped, Message, Replies
from actors.messages import Append, Branch, Close, Fork, Generate, Info, Rewind, Rewound, Save
from actors.registry import NO_SESSION, SessionRegistry
from actors.session import MAX_APPEND_TOKENS
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
                # After its last word the session goes to its inbox without a pause: whoever has it may count on that.
                await self._replies.receive()
        return event


class SessionHandle:
    """A user's end of one session. Calls on one session are served in the order in which they come.

    A session that sleeps on disk is woken by the next call. Every call raises SessionNotFound once the session was closed or
    evicted, CapacityExhausted where it sleeps and no slab is to be had, and StorageFailed where it cannot be woken.
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
        append = Append(_tokens(token_ids), expected_history_length)
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
        # Its masks number the tokens of its own tokenizer: under another they would let through what it never said.
        if grammar is not None and grammar.tokenizer_digest != await trio.to_thread.run_sync(digest_of, self._text):
            raise InvalidRequest("the grammar is of another tokenizer: make it with Runtime.text", "grammar")
        async with AsyncExitStack() as stack:
            with as_session_errors():
                replies = await stack.enter_async_context(self._stream(generate))
            yield Events(replies)

    async def info(self) -> SessionInfo:
        with as_session_errors():
            return await self._ask(Info())

    async def save(self) -> Saved:
        """Writes a snapshot. Raises NotDurable, StorageFailed."""
        with as_session_errors():
            return await self._ask(Save())

    async def rewind(self, history: array[int]) -> Rewound:
        """Takes back of the session's history what `history` does not begin with too."""
        with as_session_errors():
            return await self._ask(Rewind(history))

    async def fork_into(self, target: Slab) -> Branch:
        """Copies the slab into an empty one, which is the caller's to give back."""
        with as_session_errors():
            # To the end, for the copy writes into what the caller owns.
            mailbox = await self._registry.mailbox(self.id)
            return await mailbox.ask_to_the_end(Fork(target))

    async def close(self) -> int:
        """Ends the session and returns the length of its history; by then its slab is free again."""
        with as_session_errors():
            async with self._stream(Close()) as replies:
                length = await replies.receive()
                # After its answer the session runs to its end without a pause; only the stream's end tells that it has.
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
                    # It fell asleep before it took the message, or has ended: the registry knows which.
                    continue
            yield replies


def digest_of(text: Text) -> bytes:
    """Whose first use takes long for a large vocabulary: it belongs into a thread."""
    return text.digest


def _tokens(token_ids: Iterable[int]) -> tuple[int, ...]:
    """No more of them than show that they are too many. Raises InvalidRequest."""
    try:
        return tuple(array("I", islice(iter(token_ids), MAX_APPEND_TOKENS + 1)))
    except (TypeError, OverflowError) as error:
        raise InvalidRequest(f"token ids must be whole numbers of 32 bits: {error}", "token_ids") from None


@contextmanager
def as_session_errors() -> Iterator[None]:
    try:
        yield
    except ActorStopped:
        raise SessionNotFound(NO_SESSION) from None
    except ActorFailed:
        raise SessionFailed("the session has failed: make a new one and append its history again") from None


class Completion:
    """One prompt and its answers: a session reads the prompt and is forked into those that answer besides it."""

    def __init__(self, registry: SessionRegistry, text: Text, terms: Terms, count: int, held: AsyncExitStack) -> None:
        """Its `count` sessions, at most so many slabs as there are permits for, are closed with `held`."""
        self._registry = registry
        self._text = text
        self._terms = terms
        self._count = count
        self._held = held

    def open(self, prompt: array[int]) -> tuple[SessionHandle, int]:
        """The first session, and how much of the prompt's beginning it has read, from a slab that an earlier one left."""
        with self._registry.completion_slab(prompt) as slab:
            held = prompt[: slab.frontier]
            return self._open(slab, self._terms, held or None), len(held)

    async def fork(self, session: SessionHandle) -> list[SessionHandle]:
        """Every session that answers, the first included, once the prompt was appended to that one."""
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
    # Nobody appends or generates any more, so the session is within one forward of its inbox. One that has failed has
    # given up its slab already.
    with trio.CancelScope(shield=True), suppress(SessionNotFound, SessionFailed):
        await session.close()
