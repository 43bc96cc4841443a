"""The two forms of one completion: a JSON body, or server-sent events."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field, replace
from typing import Any

from api.answer import CallBegun, CallGrown, ItemDone, Said, Thought
from api.answering import Answers, Ending
from api.answering import Usage as Counts
from api.dialects.chat.schemas import (
    Answer,
    AnsweredCall,
    Choice,
    ChoiceLogprobs,
    Chunk,
    ChunkChoice,
    Completion,
    CompletionDetails,
    CountedChunk,
    Delta,
    DeltaCall,
    DeltaFunction,
    NamedCall,
    PromptDetails,
    Usage,
)
from api.event_stream import EventStream, data_event
from api.logprobs import ChosenLogprob
from api.replies import as_http
from api.reuse import reuse_of
from runtime.items import Call


class Heading:
    """The fields that every part of one completion repeats."""

    def __init__(self, model: str) -> None:
        self._fields: dict[str, Any] = {
            "id": f"chatcmpl-{secrets.token_hex(16)}",
            "created": int(time.time()),
            "model": model,
        }

    def completion(self, **more: Any) -> Completion:
        return Completion(**self._fields, **more)

    def chunk(self, kind: type[Chunk], *choices: ChunkChoice, **more: Any) -> bytes:
        """A chunk as an event."""
        return data_event(kind(**self._fields, choices=list(choices), **more).model_dump_json())


@dataclass
class _Gathered:
    """One answer as it has been gathered so far."""

    text: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    logprobs: list[ChosenLogprob] = field(default_factory=list)

    def add(self, part: object) -> None:
        match part:
            case Said(text, logprobs):
                self.text += text
                self.logprobs += logprobs
            case Thought(text):
                self.reasoning += text
            case ItemDone(Call() as call):
                self.calls.append(call)

    def choice(self, index: int, ending: Ending, has_logprobs: bool) -> Choice:
        # Beside calls, an answer without words has no content, rather than empty content.
        content = (self.text.strip() or None) if self.calls else self.text
        calls = [
            AnsweredCall(id=call.call_id, function=NamedCall(name=call.name, arguments=call.arguments))
            for call in self.calls
        ]
        return Choice(
            index=index,
            message=Answer(content=content, reasoning_content=self.reasoning or None, tool_calls=calls),
            logprobs=ChoiceLogprobs(content=self.logprobs) if has_logprobs else None,
            finish_reason=ending.finish_reason,
        )


async def whole_answer(answers: Answers, model: str, *, has_logprobs: bool) -> Completion:
    """The completion in one piece."""
    gathered = [_Gathered() for _ in range(answers.count)]
    endings: dict[int, Ending] = {}
    while said := await answers.next():
        index, part = said
        if isinstance(part, Ending):
            endings[index] = part
        else:
            gathered[index].add(part)
    return Heading(model).completion(
        choices=[one.choice(index, endings[index], has_logprobs) for index, one in enumerate(gathered)],
        usage=_usage([*endings.values()]),
        evicted_token_count=max(ending.usage.evicted for ending in endings.values()),
    )


class CompletionEvents(EventStream):
    """The completion as `data:` events: for each answer a role, its parts and why it ended; then `[DONE]`.

    An error is an event too, and no `[DONE]` follows it.
    """

    def __init__(self, answers: Answers, model: str, *, has_usage: bool, has_logprobs: bool) -> None:
        self._answers = answers
        self._heading = Heading(model)
        self._kind = CountedChunk if has_usage else Chunk
        self._has_logprobs = has_logprobs
        self._call_counts = [0] * answers.count
        self._endings: list[Ending] = []
        role = Delta(role="assistant", content="")
        super().__init__(self._choice(ChunkChoice(index=index, delta=role)) for index in range(answers.count))

    async def next_events(self) -> list[bytes]:
        said = await self._answers.next()
        if said is None:
            counted = [self._heading.chunk(CountedChunk, usage=_usage(self._endings))]
            self.close()
            return [*(counted if self._kind is CountedChunk else ()), data_event("[DONE]")]
        index, part = said
        match part:
            case Ending(finish_reason, usage):
                self._endings.append(part)
                last = ChunkChoice(index=index, delta=Delta(), finish_reason=finish_reason)
                return [self._choice(last, evicted_token_count=usage.evicted)]
            case Said(text, logprobs):
                return [self._delta(index, Delta(content=text), logprobs)]
            case Thought(text):
                return [self._delta(index, Delta(reasoning_content=text))]
            case CallBegun(call_id, name):
                self._call_counts[index] += 1
                return [self._call(index, DeltaFunction(name=name, arguments=""), id=call_id, type="function")]
            case CallGrown(arguments):
                return [self._call(index, DeltaFunction(arguments=arguments))]
            case ItemDone():
                return []

    def silence(self) -> list[bytes]:
        """An event without content. Comments would not do: some clients' timeouts do not count them."""
        return [self._choice(ChunkChoice(index=0, delta=Delta()))]

    def failure(self, error: Exception) -> list[bytes]:
        return [data_event(as_http(error)[1].model_dump_json())]

    def _call(self, index: int, function: DeltaFunction, **more: Any) -> bytes:
        call = DeltaCall(index=self._call_counts[index] - 1, function=function, **more)
        return self._delta(index, Delta(tool_calls=[call]))

    def _delta(self, index: int, delta: Delta, logprobs: tuple[ChosenLogprob, ...] = ()) -> bytes:
        told = ChoiceLogprobs(content=list(logprobs)) if self._has_logprobs else None
        return self._choice(ChunkChoice(index=index, delta=delta, logprobs=told))

    def _choice(self, choice: ChunkChoice, **more: Any) -> bytes:
        return self._heading.chunk(self._kind, choice, **more)


def _usage(endings: list[Ending]) -> Usage:
    """The usage of all answers to one prompt together."""
    counts: list[Counts] = [ending.usage for ending in endings]
    first, completion = counts[0], sum(count.completion for count in counts)
    return Usage(
        prompt_tokens=first.prompt,
        completion_tokens=completion,
        total_tokens=first.prompt + completion,
        prompt_tokens_details=PromptDetails(
            cached_tokens=first.reused,
            **reuse_of(replace(first, evicted=max(count.evicted for count in counts))).model_dump(),
        ),
        completion_tokens_details=CompletionDetails(reasoning_tokens=sum(count.reasoning for count in counts)),
    )
