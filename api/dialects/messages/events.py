"""An Anthropic message: the events of its stream, the finished message, and its errors."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from api.answer import CallBegun, CallGrown, ItemDone, Part, Said, Thought
from api.answering import Ending, Usage
from api.dialects.sealed import seal
from api.replies import as_http
from api.reuse import reuse_of
from runtime.items import Call, Message, Reasoning, parsed_arguments

Event = dict[str, Any]

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ErrorDetail(BaseModel):
    type: str
    message: str


class MessageError(BaseModel):
    """Anthropic's error body."""

    model_config = ConfigDict(frozen=True)

    type: Literal["error"] = "error"
    error: ErrorDetail


def as_messages_error(error: Exception) -> tuple[int, MessageError, dict[str, str]]:
    """Status, body and headers of an error for a client of Messages, where every invalid request is 400."""
    status, body, headers = as_http(error)
    status = 400 if status == 422 else status
    kind = _ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return status, MessageError(error=ErrorDetail(type=kind, message=body.error.message)), headers


class MessageWriter:
    """Turns the parts of an answer into the events of one message; `message` is the message so far."""

    def __init__(self, label: str, prompt_tokens: int) -> None:
        self._blocks: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self.message: dict[str, Any] = {
            "id": f"msg_{secrets.token_hex(16)}",
            "type": "message",
            "role": "assistant",
            "model": label,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            # How much of the prompt had been read before is known only at the end.
            "usage": {"input_tokens": prompt_tokens, "output_tokens": 0},
        }

    def begin(self) -> list[Event]:
        """The first event, sent before the model has read anything."""
        return [{"type": "message_start", "message": self.message}]

    def take(self, part: Part) -> Iterator[Event]:
        """The events for one part."""
        match part:
            case Said(text):
                if self._open is None:
                    yield self._start({"type": "text", "text": ""})
                yield self._delta({"type": "text_delta", "text": text})
            case Thought(text):
                if self._open is None:
                    yield self._start({"type": "thinking", "thinking": "", "signature": ""})
                yield self._delta({"type": "thinking_delta", "thinking": text})
            case CallBegun(call_id, name):
                yield self._start({"type": "tool_use", "id": call_id, "name": name, "input": {}})
            case CallGrown(arguments):
                yield self._delta({"type": "input_json_delta", "partial_json": arguments})
            case ItemDone(item):
                yield from self._done(item)

    def end(self, ending: Ending) -> list[Event]:
        """The last events. A call that was cut off is not in the message."""
        events = [] if self._open is None else [self._stop()]
        reason = _STOP_REASONS[ending.finish_reason]
        stopped = {"stop_reason": reason, "stop_sequence": ending.stop_string}
        if ending.stop_string is not None:
            stopped["stop_reason"] = "stop_sequence"
        self.message = self.message | {"content": self._blocks, **stopped, "usage": usage_of(ending.usage)}
        return [
            *events,
            {"type": "message_delta", "delta": stopped, "usage": self.message["usage"]},
            {"type": "message_stop"},
        ]

    def _start(self, block: dict[str, Any]) -> Event:
        self._open = block
        return {"type": "content_block_start", "index": len(self._blocks), "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> Event:
        return {"type": "content_block_delta", "index": len(self._blocks), "delta": delta}

    def _stop(self) -> Event:
        self._open = None
        return {"type": "content_block_stop", "index": len(self._blocks)}

    def _done(self, item: object) -> Iterator[Event]:
        assert self._open is not None
        block = self._open
        match item:
            case Message(_, text):
                block = block | {"text": text}
            case Reasoning(text):
                signature = seal(text)
                yield self._delta({"type": "signature_delta", "signature": signature})
                block = block | {"thinking": text, "signature": signature}
            case Call(_, arguments):
                block = block | {"input": parsed_arguments(arguments) or {}}
        yield self._stop()
        self._blocks.append(block)


def usage_of(usage: Usage) -> dict[str, Any]:
    """In this dialect `input_tokens` leaves out the tokens that had been read before."""
    return {
        "input_tokens": usage.read,
        "cache_read_input_tokens": usage.reused,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion,
        **reuse_of(usage).model_dump(),
    }
