"""The parts of a chat completion's request: messages, tools, and the form of the answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import ConfigDict, Field, JsonValue, ValidationInfo, field_validator, model_validator

from api import bounds
from api.dialects.asked import Asked, JsonObject, ToolName
from runtime.items import Call, Item, Message, Output, Reasoning

Role = Literal["system", "developer", "user", "assistant", "tool"]

_OBJECT: dict[str, JsonValue] = {"type": "object"}
# The values of an unsupported field that ask for nothing.
_NOTHING: tuple[object, ...] = (None, False, 0, "", [], {})
_NOT_IN_MESSAGES = ("function_call", "audio", "refusal")


class TextPart(Asked):
    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: None = None


class CalledFunction(Asked):
    """`arguments` should be the text of a JSON object. Broken text is accepted: no client can mend what a model wrote."""

    name: str
    arguments: str


class MadeCall(Asked):
    """A call of an earlier turn, as the client sends it back."""

    id: str
    type: Literal["function"] | None = "function"
    function: CalledFunction


def _describe_message(schema: dict[str, Any]) -> None:
    """Adds what `ChatMessage` checks besides types."""
    schema["properties"] |= {name: {"enum": [*_NOTHING]} for name in _NOT_IN_MESSAGES}
    said = {"content": {"type": ["string", "array"]}, "tool_calls": {"maxItems": 0}}
    schema["anyOf"] = [
        {"required": ["content"], "properties": said},
        {"properties": {"role": {"const": "assistant"}}},
    ]


class ChatMessage(Asked):
    model_config = ConfigDict(extra="allow", json_schema_extra=_describe_message)

    role: Role
    name: str | None = None
    tool_calls: list[MadeCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    content: str | list[TextPart] | None = Field(default=None, validate_default=True)

    @field_validator("content")
    @classmethod
    def _check_content(cls, content: object, before: ValidationInfo) -> object:
        if content is None and before.data.get("role") != "assistant":
            raise ValueError("only the assistant's messages may be without content")
        return content

    @model_validator(mode="after")
    def _check_fields(self) -> ChatMessage:
        for name in _NOT_IN_MESSAGES:
            if (self.model_extra or {}).get(name):
                raise ValueError(f"{name} in a message is not supported")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls belong to the assistant's messages")
        return self

    def items(self) -> Iterator[Item]:
        """The message as items, independent of the dialect."""
        content = self.content or ""
        said = content if isinstance(content, str) else "".join(part.text for part in content)
        match self.role:
            case "assistant":
                if self.reasoning_content:
                    yield Reasoning(self.reasoning_content)
                # Beside calls or reasoning, an answer without words is no item.
                if said.strip() or not (self.tool_calls or self.reasoning_content):
                    yield Message("assistant", said)
                for call in self.tool_calls or ():
                    yield Call(call.function.name, call.function.arguments, call.id)
            case "tool":
                yield Output(said, self.tool_call_id or "")
            case "user":
                yield Message("user", said, self.name or "")
            case "system" | "developer":
                yield Message("system", said, self.name or "")


class Function(Asked):
    name: ToolName
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class Tool(Asked):
    type: Literal["function"]
    function: Function

    def plain(self) -> bounds.Tool:
        """The tool, independent of the dialect."""
        of = self.function
        return bounds.Tool(of.name, of.description, of.parameters, bool(of.strict))


class ChosenFunction(Asked):
    name: str


class ChosenTool(Asked):
    type: Literal["function"]
    function: ChosenFunction


class JsonSchema(Asked):
    name: ToolName
    description: str | None = None
    schema_: JsonObject = Field(alias="schema")
    strict: bool | None = None


def _describe_format(schema: dict[str, Any]) -> None:
    """Adds what `ResponseFormat` checks besides types."""
    schema["anyOf"] = [
        {"properties": {"type": {"enum": ["text", "json_object"]}}},
        {"required": ["json_schema"], "properties": {"json_schema": _OBJECT}},
    ]


class ResponseFormat(Asked):
    model_config = ConfigDict(json_schema_extra=_describe_format)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = Field(default=None, validate_default=True)

    @field_validator("json_schema")
    @classmethod
    def _check_schema(cls, json_schema: JsonSchema | None, before: ValidationInfo) -> JsonSchema | None:
        if json_schema is None and before.data.get("type") == "json_schema":
            raise ValueError("the type json_schema needs one")
        return json_schema

    @property
    def schema_of_answers(self) -> dict[str, Any] | None:
        """The schema that answers must follow; None if they may have any form."""
        if self.type == "text":
            return None
        return self.json_schema.schema_ if self.type == "json_schema" and self.json_schema else {"type": "object"}
