"""Ask and tell: the whole of the concurrency between actors.

The asker owns the scope in which its answer is computed. When the asker is cancelled, so is the handler that works for it,
at its next checkpoint; a door whose client leaves need do nothing else. The channel has no buffer: until an actor takes a
message, the asker still holds it, and an asker that leaves withdraws it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import outcome
import trio

from runtime.errors import PerennialError, RequestError

R = TypeVar("R")
R_contra = TypeVar("R_contra", contravariant=True)


class Message(Generic[R]):
    """A request whose replies have type R. Subclasses are frozen dataclasses."""

    __slots__ = ()


class ActorStopped(Exception):
    """The actor had ended before it took the message: nothing was done."""


class ActorFailed(Exception):
    """The actor took the message and ended before its last reply."""


@dataclass(frozen=True, slots=True, eq=False)
class Envelope(Generic[R]):
    """A message, where its replies go, and the scope in which they are computed."""

    message: Message[R]
    replies: trio.MemorySendChannel[outcome.Maybe[R]]
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    begun: trio.Event = field(default_factory=trio.Event)

    def begin(self) -> bool:
        """Tells an asker of `ask_to_the_end` that it must stay from now on. Returns False if it has left already."""
        if self.scope.cancel_called:
            self.replies.close()
            return False
        self.begun.set()
        return True


class Replies(Generic[R]):
    """The asking end of a stream of replies."""

    def __init__(self, channel: trio.MemoryReceiveChannel[outcome.Maybe[R]]) -> None:
        self._channel = channel

    async def receive(self) -> R:
        """The next reply; an error that was sent as a reply is raised. Raises ActorFailed if the actor ended instead."""
        try:
            reply = await self._channel.receive()
        except trio.EndOfChannel:
            raise ActorFailed from None
        return reply.unwrap()


class Mailbox:
    """The asking end of an actor."""

    def __init__(self, channel: trio.MemorySendChannel[Envelope[Any]]) -> None:
        self._channel = channel

    async def ask(self, message: Message[R]) -> R:
        """The one reply. Raises ActorStopped, ActorFailed, or what the actor answers with."""
        async with self.stream(message) as replies:
            return await replies.receive()

    async def ask_to_the_end(self, message: Message[R]) -> R:
        """As `ask`, but once the work has begun it waits for the reply even if cancelled.

        For work that writes into what the asker owns.
        """
        async with self._deliver(message, room_for_replies=1) as (envelope, channel):
            try:
                reply = await Replies(channel).receive()
            except trio.Cancelled:
                if not envelope.begun.is_set():
                    raise
                # The work has an effect, so the asker must learn its reply; its next checkpoint raises Cancelled again.
                with trio.CancelScope(shield=True):
                    reply = await Replies(channel).receive()
        return reply

    @asynccontextmanager
    async def stream(self, message: Message[R]) -> AsyncIterator[Replies[R]]:
        """Many replies. Leaving the block cancels the work. Raises ActorStopped."""
        async with self._deliver(message, room_for_replies=0) as (_, channel):
            yield Replies(channel)

    @asynccontextmanager
    async def _deliver(
        self, message: Message[R], room_for_replies: int
    ) -> AsyncIterator[tuple[Envelope[R], trio.MemoryReceiveChannel[outcome.Maybe[R]]]]:
        send, receive = trio.open_memory_channel[outcome.Maybe[R]](room_for_replies)
        envelope = Envelope(message, send)
        with receive:
            try:
                try:
                    await self._channel.send(envelope)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    raise ActorStopped from None
                yield envelope, receive
            finally:
                envelope.scope.cancel()

    def offer(self, message: Message[None]) -> bool:
        """Hands over a message without a reply if the actor is waiting at its inbox right now; returns whether it was."""
        send, receive = trio.open_memory_channel[outcome.Maybe[None]](1)
        receive.close()
        try:
            self._channel.send_nowait(Envelope(message, send))
        except (trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
            return False
        return True


class Reply(Generic[R_contra]):
    """Sends replies to the asker."""

    def __init__(self, envelope: Envelope[Any]) -> None:
        self._envelope = envelope

    async def __call__(self, value: R_contra) -> None:
        """Sends a reply, and returns once the asker has taken it."""
        await _send(self._envelope, outcome.Value(value))

    def offer(self, value: R_contra) -> bool:
        """Sends a reply if the asker is waiting for it right now; returns whether it was."""
        try:
            self._envelope.replies.send_nowait(outcome.Value(value))
        except (trio.WouldBlock, trio.BrokenResourceError):
            return False
        return True


Handler = Callable[[Message[Any], Reply[Any]], Awaitable[None]]


class Inbox:
    """The serving end of an actor. Leaving `with inbox:` tells everyone who waits that the actor has ended."""

    def __init__(self, channel: trio.MemoryReceiveChannel[Envelope[Any]]) -> None:
        self._channel = channel
        self._work: trio.CancelScope | None = None
        self._idle = trio.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()
        self._idle.set()

    @property
    def is_nearly_idle(self) -> bool:
        """Whether the actor will soon be at its inbox: it has just been made, or its last asker has left."""
        return not self._idle.is_set() and (self._work is None or self._work.cancel_called)

    async def idleness(self) -> None:
        """Returns when the actor waits for its next message, or has ended."""
        await self._idle.wait()

    async def take(self) -> Envelope[Any]:
        """The next message, in the order in which askers came."""
        self._idle.set()
        envelope = await self._channel.receive()
        self._work, self._idle = envelope.scope, trio.Event()
        return envelope

    async def handle(self, envelope: Envelope[Any], handler: Handler) -> None:
        """Runs `handler` in the asker's scope.

        A RequestError goes to the asker, and the actor lives; any other PerennialError goes to the asker and on.
        """
        if not envelope.begin():
            return
        with envelope.replies, envelope.scope:
            try:
                await handler(envelope.message, Reply(envelope))
            except RequestError as error:
                await _send(envelope, outcome.Error(error))
            except PerennialError as error:
                try:
                    await _send_last(envelope, outcome.Error(error))
                finally:
                    # The error ends the actor even if the asker leaves before it is told.
                    raise error


async def _send(envelope: Envelope[Any], reply: outcome.Maybe[Any]) -> None:
    try:
        await envelope.replies.send(reply)
    except trio.BrokenResourceError:
        # The asker has left, so its scope is cancelled, and this checkpoint says so.
        await trio.lowlevel.checkpoint()


async def _send_last(envelope: Envelope[Any], reply: outcome.Maybe[Any]) -> None:
    try:
        # No checkpoint if the asker waits, because this actor may be cancelled already while the whole tree ends.
        envelope.replies.send_nowait(reply)
    except trio.BrokenResourceError:
        pass
    except trio.WouldBlock:
        await _send(envelope, reply)


def open_mailbox() -> tuple[Mailbox, Inbox]:
    """The two ends of a new actor's mailbox."""
    send, receive = trio.open_memory_channel[Envelope[Any]](0)
    return Mailbox(send), Inbox(receive)
