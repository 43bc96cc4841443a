"""`/v1/messages`: Anthropic's Messages, on conversations that the server holds."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel
from quart import Response, request

from api.answer import Part
from api.answering import Answers, Ending, open_answers
from api.dialects.messages.events import Event, MessageError, MessageWriter, as_messages_error
from api.dialects.messages.request import MessageRequest, read
from api.event_stream import EventStream, named_event
from api.http.connection import held_by, read_question, request_body
from api.http.routes import ANSWER_ERRORS, EVENTS, JSON, Door, EventKinds, Family, Operation
from api.http.standard import json_response
from api.reading import ReadBody, Write
from api.traces import describe_request

MESSAGES = Family("/v1/messages", False, MessageError, as_messages_error, key_header="x-api-key")


class MessageObject(BaseModel):
    """Anthropic's message."""

    id: str
    type: str
    role: str
    content: list[dict[str, Any]]
    stop_reason: str | None


class MessageEvent(BaseModel):
    """One of Anthropic's events of a message, told apart by `type`."""

    type: str


class TokenCount(BaseModel):
    input_tokens: int


class Greeting(BaseModel):
    message: str = "hello"


_CREATE = Operation(
    "Answers a conversation, as JSON or, with `stream`, as server-sent events.",
    {200: {JSON: MessageObject, EVENTS: EventKinds((MessageEvent,))}},
    ANSWER_ERRORS,
    MessageRequest,
)
_COUNT = Operation("Counts the tokens of a prompt.", {200: {JSON: TokenCount}}, ANSWER_ERRORS, MessageRequest)
_HELLO = Operation("Says that somebody is here, to clients that ask before they begin.", {200: {JSON: Greeting}})


def add_message_routes(door: Door) -> None:
    server = door.server

    @door.route("POST", MESSAGES.base, _CREATE, MESSAGES)
    async def create_message() -> Response:
        held = held_by(request)
        runtime = held.enter_context(server.call())
        describe_request({"gen_ai.request.model": server.label})
        asked, question = await read_question(server, read)
        answers = await held.enter_async_context(open_answers(server, runtime, question))
        writer = MessageWriter(server.label, answers.prompt_tokens)
        if not asked.stream:
            while (said := await answers.next()) is not None:
                _events_of_part(writer, said[1])
            return Response(json.dumps(writer.message), content_type=JSON)
        response = Response(content_type=f"{EVENTS}; charset=utf-8", headers={"Cache-Control": "no-cache"})
        response.response = _MessageEvents(answers, writer)
        return response

    @door.route("POST", f"{MESSAGES.base}/count_tokens", _COUNT, MESSAGES)
    async def count_tokens() -> Response:
        with server.call(), server.may_be_ended():
            async with request_body() as body:
                _, question = await server.reader.read(ReadBody(read, body), len(body))
            task = Write(question.head, (), question.items, question.options, is_open_turn=question.is_open_turn)
            written = await server.reader.read(task, len(body))
            assert written is not None
            return json_response(TokenCount(input_tokens=len(written.tokens) + len(written.cue)))

    @door.route("GET", "/api/hello", _HELLO)
    async def hello() -> Response:
        return json_response(Greeting())


class _MessageEvents(EventStream):
    """The events of a message as server-sent events."""

    def __init__(self, answers: Answers, writer: MessageWriter) -> None:
        super().__init__(map(_server_sent_event, writer.begin()))
        self._answers = answers
        self._writer = writer

    async def next_events(self) -> list[bytes]:
        said = await self._answers.next()
        if said is None:
            self.close()
            return []
        return [_server_sent_event(event) for event in _events_of_part(self._writer, said[1])]

    def silence(self) -> list[bytes]:
        return [_server_sent_event({"type": "ping"})]

    def failure(self, error: Exception) -> list[bytes]:
        return [_server_sent_event(as_messages_error(error)[1].model_dump())]


def _events_of_part(writer: MessageWriter, part: Part | Ending) -> list[Event]:
    return writer.end(part) if isinstance(part, Ending) else [*writer.take(part)]


def _server_sent_event(event: Event) -> bytes:
    return named_event(event["type"], json.dumps(event))
