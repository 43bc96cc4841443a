"""The session actor: one long-lived conversation."""

from __future__ import annotations

import hashlib
import logging
import sys
from array import array
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from enum import Enum
from typing import Any, assert_never, cast

import trio

from actors.executor import ModelExecutor
from actors.feed import Feed
from actors.mailbox import Envelope, Inbox, Message, Reply
from actors.messages import (
    Append,
    Branch,
    Close,
    Evict,
    Fork,
    Generate,
    Info,
    Rewind,
    Rewound,
    Save,
    SessionMessage,
)
from actors.nursery import open_nursery
from actors.proposing import Proposals
from actors.storing import call_in_thread, call_store
from actors.turn import Tally, TurnClock
from runtime.checks import MAX_APPEND_TOKENS, check_whole
from runtime.durable import Durable, SlabWriter, Terms
from runtime.errors import HistoryMismatch, InvalidRequest, NotDurable, SessionMoved, SlabOverflow, StorageFailed
from runtime.events import Done, Event, HistoryTruncated, Overflow, StopReason, Token
from runtime.grammar import Constraint, Mask
from runtime.metrics import Metrics
from runtime.sampling import Draw
from runtime.sessions import Appended, Saved, SessionInfo
from runtime.slab import Slab, common_length

# A session that has been idle this long saves its slab, if the saved one lacks more than this share of what a token sees.
_IDLE_BEFORE_WRITING_S = 2.0
_LEFT_BEHIND = 1 / 8

_log = logging.getLogger("perennial.state")


class EndReason(Enum):
    """Why a session came to its end."""

    CLOSED = "close"
    IDLE = "ttl"
    EVICTED = "lru"
    MOVED = "moved"


