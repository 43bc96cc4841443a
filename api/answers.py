"""The two forms of one completion: a JSON body, or server-sent events."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from quart.wrappers.response import ResponseBody

from api.completions import CompletionStream, Ending, Piece
from api.replies import as_http
from api.schemas import (
    Answer,
    AnsweredCall,
    Choice,
    ChoiceLogprobs,
    ChosenLogprob,
    Chunk,
    ChunkChoice,
    Completion,
    CountedChunk,
    Delta,
    DeltaCall,
    NamedCall,
)
from runtime.tools import Call


class Heading:
    """What every part of one completion says of it."""

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
        return _event(kind(**self._fields, choices=list(choices), **more).model_dump_json())


@dataclass
class _Gathered:
    """One answer as far as it has come."""

    text: str = ""
    calls: list[Call] = field(default_factory=list)
    logprobs: list[ChosenLogprob] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.calls += piece.calls
        self.logprobs += piece.logprobs

    def choice(self, index: int, ending: Ending, has_logprobs: bool) -> Choice:
        # Beside calls, an answer without words is none and not an empty one.
        content = (self.text.strip() or None) if self.calls else self.text
        return Choice(
            index=index,
            message=Answer(content=content, tool_calls=[AnsweredCall(**_answered(call)) for call in self.calls]),
            logprobs=ChoiceLogprobs(content=self.logprobs) if has_logprobs else None,
            finish_reason=ending.finish_reason,
        )


async def whole_answer(stream: CompletionStream, model: str, *, has_logprobs: bool) -> Completion:
    """The completion in one piece."""
    gathered = [_Gathered() for _ in range(stream.count)]
    endings: dict[int, Ending] = {}
    while said := await stream.next():
        index, piece = said
        if isinstance(piece, Ending):
            endings[index] = piece
        else:
            gathered[index].add(piece)
    return Heading(model).completion(
        choices=[one.choice(index, endings[index], has_logprobs) for index, one in enumerate(gathered)],
        usage=stream.usage,
        evicted_token_count=max(ending.evicted_token_count for ending in endings.values()),
    )


class ServerSentEvents(ResponseBody):
    """The completion as `data:` events: for each answer a role, its pieces and why it ended; then `[DONE]`.

    After an error, which is an event too, there is no `[DONE]`.
    """

    def __init__(self, stream: CompletionStream, model: str, *, has_usage: bool, has_logprobs: bool) -> None:
        self._stream = stream
        self._heading = Heading(model)
        self._kind = CountedChunk if has_usage else Chunk
        self._has_logprobs = has_logprobs
        role = Delta(role="assistant", content="")
        self._ready = [self._choice(ChunkChoice(index=index, delta=role)) for index in range(stream.count)]
        self._call_counts = [0] * stream.count
        self._has_ended = False

    async def __aenter__(self) -> ServerSentEvents:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    def __aiter__(self) -> ServerSentEvents:
        return self

    async def __anext__(self) -> bytes:
        if not self._ready:
            if self._has_ended:
                raise StopAsyncIteration
            self._ready += await self._next_events()
        return self._ready.pop(0)

    async def _next_events(self) -> list[bytes]:
        try:
            said = await self._stream.next()
        except Exception as error:
            self._has_ended = True
            return [_event(as_http(error)[1].model_dump_json())]
        if said is None:
            self._has_ended = True
            counted = (
                [self._heading.chunk(CountedChunk, usage=self._stream.usage)] if self._kind is CountedChunk else []
            )
            return [*counted, _event("[DONE]")]
        index, piece = said
        if isinstance(piece, Ending):
            last = ChunkChoice(index=index, delta=Delta(), finish_reason=piece.finish_reason)
            return [self._choice(last, evicted_token_count=piece.evicted_token_count)]
        return [self._choice(ChunkChoice(index=index, delta=self._delta(index, piece), logprobs=self._logprobs(piece)))]

    def _delta(self, index: int, piece: Piece) -> Delta:
        first = self._call_counts[index]
        self._call_counts[index] += len(piece.calls)
        calls = [DeltaCall(index=number, **_answered(call)) for number, call in enumerate(piece.calls, first)]
        return Delta(content=None if calls and not piece.text else piece.text, tool_calls=calls or None)

    def _logprobs(self, piece: Piece) -> ChoiceLogprobs | None:
        return ChoiceLogprobs(content=list(piece.logprobs)) if self._has_logprobs else None

    def _choice(self, choice: ChunkChoice, **more: Any) -> bytes:
        return self._heading.chunk(self._kind, choice, **more)


def _answered(call: Call) -> dict[str, Any]:
    return {"id": f"call_{secrets.token_hex(12)}", "function": NamedCall(name=call.name, arguments=call.arguments)}


def _event(data: str) -> bytes:
    return f"data: {data}\n\n".encode()
