"""Answers one question: opens sessions, lets them read the prompt, and streams what they generate."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from math import inf
from typing import Protocol

import outcome
import trio

from actors import Events, Runtime, SessionHandle
from actors.conversations import TurnReport
from actors.handles import CompletionSessions
from actors.nursery import open_nursery
from api.answer import Answer, FinishReason, Part
from api.prompting import Prompt, write_prompt
from api.question import Question
from api.server import Server
from api.traces import Phases, describe_request
from runtime.errors import DeadlineExceeded
from runtime.events import Overflow
from runtime.grammar import Grammar
from runtime.points import Point


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a prompt and an answer.

    `reused` tokens of the prompt had been read before; `evicted` ones are out of sight.
    """

    prompt: int
    completion: int
    reasoning: int
    reused: int
    evicted: int
    broke_at: str | None = None
    because: str | None = None

    @property
    def read(self) -> int:
        return self.prompt - self.reused

    def report(self) -> TurnReport:
        """The part of it that is kept for operators."""
        return TurnReport(self.reused, self.read, self.evicted, self.broke_at, self.because)


@dataclass(frozen=True, slots=True)
class Ending:
    """How one answer ended, and the point from which its conversation continues."""

    finish_reason: FinishReason
    usage: Usage
    point: Point
    stop_string: str | None = None


@dataclass(frozen=True, slots=True)
class _Limit:
    """The limit of an answer: it ends when its time is up, or when the server stops."""

    server: Server
    deadline: float

    @contextmanager
    def holds(self) -> Iterator[None]:
        """Runs the block under the limit. Raises DeadlineExceeded or NotServing if the limit ended it."""
        try:
            with self.server.may_be_ended(), trio.fail_at(self.deadline):
                yield
        except trio.TooSlowError:
            limit = self.server.settings.request_timeout_s
            raise DeadlineExceeded(f"not done within {limit:g} s: ask for less, or raise request_timeout_s") from None


class _Seats(Protocol):
    """Provides the sessions of one question."""

    async def read(self, prompt: Prompt) -> tuple[list[SessionHandle], int]:
        """A session for each answer, each of which has read the prompt, and how many tokens of it had been read before."""
        ...

    def leave(self, point: Point) -> None:
        """Records the point that the first session has reached."""
        ...


class _SingleShot:
    """Sessions made for one completion, which end with it."""

    def __init__(self, completion: CompletionSessions) -> None:
        self._completion = completion

    async def read(self, prompt: Prompt) -> tuple[list[SessionHandle], int]:
        session, length = self._completion.open(prompt.tokens)
        await session.append(prompt.tokens[length:])
        return await self._completion.fork(session), length

    def leave(self, point: Point) -> None:
        pass


class _Standing:
    """The conversation's session that has read most of the prompt."""

    def __init__(self, runtime: Runtime, held: AsyncExitStack) -> None:
        self._runtime = runtime
        self._held = held

    async def read(self, prompt: Prompt) -> tuple[list[SessionHandle], int]:
        self._stand = await self._held.enter_async_context(self._runtime.conversations.stand(prompt.point, prompt.cue))
        # If the client leaves during this, what was read until then stays read.
        self._stand.leave(prompt.point)
        await self._stand.session.append(prompt.tokens[self._stand.length :])
        return [self._stand.session], self._stand.reused

    def leave(self, point: Point) -> None:
        self._stand.leave(point)