class Session:
    """Holds the history and the slab; serves its mailbox in order, one message at a time."""

    def __init__(
        self,
        slab: Slab,
        inbox: Inbox,
        executor: ModelExecutor,
        metrics: Metrics,
        *,
        vocabulary: int,
        terms: Terms,
        idle_ttl_s: float,
        history: array[int] | None = None,
        durable: Durable | None = None,
        proposals: Proposals | None = None,
        woken_length: int = 0,
    ) -> None:
        """With a `history` the session continues it. The slab has read it up to its frontier; a `durable` record has all of it.

        If the session was woken, its first `woken_length` tokens were read before, here or by another server.
        """
        self._slab = slab
        self._inbox = inbox
        self._lease = executor.lease()
        self._feed = Feed(slab, self._lease)
        self._metrics = metrics
        self._vocabulary = vocabulary
        self._terms = terms
        self._idle_ttl_s = idle_ttl_s
        self._durable = durable
        self._proposals = proposals
        self._woken_length = woken_length
        self._history = array("I")
        self._digest = hashlib.blake2b()
        if history is not None:
            self._commit(history)
        self._ending: EndReason | None = None
        self._last_used = trio.current_time()
        self._turn_began: float | None = None

    @property
    def history_length(self) -> int:
        return len(self._history)

    @property
    def evicted_token_count(self) -> int:
        """Tokens of the history that no later token can attend to."""
        return max(0, len(self._history) - self._slab.spec.visible)

    @property
    def last_used(self) -> float:
        """When the last append or generation ended, in trio's time."""
        return self._last_used

    @property
    def is_nearly_idle(self) -> bool:
        """Whether it will soon wait for a message: it is new or its asker has just left, and none of its rows run."""
        return self._inbox.is_nearly_idle and not self._lease.is_running

    async def idleness(self) -> None:
        """Returns when it waits for its next message, or has ended."""
        await self._inbox.idleness()

    @property
    def terms(self) -> Terms:
        return self._terms

    @property
    def read(self) -> array[int]:
        """The tokens of the history that the slab has read."""
        return self._history[: self._feed.length]

    async def run(self) -> EndReason:
        """Serves until closed, evicted, idle too long or moved; returns which.

        Raises InvariantViolation or EngineFailed when the session has failed.
        """
        with self._inbox:
            while self._ending is None:
                envelope = await (self._take_and_write() if self._is_slab_on_disk_old else self._take())
                if envelope is None:
                    return await self._end_for_its_age()
                await self._inbox.handle(envelope, self._handle)
        return self._ending

    async def leave_slab_on_disk(self) -> None:
        """Saves the slab of a durable session beside its history. No other call of the session may run meanwhile.

        If the slab cannot be written, or has gone to another session by then, the history will be read again.
        """
        if self._durable is None or self._feed.length <= self._durable.slab_length:
            return
        lease = self._slab.leases
        try:
            await call_store(self._durable, self._durable.check)
            writer = self._durable.new_writer(self._slab, self._history)
        except (StorageFailed, SessionMoved):
            return
        try:
            while await call_in_thread(writer.step):
                pass
            if self._slab.leases == lease:
                # In one call, so that no slab is on disk that the store does not count.
                await call_in_thread(_finish, self._durable, writer)
        except StorageFailed as error:
            _log.warning("%s", error)
        finally:
            writer.close()

    @property
    def _is_slab_on_disk_old(self) -> bool:
        """Whether waking would have to read many tokens again."""
        if self._durable is None:
            return False
        return self._feed.length - self._durable.slab_length >= self._slab.spec.visible * _LEFT_BEHIND

    async def _take(self) -> Envelope[Any] | None:
        """The next message; None if none comes for `idle_ttl_s`."""
        with trio.CancelScope(deadline=self._last_used + self._idle_ttl_s):
            return await self._inbox.take()
        return None

    async def _take_and_write(self) -> Envelope[Any] | None:
        """As `_take`. Until the message comes, and after a while without one, the slab is saved piece by piece."""
        envelope: Envelope[Any] | None = None
        try:
            async with open_nursery() as nursery:
                nursery.start_soon(self._write_when_idle)
                envelope = await self._take()
                # The message waits for the piece that is being written; if the tree ends meanwhile, its asker is told.
                nursery.cancel_scope.cancel()
        except BaseException:
            if envelope is not None:
                envelope.replies.close()
            raise
        return envelope

    async def _write_when_idle(self) -> None:
        await trio.sleep(_IDLE_BEFORE_WRITING_S)
        await self.leave_slab_on_disk()

    async def _end_for_its_age(self) -> EndReason:
        try:
            if self._durable is not None:
                await call_store(self._durable, self._durable.end)
        except SessionMoved:
            return EndReason.MOVED
        except StorageFailed as error:
            _log.warning("%s", error)
            return EndReason.EVICTED
        return EndReason.IDLE

    async def _handle(self, message: Message[Any], reply: Reply[Any]) -> None:
        request = cast(SessionMessage, message)
        try:
            if self._durable is not None and not isinstance(request, Evict):
                # If another server had taken the session, an answer from this one's state would be outdated.
                await call_store(self._durable, self._durable.check)
            await self._serve(request, reply)
        except SessionMoved:
            self._ending = EndReason.MOVED
            raise

    async def _serve(self, request: SessionMessage, reply: Reply[Any]) -> None:
        match request:
            case Append():
                await reply(await self._append(request))
            case Generate():
                await self._generate(request, reply)
            case Info():
                await reply(self._info())
            case Fork(target):
                await trio.to_thread.run_sync(target.copy_from, self._slab)
                await reply(Branch(self._terms, array("I", self._history), self._durable is not None))
            case Save():
                if self._durable is None:
                    raise NotDurable("this session is not kept on disk: start the server with state_dir")
                saved = await call_in_thread(self._durable.save, self._slab, self._history)
                await reply(Saved(saved.snapshot_id, saved.size_bytes, saved.history_length))
            case Rewind(history):
                await reply(await self._rewind(common_length(self._history, history)))
            case Close():
                if self._durable is not None:
                    await call_store(self._durable, self._durable.end)
                self._ending = EndReason.CLOSED
                await reply(len(self._history))
            case Evict():
                self._ending = EndReason.EVICTED
            case _:
                assert_never(request)

    async def _append(self, request: Append) -> Appended:
        # The tokens join the history at once, and the slab reads them as forwards run: an append that is cancelled half-way
        # has happened, and the next request reads the rest.
        self._check_append(request)
        if self._turn_began is None:
            self._turn_began = trio.current_time()
        tokens = array("I", request.token_ids)
        before = self._feed.length
        await self._record(tokens)
        self._commit(tokens)
        try:
            await self._feed.read(self._history)
        finally:
            await self._mark_used()
        return Appended(len(self._history), self.evicted_token_count, self._digest.digest(), self._reread(before))

    async def _rewind(self, length: int) -> Rewound:
        if length == len(self._history):
            return Rewound(length, self._feed.length)
        if self._durable is not None:
            self._durable.take_back(length)
            if self._durable.slab_length > length:
                # What is noted in the record has to be done here too, even if the asker leaves.
                with trio.CancelScope(shield=True):
                    await call_in_thread(self._durable.forget_slab)
        del self._history[length:]
        self._digest = hashlib.blake2b(_little_endian(self._history))
        self._feed.retract(length)
        if self._proposals:
            self._proposals.rewind(length)
        await self._mark_used()
        return Rewound(length, self._feed.length)

    def _check_append(self, request: Append) -> None:
        token_ids, expected = request.token_ids, request.expected_history_length
        if expected is not None and expected != len(self._history):
            raise HistoryMismatch(f"history_length is {len(self._history)}, not {expected}: append what is missing")
        if len(token_ids) > MAX_APPEND_TOKENS:
            raise InvalidRequest(f"one append takes {MAX_APPEND_TOKENS} tokens at most: split it", "token_ids")
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self._vocabulary:
            raise InvalidRequest(f"token ids must be from 0 to {self._vocabulary - 1}", "token_ids")
        longest = self._slab.spec.visible
        if self._terms.overflow is Overflow.ERROR and len(self._history) + len(token_ids) > longest:
            raise SlabOverflow(
                f"{len(self._history)} tokens held and {len(token_ids)} more exceed sink + window = {longest}: "
                "nothing was appended"
            )

    async def _generate(self, request: Generate, reply: Reply[Event]) -> None:
        self._check_generate(request)
        self._metrics.generate_prefill_tokens.observe(max(1, len(self._history) - self._feed.length))
        clock, tally = TurnClock(self._metrics, self._terms.label, self._turn_began), Tally(self._metrics)
        before = self._feed.length
        try:
            if self.evicted_token_count:
                await reply(HistoryTruncated(self.evicted_token_count))
            with self._lease:
                stop_reason = await self._hand_over_tokens(request, reply, clock, tally)
            counts = (tally.proposed, tally.accepted, self._reread(before))
            await reply(Done(stop_reason, tally.generated, *clock.seconds(), *counts))
        finally:
            # Tokens that were drawn ahead and not taken are not part of the history.
            self._feed.retract(len(self._history))
            await self._mark_used()

    def _check_generate(self, request: Generate) -> None:
        if request.top_logprobs is not None:
            check_whole("top_logprobs", request.top_logprobs, 0, self._vocabulary)
        if not self._history:
            raise InvalidRequest("the session has no history: append tokens first")

    async def _hand_over_tokens(
        self, request: Generate, reply: Reply[Event], clock: TurnClock, tally: Tally
    ) -> StopReason:
        constraint = request.grammar.follow() if request.grammar else None
        recorded = len(self._history)
        try:
            while tally.generated < request.max_tokens:
                if self._is_full:
                    return StopReason.TRUNCATED
                tokens, checked = await self._draw(request, constraint, request.max_tokens - tally.generated - 1)
                tally.check(checked)
                drawn = [*tokens]
                if tally.generated:
                    await self._draw_on(request, drawn, request.max_tokens - tally.generated)
                await self._record(_ids_of(drawn))
                recorded += len(drawn)
                for index, token in enumerate(drawn):
                    if self._is_full:
                        return StopReason.TRUNCATED
                    clock.tick(len(self._history))
                    self._turn_began = None
                    await self._hand_over(token, reply, is_first=index == 0)
                    # Of the tokens that one forward draws, all but the last had been proposed.
                    tally.take(was_proposed=index < len(tokens) - 1)
                    if constraint:
                        constraint.accept(token.token_id)
                    if token.token_id in self._terms.eos_token_ids or (constraint and constraint.is_complete):
                        return StopReason.EOS
            return StopReason.MAX_TOKENS
        finally:
            if self._durable is not None and recorded > len(self._history):
                self._durable.take_back(len(self._history))

    @property
    def _is_full(self) -> bool:
        """Whether one more token would make the session forget, which its terms forbid."""
        return self._terms.overflow is Overflow.ERROR and len(self._history) >= self._slab.spec.visible

    def _reread(self, before: int) -> int:
        """How many tokens of before it woke the session has read again since its slab had read `before` tokens."""
        return max(0, min(self._woken_length, self._feed.length) - before)

    async def _mark_used(self) -> None:
        self._last_used = trio.current_time()
        if self._durable is not None:
            # Shielded, because tokens that were taken back must be so before the next message, even if the asker has left.
            with trio.CancelScope(shield=True):
                await call_store(self._durable, self._durable.used, self._history)

    def _info(self) -> SessionInfo:
        spec = self._slab.spec
        return SessionInfo(
            history_length=len(self._history),
            kv_live_bytes=self._slab.live_bytes,
            kv_ceiling_bytes=spec.ceiling_bytes,
            evicted_token_count=self.evicted_token_count,
            sink=spec.sink,
            window=spec.window,
            idle_seconds=trio.current_time() - self._last_used,
            history_digest=self._digest.digest(),
        )

    async def _hand_over(self, token: Token, reply: Reply[Event], *, is_first: bool) -> None:
        """Gives the token to the asker and, once that has taken it, adds it to the history.

        `is_first` of those that a forward drew.
        """
        if not reply.offer(token):
            # The asker had a whole forward's time to come for the first token, and no time to come for the others.
            with self._lease.held_up() if is_first else nullcontext():
                await reply(token)
        self._commit(_ids_of((token,)))

    async def _record(self, tokens: array[int]) -> None:
        if self._durable is not None:
            await call_store(self._durable, self._durable.record, len(self._history), tokens)

    def _commit(self, tokens: array[int]) -> None:
        self._history += tokens
        if self._proposals:
            self._proposals.extend(tokens)
        self._digest.update(_little_endian(tokens))

    async def _draw_on(self, request: Generate, drawn: list[Token], most: int) -> None:
        """Adds tokens to `drawn`, up to `most` in all, that the store writes at once: a write for each would cost too much.

        Not with a proposer, whose tokens come several at once anyway, nor with a grammar, which has to follow what was
        taken.
        """
        if self._durable is None or self._proposals or request.grammar or not self._durable.group_s:
            return
        # More than a tile of tokens could not be taken back.
        most = min(most, self._slab.spec.row_tile)
        if self._terms.overflow is Overflow.ERROR:
            most = min(most, self._slab.spec.visible - len(self._history))
        until = trio.current_time() + self._durable.group_s
        history = self._history + _ids_of(drawn)
        draw = Draw(request.sampling, None, request.top_logprobs)
        while len(drawn) < most and drawn[-1].token_id not in self._terms.eos_token_ids:
            if trio.current_time() >= until:
                return
            tokens, _ = await self._feed.draw(history, [], [draw])
            drawn += tokens
            history += _ids_of(tokens)

    async def _draw(self, request: Generate, constraint: Constraint | None, most: int) -> tuple[tuple[Token, ...], int]:
        """The tokens that follow the history, at least one, and how many proposed tokens were checked, at most `most`."""
        began, is_decode = trio.current_time(), self._feed.length >= len(self._history) - 1
        proposal = await self._proposals.next(self._history, most, request.sampling) if self._proposals else []
        masks: Sequence[Mask | None] = [None] * (len(proposal) + 1)
        if constraint:
            # In a thread, because a mask may take tenths of a second.
            masks = await trio.to_thread.run_sync(constraint.allowed_along, proposal)
        draws = [Draw(request.sampling, mask, request.top_logprobs) for mask in masks]
        tokens, checked = await self._feed.draw(self._history, proposal[: len(draws) - 1], draws)
        if self._proposals and is_decode:
            self._proposals.learn(checked, len(tokens) - 1, trio.current_time() - began)
        return tokens, checked


def _finish(durable: Durable, writer: SlabWriter) -> None:
    writer.finish()
    durable.wrote(writer)


def _ids_of(tokens: Iterable[Token]) -> array[int]:
    return array("I", [token.token_id for token in tokens])


def _little_endian(tokens: array[int]) -> bytes:
    copied = array("I", tokens)
    if sys.byteorder == "big":
        copied.byteswap()
    return copied.tobytes()
