"""`POST /v1/chat/completions`: OpenAI's chat completions, each of a session of its own. Deprecated."""

from __future__ import annotations

from quart import Response, request

from api.answering import open_answers
from api.dialects.chat.answers import CompletionEvents, whole_answer
from api.dialects.chat.request import CompletionRequest, read
from api.dialects.chat.schemas import Chunk, Completion, CountedChunk
from api.http.connection import held_by, read_question
from api.http.routes import ANSWER_ERRORS, EVENTS, JSON, Door, Events, Operation
from api.http.standard import json_response
from api.schemas import ErrorReply
from api.traces import describe_request

_COMPLETIONS = Operation(
    "Answers a conversation, as JSON or, with `stream`, as server-sent events. An error that comes when events have "
    "been sent is the last event.",
    {
        200: {
            JSON: Completion,
            EVENTS: Events((Chunk, CountedChunk, ErrorReply), "[DONE]"),
        }
    },
    ANSWER_ERRORS,
    CompletionRequest,
)


def add_chat_routes(door: Door) -> None:
    server = door.server

    @door.route("POST", "/v1/chat/completions", _COMPLETIONS)
    async def chat_completions() -> Response:
        held = held_by(request)
        runtime = held.enter_context(server.call())
        describe_request({"gen_ai.request.model": server.label})
        asked, question = await read_question(server, read)
        answers = await held.enter_async_context(open_answers(server, runtime, question, is_single_shot=True))
        has_logprobs = bool(asked.logprobs)
        if not asked.stream:
            return json_response(await whole_answer(answers, server.label, has_logprobs=has_logprobs))
        response = Response(content_type=f"{EVENTS}; charset=utf-8", headers={"Cache-Control": "no-cache"})
        response.response = CompletionEvents(
            answers, server.label, has_usage=asked.has_usage, has_logprobs=has_logprobs
        )
        return response
