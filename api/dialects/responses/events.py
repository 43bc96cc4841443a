"""An OpenAI response: the events of its stream, and the finished response."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from typing import Any

from api.answer import CallBegun, CallGrown, ItemDone, Part, Said, Thought
from api.answering import Ending, Usage
from api.dialects.responses.request import ResponseRequest
from api.dialects.sealed import seal
from api.replies import as_http
from api.reuse import reuse_of
from api.schemas import ErrorReply
from runtime.items import Call, Message, Reasoning

Event = dict[str, Any]
Response = dict[str, Any]


class ResponseWriter:
    """Turns the parts of an answer into the events of one response; `response` is the response so far."""

    def __init__(self, asked: ResponseRequest, label: str, route: str = "") -> None:
        """The response's id begins with the `route`, by which a proxy finds the server that has it."""
        self.id = f"resp_{route}{secrets.token_hex(24)}"
        self._number = 0
        self._namespaces = asked.namespaces()
        self._stream_id = {} if asked.stream_id is None else {"stream_id": asked.stream_id}
        self._has_logprobs = asked.has_logprobs
        self._output: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._text = ""
        self._logprobs: list[dict[str, Any]] = []
        self.response: Response = _new_response(self.id, asked, label)

    def begin(self) -> list[Event]:
        """The first events, sent before the model has read anything."""
        return [self._event("response.created", response=self.response), self.progress()]

    def progress(self) -> Event:
        """An event without news, which resets the clients' timeouts."""
        return self._event("response.in_progress", response=self.response)

    def take(self, part: Part) -> Iterator[Event]:
        """The events for one part."""
        match part:
            case Said(text, logprobs):
                if self._open is None:
                    yield from self._add(
                        {"type": "message", "role": "assistant", "content": []}, "msg", _output_text("")
                    )
                told = [one.model_dump() for one in logprobs] if self._has_logprobs else []
                self._text += text
                self._logprobs += told
                yield self._of_item("response.output_text.delta", content_index=0, delta=text, logprobs=told)
            case Thought(text):
                if self._open is None:
                    yield from self._add({"type": "reasoning", "summary": [], "content": []}, "rs", _reasoning_text(""))
                self._text += text
                yield self._of_item("response.reasoning_text.delta", content_index=0, delta=text)
            case CallBegun(call_id, name):
                space, own = self._namespaces.get(name, (None, name))
                item = {"type": "function_call", "call_id": call_id, "name": own, "arguments": ""}
                yield from self._add(item | ({"namespace": space} if space else {}), "fc")
            case CallGrown(arguments):
                self._text += arguments
                yield self._of_item("response.function_call_arguments.delta", delta=arguments)
            case ItemDone(item):
                yield from self._done(item)

    def end(self, ending: Ending) -> list[Event]:
        """The last event. The output has what was cut off as far as it was generated."""
        if self._open is not None:
            self._output.append(self._open | {"status": "incomplete", "arguments": self._text})
            self._open = None
        is_cut = ending.finish_reason == "length"
        self.response |= {
            "status": "incomplete" if is_cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": self._output,
            "usage": usage_of(ending.usage),
            "completed_at": int(time.time()),
        }
        return [self._event(f"response.{self.response['status']}", response=self.response)]

    def fail(self, error: Exception) -> list[Event]:
        """The last event of a response that could not be finished."""
        status, body, _ = as_http(error)
        code = "server_is_overloaded" if status == 503 else body.error.code or "server_error"
        self.response |= {"status": "failed", "error": {"code": code, "message": body.error.message}}
        return [self._event("response.failed", response=self.response)]

    def _add(self, item: dict[str, Any], prefix: str, part: dict[str, Any] | None = None) -> Iterator[Event]:
        self._open = {"id": f"{prefix}_{secrets.token_hex(24)}", **item, "status": "in_progress"}
        self._text, self._logprobs = "", []
        yield self._event("response.output_item.added", output_index=len(self._output), item=self._open)
        if part is not None:
            yield self._of_item("response.content_part.added", content_index=0, part=part)

    def _done(self, item: object) -> Iterator[Event]:
        assert self._open is not None
        done = self._open | {"status": "completed"}
        match item:
            case Message(_, text):
                part = _output_text(text, self._logprobs if self._has_logprobs else None)
                yield self._of_item("response.output_text.done", content_index=0, text=text, logprobs=self._logprobs)
                yield self._of_item("response.content_part.done", content_index=0, part=part)
                done |= {"content": [part]}
            case Reasoning(text):
                yield self._of_item("response.reasoning_text.done", content_index=0, text=text)
                yield self._of_item("response.content_part.done", content_index=0, part=_reasoning_text(text))
                done |= {"content": [_reasoning_text(text)], "encrypted_content": seal(text)}
            case Call(_, arguments):
                name = self._open["name"]
                yield self._of_item("response.function_call_arguments.done", name=name, arguments=arguments)
                done |= {"arguments": arguments}
        index = len(self._output)
        self._output.append(done)
        self._open = None
        yield self._event("response.output_item.done", output_index=index, item=done)

    def _of_item(self, kind: str, **more: Any) -> Event:
        assert self._open is not None
        return self._event(kind, item_id=self._open["id"], output_index=len(self._output), **more)

    def _event(self, kind: str, **more: Any) -> Event:
        number, self._number = self._number, self._number + 1
        return {"type": kind, "sequence_number": number, **more, **self._stream_id}


def usage_of(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.reused, **reuse_of(usage).model_dump()},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.prompt + usage.completion,
    }


def as_responses_error(error: Exception) -> tuple[int, ErrorReply, dict[str, str]]:
    """Status, body and headers of an error for a client of Responses, where every invalid request is 400."""
    status, body, headers = as_http(error)
    return (400 if status == 422 else status), body, headers


def error_event(error: Exception, stream_id: str | None) -> Event:
    """The error event for a WebSocket's client if there is no response that could fail."""
    status, body, headers = as_responses_error(error)
    code = "server_is_overloaded" if status == 503 else body.error.code
    told = {"type": "error", "status": status, "error": body.error.model_dump() | {"code": code}}
    told |= {"headers": {name.lower(): value for name, value in headers.items()}} if headers else {}
    return told if stream_id is None else told | {"stream_id": stream_id}


def _output_text(text: str, logprobs: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs or []}


def _reasoning_text(text: str) -> dict[str, Any]:
    return {"type": "reasoning_text", "text": text}


def _new_response(response_id: str, asked: ResponseRequest, label: str) -> Response:
    told = asked.model_dump(mode="json", by_alias=True, exclude_none=True)
    return {
        "id": response_id,
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "model": label,
        "output": [],
        "parallel_tool_calls": asked.parallel_tool_calls is not False,
        "previous_response_id": asked.previous_response_id,
        "conversation": {"id": asked.conversation_id} if asked.conversation_id else None,
        "reasoning": {"effort": None, "summary": None} | told.get("reasoning", {}),
        "store": asked.store is not False,
        "temperature": 1.0 if asked.temperature is None else asked.temperature,
        "text": {"format": {"type": "text"}} | told.get("text", {}),
        "tool_choice": told.get("tool_choice", "auto"),
        "tools": told.get("tools", []),
        "top_p": 1.0 if asked.top_p is None else asked.top_p,
        "truncation": asked.truncation or "disabled",
        "usage": None,
        "metadata": asked.metadata or {},
    }
