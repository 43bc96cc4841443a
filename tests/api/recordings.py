"""Recordings of what agents sent to a server, and what it answered them: made ready to be sent again."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from runtime.items import Call, Item, Message, Reasoning

_ARCHIVE = Path(__file__).parents[1] / "recordings.tar.xz"
AGENTS = (
    *("claude-code", "codex", "mini-swe-agent", "openai-agents", "openai-python", "opencode", "pi", "qwen-code"),
    "smolagents",
)
_KINDS = {"reasoning": "reasoning", "thinking": "reasoning", "message": "message", "text": "message"}
# What a client sends back so that the server knows an item again.
_MARKS = ("id", "call_id", "encrypted_content", "signature")


@dataclass
class HeardItem:
    """An item of an answer as far as it was heard; `text` is that of a call's arguments too."""

    kind: str
    text: str = ""
    name: str = ""
    marks: dict[str, str] = field(default_factory=dict)
    is_done: bool = False

    @property
    def item(self) -> Item:
        match self.kind:
            case "message":
                return Message("assistant", self.text)
            case "reasoning":
                return Reasoning(self.text)
            case _:
                return Call(self.name, self.text, self.marks.get("call_id", ""))


@dataclass
class Heard:
    """An answer as a client hears it, whatever dialect it listens to."""

    parts: list[HeardItem] = field(default_factory=list)
    response_id: str | None = None
    usage: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    is_over: bool = False

    def hear(self, told: Any) -> None:
        """Takes an event of a stream, or an answer in one piece."""
        if not isinstance(told, dict):
            return
        kind = told.get("type") or told.get("object") or ""
        if told.get("error") and kind in ("", "error"):
            self.error, self.is_over = told["error"], True
        elif "choices" in told:
            self._hear_chat(told)
        elif kind == "response" or kind.startswith("response."):
            self._hear_response(kind, told)
        else:
            self._hear_message(kind, told)

    @property
    def items(self) -> list[Item]:
        return [part.item for part in self.parts]

    @property
    def marks(self) -> list[dict[str, str]]:
        return [part.marks for part in self.parts]

    def _hear_response(self, kind: str, told: dict[str, Any]) -> None:
        match kind:
            case "response.output_item.added":
                self._add(told["item"])
            case "response.output_item.done":
                if not self.parts or self.parts[-1].is_done:
                    self._add(told["item"])
                self._fill(self.parts[-1], told["item"])
            case (
                "response.output_text.delta"
                | "response.reasoning_text.delta"
                | "response.reasoning_summary_text.delta"
                | "response.function_call_arguments.delta"
            ):
                self.parts[-1].text += told["delta"]
            case _:
                response = told if kind == "response" else told.get("response", {})
                self.response_id = response.get("id", self.response_id)
                if kind in ("response", "response.completed", "response.incomplete", "response.failed"):
                    self.is_over, self.usage, self.error = True, response.get("usage"), response.get("error")
                    for item in () if self.parts else response.get("output", ()):
                        self._add(item)
                        self._fill(self.parts[-1], item)

    def _hear_message(self, kind: str, told: dict[str, Any]) -> None:
        match kind:
            case "message":
                for block in told["content"]:
                    self._add(block)
                    self._fill(self.parts[-1], block)
                self.usage, self.is_over = told["usage"], True
            case "content_block_start":
                self._add(told["content_block"])
            case "content_block_delta":
                delta = dict(told["delta"])
                del delta["type"]
                if "signature" in delta:
                    self.parts[-1].marks |= delta
                else:
                    self.parts[-1].text += "".join(delta.values())
            case "content_block_stop":
                self.parts[-1].is_done = True
            case "message_delta":
                self.usage = told.get("usage")
            case "message_stop":
                self.is_over = True

    def _hear_chat(self, told: dict[str, Any]) -> None:
        self.usage = told.get("usage") or self.usage
        for choice in told["choices"]:
            said = choice.get("delta") or choice.get("message") or {}
            for kind, name in (("reasoning", "reasoning_content"), ("message", "content")):
                if text := said.get(name):
                    if not self.parts or self.parts[-1].kind != kind:
                        self.parts.append(HeardItem(kind))
                    self.parts[-1].text += text
            for call in said.get("tool_calls") or ():
                if call.get("id"):
                    self.parts.append(HeardItem("call", "", call["function"]["name"], {"call_id": call["id"]}))
                self.parts[-1].text += call["function"].get("arguments") or ""
            if choice.get("finish_reason"):
                self.is_over = True

    def _add(self, told: dict[str, Any]) -> None:
        name = ".".join(filter(None, (told.get("namespace"), told.get("name"))))
        self.parts.append(HeardItem(_KINDS.get(told["type"], "call"), "", name, _marks(told)))

    def _fill(self, part: HeardItem, told: dict[str, Any]) -> None:
        part.marks |= _marks(told)
        part.is_done = True
        if part.kind == "call":
            part.text = told["arguments"] if "arguments" in told else json.dumps(told["input"])
        elif isinstance(content := told.get("content"), list):
            part.text = "".join(one.get("text", "") for one in content)
        else:
            part.text = told.get("text") or told.get("thinking") or part.text


def _marks(told: dict[str, Any]) -> dict[str, str]:
    marks = {name: told[name] for name in _MARKS if told.get(name)}
    if told["type"] == "tool_use":
        marks["call_id"] = marks.pop("id")
    return marks


@dataclass
class Sent:
    """A request as it was recorded, and what was heard of its answer. `conn` is the WebSocket that it came on."""

    body: dict[str, Any]
    path: str
    conn: int | None = None
    answer: Heard = field(default_factory=Heard)

    @property
    def is_cut(self) -> bool:
        """Whether the client left before the answer had come to its end."""
        return not self.answer.is_over

    @property
    def has_failed(self) -> bool:
        return self.answer.error is not None


@cache
def recordings() -> dict[str, list[Sent]]:
    """The requests of every recording, by its name: `agent/what`."""
    with tarfile.open(_ARCHIVE) as archive:
        return {
            member.name.removesuffix(".json"): [*_requests(json.load(file))]
            for member in archive
            if member.name.endswith(".json") and (file := archive.extractfile(member))
        }


def _requests(recording: dict[str, Any]) -> Iterator[Sent]:
    last: dict[int | None, Sent] = {}
    for record in recording["exchange"]:
        kind, conn, body = record.get("kind"), record.get("conn"), record.get("body")
        is_ours = record.get("direction") == "server->client"
        if not is_ours and kind in ("http_request", "ws_frame") and isinstance(body, dict):
            tools = body.get("tools")
            if isinstance(tools, dict):
                body["tools"] = recording["shared"][tools["$shared"]]["value"]
            last[conn] = Sent(body, record.get("path", "").partition("?")[0], conn)
            yield last[conn]
        elif is_ours and conn in last and kind in ("http_response", "sse_event", "ws_frame"):
            last[conn].answer.hear(body)