class AnswerStream:
    """One answer as it is generated, part by part."""

    def __init__(self, asked: _Asked, events: Events) -> None:
        question = asked.question
        self._asked = asked
        self._events = events
        self._waiting: deque[Part] = deque()
        self.answer = Answer(
            asked.runtime.text,
            question.bounds,
            asked.eos_token_ids,
            asked.prompt.cue,
            stop=question.stop,
            has_logprobs=question.top_logprobs is not None,
            is_in_reasoning=asked.prompt.is_in_reasoning,
        )

    async def next(self) -> Part | None:
        """The next part, or None when the answer has ended. Raises DeadlineExceeded, NotServing."""
        while not self._waiting:
            if self.answer.finish_reason is not None:
                return None
            with self._asked.limit.holds():
                event = await anext(self._events)
            self._waiting += self.answer.take(event)
        return self._waiting.popleft()

    def keep(self) -> Point:
        """Adds what was generated so far to the conversation; returns the point after it."""
        self.answer.break_off()
        tree, answer, point = self._asked.runtime.conversations.points, self.answer, self._asked.prompt.point
        if not answer.items:
            return tree.use(point)
        return tree.grow(point, answer.items, answer.tokens, answer.spans)

    def end(self, kept: Point) -> Ending:
        """Has the metrics and the conversation count the answer, which `keep` added up to `kept`; returns how it ended."""
        answer, runtime = self.answer, self._asked.runtime
        assert answer.finish_reason is not None
        # The conversation continues after all that was said: a call that was cut off is left out.
        is_said = kept.node.is_answer and answer.items
        point = Point(kept.node, kept.node.spans[-1].end) if is_said else kept
        ending = Ending(answer.finish_reason, self._usage(), point, answer.stop_string)
        runtime.metrics.completions_total.labels(ending.finish_reason).inc()
        runtime.conversations.record_turn(point, ending.usage.report())
        return ending

    def _usage(self) -> Usage:
        asked, answer = self._asked, self.answer
        total = len(asked.prompt.tokens) + answer.drawn
        return Usage(
            prompt=len(asked.prompt.tokens),
            completion=answer.drawn,
            reasoning=answer.reasoning_tokens,
            reused=asked.reused,
            evicted=max(0, total - asked.runtime.shape.visible),
            broke_at=asked.prompt.broke_at,
            because=asked.prompt.because,
        )


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the answers to one question have in common."""

    runtime: Runtime
    question: Question
    prompt: Prompt
    grammar: Grammar | None
    eos_token_ids: frozenset[int]
    most_tokens: int
    reused: int
    limit: _Limit


_Sent = tuple[int, outcome.Maybe[Part | Ending]]


class Answers:
    """The answers to one question; their parts come interleaved, as they are generated."""

    def __init__(self, prompt: Prompt, count: int, sent: trio.MemoryReceiveChannel[_Sent]) -> None:
        self._sent = sent
        self._completion_tokens = 0
        self.prompt_tokens = len(prompt.tokens)
        self.prompt = prompt
        self.count = count

    async def next(self) -> tuple[int, Part | Ending] | None:
        """The index of an answer and its next part; None when all have ended. Raises the error of one that failed."""
        try:
            index, sent = await self._sent.receive()
        except trio.EndOfChannel:
            used = {"input": self.prompt_tokens, "output": self._completion_tokens}
            describe_request({f"gen_ai.usage.{name}_tokens": count for name, count in used.items()})
            return None
        part = sent.unwrap()
        if isinstance(part, Ending):
            self._completion_tokens += part.usage.completion
        return index, part


@asynccontextmanager
async def open_answers(
    server: Server, runtime: Runtime, question: Question, start: Point | None = None, *, is_single_shot: bool = False
) -> AsyncIterator[Answers]:
    """The answers to a question that follows `start`, or begins a conversation. The model has yet to read it.

    One that `is_single_shot` runs on a completion's slab and within its time, any other on a session of its conversation's.
    Permits and slabs are free again once the answers have ended, so that who has them may ask for the next, or when the block
    ends. Raises Saturated, InvalidRequest, SlabOverflow, DeadlineExceeded, NotServing.
    """
    async with open_nursery() as nursery:
        yield await nursery.start(_answer_all, server, runtime, question, start, is_single_shot)
        nursery.cancel_scope.cancel()


async def _answer_all(
    server: Server,
    runtime: Runtime,
    question: Question,
    start: Point | None,
    is_single_shot: bool,
    *,
    task_status: trio.TaskStatus[Answers],
) -> None:
    settings = runtime.settings
    forgets = _forgets(runtime, question)
    eos_token_ids = frozenset() if question.ignores_eos else runtime.text.eos_token_ids
    channel, sent = trio.open_memory_channel[_Sent](0)
    with channel, Phases() as phases:
        phases.begin("queue")
        async with AsyncExitStack() as held:
            with server.may_be_ended():
                seats = await _seats(runtime, question, eos_token_ids, forgets, is_single_shot, held)
            phases.begin("prefill")
            limit = _Limit(server, trio.current_time() + (settings.request_timeout_s if is_single_shot else inf))
            with limit.holds():
                grammar = await trio.to_thread.run_sync(question.bounds.grammar, runtime.text)
                prompt = await write_prompt(
                    server.reader, runtime, question, start, most_prompt_tokens(runtime, question)
                )
            most_tokens = _most_tokens(runtime, question, len(prompt.tokens), forgets, is_single_shot)
            task_status.started(Answers(prompt, question.count, sent))
            try:
                with limit.holds():
                    sessions, reused = await seats.read(prompt)
            except Exception as error:
                await channel.send((0, outcome.Error(error)))
                return
            phases.begin("decode")
            asked = _Asked(runtime, question, prompt, grammar, eos_token_ids, most_tokens, reused, limit)
            async with open_nursery() as answering:
                for index, session in enumerate(sessions):
                    answering.start_soon(_answer, asked, index, session, seats, channel)


async def _seats(
    runtime: Runtime,
    question: Question,
    eos_token_ids: frozenset[int],
    forgets: bool,
    is_single_shot: bool,
    held: AsyncExitStack,
) -> _Seats:
    if is_single_shot:
        overflow = Overflow.EVICT if forgets else Overflow.ERROR
        return _SingleShot(await held.enter_async_context(runtime.completion(eos_token_ids, overflow, question.count)))
    await held.enter_async_context(runtime.permit())
    return _Standing(runtime, held)


def _forgets(runtime: Runtime, question: Question) -> bool:
    return runtime.settings.http_overflow == "evict" if question.forgets is None else question.forgets


def most_prompt_tokens(runtime: Runtime, question: Question) -> float:
    """The most tokens that the prompt may have: any number where those that do not fit are evicted."""
    return inf if _forgets(runtime, question) else runtime.shape.visible


def _most_tokens(runtime: Runtime, question: Question, prompt_tokens: int, forgets: bool, is_single_shot: bool) -> int:
    """The most tokens that an answer may have."""
    visible = runtime.shape.visible
    most = question.max_tokens or (runtime.settings.default_max_tokens if is_single_shot else visible)
    return most if forgets or is_single_shot else max(1, min(most, visible - prompt_tokens))


async def _answer(
    asked: _Asked, index: int, session: SessionHandle, seats: _Seats, channel: trio.MemorySendChannel[_Sent]
) -> None:
    """Sends one answer's parts and its Ending to `channel`, or the error that ended it."""
    question = asked.question
    generation = session.generate(
        asked.most_tokens,
        temperature=question.temperature,
        top_p=question.top_p,
        top_k=question.top_k,
        # Each answer gets a seed of its own, so that they differ; the first has the seed that a single answer would have.
        seed=None if question.seed is None else (question.seed + index) % 2**64,
        top_logprobs=question.top_logprobs,
        grammar=asked.grammar,
    )
    last: outcome.Maybe[Part | Ending]
    try:
        async with generation as events:
            stream = AnswerStream(asked, events)
            try:
                while (part := await stream.next()) is not None:
                    await channel.send((index, outcome.Value(part)))
            finally:
                kept = stream.keep()
                seats.leave(kept)
            last = outcome.Value(stream.end(kept))
    except Exception as error:
        last = outcome.Error(error)
    await channel.send((index, last))
