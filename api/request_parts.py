"""What a chat completion is asked with, part by part: messages, tools, and the form of the answer."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)

Role = Literal["system", "developer", "user", "assistant", "tool"]

_OBJECT: dict[str, JsonValue] = {"type": "object"}
# What a field may hold that is not supported: nothing, in whatever way.
_NOTHING: tuple[object, ...] = (None, False, 0, "", [], {})
_NOT_IN_MESSAGES = ("function_call", "audio", "refusal")


class Asked(BaseModel):
    """Strict, and blind to what it does not know, as JSON from OpenAI's clients wants it."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


class TextPart(Asked):
    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: None = None


class CalledFunction(Asked):
    name: str
    arguments: Annotated[
        str, Field(json_schema_extra={"contentMediaType": "application/json", "contentSchema": _OBJECT})
    ]

    def for_template(self) -> dict[str, Any]:
        """Templates spell the arguments themselves, and so need the object and not its JSON."""
        return {"name": self.name, "arguments": json.loads(self.arguments or "{}")}

    @model_validator(mode="after")
    def _is_json(self) -> CalledFunction:
        try:
            arguments = json.loads(self.arguments or "{}")
        except ValueError:
            arguments = None
        if not isinstance(arguments, dict):
            raise ValueError("arguments must be a JSON object")
        return self


class MadeCall(Asked):
    """A call of an earlier turn, as the client sends it back."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


def _describe_message(schema: dict[str, Any]) -> None:
    """Adds what `ChatMessage` checks besides types."""
    schema["properties"] |= {name: {"enum": [*_NOTHING]} for name in _NOT_IN_MESSAGES}
    said = {"content": {"type": ["string", "array"]}, "tool_calls": {"maxItems": 0}}
    called = {"role": {"const": "assistant"}, "tool_calls": {"type": "array", "minItems": 1}}
    schema["anyOf"] = [
        {"required": ["content"], "properties": said},
        {"required": ["tool_calls"], "properties": called},
    ]


class ChatMessage(Asked):
    model_config = ConfigDict(extra="allow", json_schema_extra=_describe_message)

    role: Role
    name: str | None = None
    tool_calls: list[MadeCall] | None = None
    tool_call_id: str | None = None
    content: str | list[TextPart] | None = Field(default=None, validate_default=True)

    @field_validator("content")
    @classmethod
    def _is_said(cls, content: object, before: ValidationInfo) -> object:
        if content is None and not before.data.get("tool_calls"):
            raise ValueError("only a message with tool_calls may be without content")
        return content

    @model_validator(mode="after")
    def _is_whole(self) -> ChatMessage:
        for name in _NOT_IN_MESSAGES:
            if (self.model_extra or {}).get(name):
                raise ValueError(f"{name} in a message is not supported")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls belong to the assistant's messages")
        return self

    @property
    def length(self) -> int:
        """Characters of what it says."""
        content = self.content or ""
        said = len(content) if isinstance(content, str) else sum(len(part.text) for part in content)
        return said + sum(len(call.function.arguments) for call in self.tool_calls or ())

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates know it: one string, and `system` for the newer name of that role."""
        content = self.content or ""
        calls = [{**call.model_dump(), "function": call.function.for_template()} for call in self.tool_calls or ()]
        return {
            "role": "system" if self.role == "developer" else self.role,
            "content": content if isinstance(content, str) else "".join(part.text for part in content),
            **({"name": self.name} if self.name else {}),
            **({"tool_calls": calls} if calls else {}),
            **({"tool_call_id": self.tool_call_id} if self.tool_call_id else {}),
        }


FunctionName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class Function(Asked):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Asked):
    type: Literal["function"]
    function: Function


class ChosenFunction(Asked):
    name: str


class ChosenTool(Asked):
    type: Literal["function"]
    function: ChosenFunction


class JsonSchema(Asked):
    name: FunctionName
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
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
    def _is_there(cls, json_schema: JsonSchema | None, before: ValidationInfo) -> JsonSchema | None:
        if json_schema is None and before.data.get("type") == "json_schema":
            raise ValueError("the type json_schema needs one")
        return json_schema

    @property
    def schema_of_answers(self) -> dict[str, Any] | None:
        """None for an answer of any form."""
        if self.type == "text":
            return None
        return self.json_schema.schema_ if self.type == "json_schema" and self.json_schema else {"type": "object"}
