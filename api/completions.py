"""One chat completion: a session made for it, and its events folded into text."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import trio

from actors import Events, Runtime
from api.schemas import CompletionRequest, FinishReason, Usage
from api.stop_strings import StopStrings
from runtime.errors import DeadlineExceeded
from runtime.events import Done, HistoryTruncated, Overflow, StopReason, Token
from runtime.text import Detokenizer

# What OpenAI's own service draws with when a request names none.
_DEFAULT_TEMPERATURE = 1.0


@dataclass(frozen=True, slots=True)
class Ending:
    """The last word of a completion."""

    finish_reason: FinishReason
    usage: Usage
    evicted_token_count: int


class CompletionStream:
    """Text as it is generated, piece by piece, then one Ending."""

    def __init__(
        self,
        runtime: Runtime,
        events: Events,
        stops: StopStrings,
        prompt_tokens: int,
        deadline: float,
    ) -> None:
        self._runtime = runtime
        self._events = events
        self._stops = stops
        self._detokenizer: Detokenizer = runtime.text.detokenizer()
        self._prompt_tokens = prompt_tokens
        self._completion_tokens = 0
        self._deadline = deadline
        self._ending: Ending | None = None

    async def next(self) -> str | Ending:
        """The next piece of text, never empty, or the ending. Raises DeadlineExceeded."""
        while self._ending is None:
            with _deadline(self._deadline, self._runtime):
                event = await anext(self._events)
            match event:
                case Token(token_id):
                    self._completion_tokens += 1
                    text = self._stops.feed(self._detokenizer.feed(token_id))
                    if self._stops.has_stopped:
                        self._ending = self._end("stop")
                    if text:
                        return text
                case Done(stop_reason):
                    self._ending = self._end("stop" if stop_reason is StopReason.EOS else "length")
                    if rest := self._stops.end():
                        return rest
                case HistoryTruncated():
                    pass
        self._runtime.metrics.completions_total.labels(self._ending.finish_reason).inc()
        return self._ending

    def _end(self, finish_reason: FinishReason) -> Ending:
        total = self._prompt_tokens + self._completion_tokens
        return Ending(
            finish_reason,
            Usage(prompt_tokens=self._prompt_tokens, completion_tokens=self._completion_tokens, total_tokens=total),
            max(0, total - self._runtime.facts.slab.visible),
        )


@asynccontextmanager
async def open_completion(runtime: Runtime, request: CompletionRequest) -> AsyncIterator[CompletionStream]:
    """The stream of a completion whose prompt has been read. Permit and slab are free again when the block ends.

    Raises Saturated, MalformedRequest, SlabOverflow, DeadlineExceeded.
    """
    settings = runtime.settings
    overflow = Overflow.ERROR if settings.http_overflow == "error" else Overflow.EVICT
    eos_token_ids = () if request.ignore_eos else runtime.text.eos_token_ids
    temperature, top_p = request.temperature, request.top_p
    async with runtime.completion(eos_token_ids, overflow) as session:
        deadline = trio.current_time() + settings.request_timeout_s
        with _deadline(deadline, runtime):
            messages = [message.for_template() for message in request.messages]
            # Megabytes of prompt take seconds to tokenise.
            prompt = await trio.to_thread.run_sync(runtime.text.render, messages)
            await session.append(prompt)
        generation = session.generate(
            request.max_completion_tokens or request.max_tokens or settings.default_max_tokens,
            temperature=_DEFAULT_TEMPERATURE if temperature is None else temperature,
            top_p=1.0 if top_p is None else top_p,
            top_k=request.top_k or 0,
            seed=None if request.seed is None else request.seed % 2**64,
        )
        async with generation as events:
            yield CompletionStream(runtime, events, StopStrings(request.stop or []), len(prompt), deadline)


@contextmanager
def _deadline(deadline: float, runtime: Runtime) -> Iterator[None]:
    try:
        with trio.fail_at(deadline):
            yield
    except trio.TooSlowError:
        limit = runtime.settings.request_timeout_s
        raise DeadlineExceeded(f"not done within {limit:g} s: ask for less, or raise request_timeout_s") from None
