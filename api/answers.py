"""The two forms of one answer: a JSON body, or server-sent events."""

from __future__ import annotations

import secrets
import time
from typing import Any

from quart.wrappers.response import ResponseBody

from api.completions import CompletionStream, Ending
from api.replies import as_http
from api.schemas import Answer, Choice, Chunk, ChunkChoice, Completion, CountedChunk, Delta


class Heading:
    """What every part of one answer says of it."""

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


async def whole_answer(stream: CompletionStream, model: str) -> Completion:
    """The answer in one piece."""
    pieces: list[str] = []
    while isinstance(piece := await stream.next(), str):
        pieces.append(piece)
    choice = Choice(message=Answer(content="".join(pieces)), finish_reason=piece.finish_reason)
    return Heading(model).completion(choices=[choice], usage=piece.usage, evicted_token_count=piece.evicted_token_count)


class ServerSentEvents(ResponseBody):
    """The answer as `data:` events: a role, pieces of text, why it ended, and `[DONE]`; or an error and no `[DONE]`."""

    def __init__(self, stream: CompletionStream, model: str, has_usage: bool) -> None:
        self._stream = stream
        self._heading = Heading(model)
        self._kind = CountedChunk if has_usage else Chunk
        self._ready = [self._choice(ChunkChoice(delta=Delta(role="assistant", content="")))]
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
            piece = await self._stream.next()
        except Exception as error:
            self._has_ended = True
            return [_event(as_http(error)[1].model_dump_json())]
        if isinstance(piece, Ending):
            self._has_ended = True
            return self._last_events(piece)
        return [self._choice(ChunkChoice(delta=Delta(content=piece)))]

    def _last_events(self, ending: Ending) -> list[bytes]:
        last = ChunkChoice(delta=Delta(), finish_reason=ending.finish_reason)
        events = [self._choice(last, evicted_token_count=ending.evicted_token_count)]
        if self._kind is CountedChunk:
            events.append(self._heading.chunk(CountedChunk, usage=ending.usage))
        return [*events, _event("[DONE]")]

    def _choice(self, choice: ChunkChoice, **more: Any) -> bytes:
        return self._heading.chunk(self._kind, choice, **more)


def _event(data: str) -> bytes:
    return f"data: {data}\n\n".encode()
