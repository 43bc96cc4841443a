"""One chat completion: sessions made for it, and their events folded into text, calls and logprobs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass

import outcome
import trio

from actors import Events, Runtime, SessionHandle
from actors.nursery import open_nursery
from api.bounds import Bounds
from api.logprobs import SentLogprobs
from api.reading import Reading
from api.request import CompletionRequest
from api.schemas import ChosenLogprob, FinishReason, Usage
from api.server import Server
from api.stop_strings import StopStrings
from api.traces import Phases, describe_request
from runtime.errors import DeadlineExceeded
from runtime.events import Done, HistoryTruncated, Overflow, StopReason, Token
from runtime.grammar import Grammar
from runtime.tools import Call

# What OpenAI's own service draws with when a request names none.
_DEFAULT_TEMPERATURE = 1.0


@dataclass(frozen=True, slots=True)
class Piece:
    """What came next in one answer; `logprobs` are those of tokens whose text has been sent to its end."""

    text: str = ""
    calls: tuple[Call, ...] = ()
    logprobs: tuple[ChosenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Ending:
    """The last word of one answer."""

    finish_reason: FinishReason
    completion_tokens: int
    evicted_token_count: int


@dataclass(frozen=True, slots=True)
class _Limit:
    """When a completion has to end: with its time, or with the server."""

    server: Server
    deadline: float

    @contextmanager
    def holds(self) -> Iterator[None]:
        """Raises DeadlineExceeded or NotServing where the block was ended."""
        try:
            with self.server.may_be_ended(), trio.fail_at(self.deadline):
                yield
        except trio.TooSlowError:
            limit = self.server.settings.request_timeout_s
            raise DeadlineExceeded(f"not done within {limit:g} s: ask for less, or raise request_timeout_s") from None


@dataclass(frozen=True, slots=True)
class _Question:
    """What all answers to one prompt share."""

    runtime: Runtime
    request: CompletionRequest
    bounds: Bounds
    grammar: Grammar | None
    eos_token_ids: frozenset[int]
    prompt_tokens: int
    limit: _Limit


class AnswerStream:
    """One answer as it is generated, piece by piece, then its Ending."""

    def __init__(self, question: _Question, events: Events) -> None:
        request, text = question.request, question.runtime.text
        self._question = question
        self._events = events
        self._stops = StopStrings(request.stop or [])
        self._logprobs = SentLogprobs(text, question.eos_token_ids) if request.logprobs else None
        self._reader = question.bounds.reader()
        self._detokenizer = text.detokenizer()
        self._completion_tokens = 0
        self._has_called = False
        self._ending: Ending | None = None

    async def next(self) -> Piece | Ending:
        """What comes next, never an empty piece. Raises DeadlineExceeded, NotServing."""
        while self._ending is None:
            with self._question.limit.holds():
                event = await anext(self._events)
            match event:
                case Token():
                    self._completion_tokens += 1
                    text = self._detokenizer.feed(event.token_id)
                    if self._logprobs:
                        self._logprobs.feed(event, text)
                    piece = self._piece(self._stops.feed(text))
                    if self._stops.has_stopped:
                        self._ending = self._end("stop")
                case Done(stop_reason):
                    piece = self._piece(self._stops.end(), is_last=True)
                    self._ending = self._end("stop" if stop_reason is StopReason.EOS else "length")
                case HistoryTruncated():
                    continue
            if piece != Piece():
                return piece
        self._question.runtime.metrics.completions_total.labels(self._ending.finish_reason).inc()
        return self._ending

    def _piece(self, text: str, *, is_last: bool = False) -> Piece:
        logprobs = self._logprobs.sent(text, is_last=is_last) if self._logprobs else ()
        if self._reader is None:
            return Piece(text, logprobs=logprobs)
        said = [*self._reader.feed(text), *([self._reader.end()] if is_last else [])]
        calls = tuple(one for one in said if isinstance(one, Call))
        self._has_called = self._has_called or bool(calls)
        return Piece("".join(one for one in said if isinstance(one, str)), calls)

    def _end(self, finish_reason: FinishReason) -> Ending:
        if self._has_called and finish_reason == "stop":
            finish_reason = "tool_calls"
        total = self._question.prompt_tokens + self._completion_tokens
        visible = self._question.runtime.facts.slab.visible
        return Ending(finish_reason, self._completion_tokens, max(0, total - visible))


class CompletionStream:
    """The answers to one prompt, in the order in which their pieces come."""

    def __init__(self, prompt_tokens: int, count: int, said: trio.MemoryReceiveChannel[_Said]) -> None:
        self._prompt_tokens = prompt_tokens
        self._completion_tokens = 0
        self._said = said
        self.count = count

    async def next(self) -> tuple[int, Piece | Ending] | None:
        """The index of an answer and what comes next in it; None when all have ended. Raises what ended one."""
        try:
            index, said = await self._said.receive()
        except trio.EndOfChannel:
            used = {"input": self._prompt_tokens, "output": self._completion_tokens}
            describe_request({f"gen_ai.usage.{name}_tokens": count for name, count in used.items()})
            return None
        piece = said.unwrap()
        if isinstance(piece, Ending):
            self._completion_tokens += piece.completion_tokens
        return index, piece

    @property
    def usage(self) -> Usage:
        """What has been used by now."""
        return Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            total_tokens=self._prompt_tokens + self._completion_tokens,
        )


_Said = tuple[int, outcome.Maybe[Piece | Ending]]


@asynccontextmanager
async def open_completion(server: Server, runtime: Runtime, reading: Reading) -> AsyncIterator[CompletionStream]:
    """The stream of a completion whose prompt the model has read.

    Permits and slabs are free again once the stream has ended, so that who has the whole answer may ask for the next,
    or when the block ends. Raises Saturated, InvalidRequest, SlabOverflow, DeadlineExceeded, NotServing.
    """
    async with open_nursery() as nursery:
        yield await nursery.start(_complete, server, runtime, reading)
        nursery.cancel_scope.cancel()


async def _complete(
    server: Server, runtime: Runtime, reading: Reading, *, task_status: trio.TaskStatus[CompletionStream]
) -> None:
    settings = runtime.settings
    text, request, prompt = runtime.text, reading.asked, reading.prompt
    overflow = Overflow.ERROR if settings.http_overflow == "error" else Overflow.EVICT
    eos_token_ids = frozenset() if request.ignore_eos else text.eos_token_ids
    count = request.n or 1
    channel, said = trio.open_memory_channel[_Said](0)
    with channel, Phases() as phases:
        phases.begin("queue")
        async with AsyncExitStack() as held:
            with server.may_be_ended():
                completion = await held.enter_async_context(runtime.completion(eos_token_ids, overflow, count))
            phases.begin("prefill")
            limit = _Limit(server, trio.current_time() + settings.request_timeout_s)
            with limit.holds():
                grammar = await trio.to_thread.run_sync(reading.bounds.grammar, text)
                await completion.session.append(prompt)
                sessions = await completion.fork()
            phases.begin("decode")
            question = _Question(runtime, request, reading.bounds, grammar, eos_token_ids, len(prompt), limit)
            async with open_nursery() as answering:
                for index, session in enumerate(sessions):
                    answering.start_soon(_answer, question, index, session, channel)
                task_status.started(CompletionStream(len(prompt), count, said))


async def _answer(
    question: _Question, index: int, session: SessionHandle, channel: trio.MemorySendChannel[_Said]
) -> None:
    """Passes on one answer's pieces and its ending, or the error that ended it."""
    request = question.request
    generation = session.generate(
        request.max_completion_tokens or request.max_tokens or question.runtime.settings.default_max_tokens,
        temperature=_DEFAULT_TEMPERATURE if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        top_k=request.top_k or 0,
        # Answers to one prompt are to differ, and the first is the one that would come alone.
        seed=None if request.seed is None else (request.seed + index) % 2**64,
        top_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        grammar=question.grammar,
    )
    last: outcome.Maybe[Piece | Ending]
    try:
        async with generation as events:
            stream = AnswerStream(question, events)
            while isinstance(piece := await stream.next(), Piece):
                await channel.send((index, outcome.Value(piece)))
        last = outcome.Value(piece)
    except Exception as error:
        last = outcome.Error(error)
    await channel.send((index, last))
