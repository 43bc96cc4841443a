"""OpenAI's shapes: what a chat completion is asked with, and what it is answered with."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from runtime.errors import InvalidRequest, MalformedRequest

Role = Literal["system", "developer", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length", "tool_calls"]

_MOST_TOKENS = 2**31 - 1
_FIELD = re.compile(r"[a-z]\w*")
_OBJECT: dict[str, JsonValue] = {"type": "object"}
# What a field may hold that is not supported: nothing, in whatever way.
_NOTHING: tuple[object, ...] = (None, False, 0, "", [], {})
_NOT_IN_MESSAGES = ("function_call", "audio", "refusal")


class _Asked(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


def _whole(number: object) -> object:
    return int(number) if isinstance(number, float) and number.is_integer() else number


# In JSON, and so in its schemas, 4.0 is an integer.
_AS_WHOLE = BeforeValidator(_whole)


class TextPart(_Asked):
    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: None = None


class CalledFunction(_Asked):
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


class MadeCall(_Asked):
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


class ChatMessage(_Asked):
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


class Function(_Asked):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Asked):
    type: Literal["function"]
    function: Function


class ChosenFunction(_Asked):
    name: str


class ChosenTool(_Asked):
    type: Literal["function"]
    function: ChosenFunction


class JsonSchema(_Asked):
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


class ResponseFormat(_Asked):
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


class StreamOptions(_Asked):
    include_usage: bool = False
    include_obfuscation: Annotated[bool, Field(json_schema_extra={"const": False})] | None = None

    @field_validator("include_obfuscation")
    @classmethod
    def _is_not_asked_for(cls, value: bool | None) -> bool | None:
        if value:
            raise ValueError("obfuscation is not supported")
        return value


StopString = Annotated[str, StringConstraints(min_length=1, max_length=256)]
StopStrings = Annotated[list[StopString], Field(max_length=4)]


def _is_same(one: object, other: object) -> bool:
    """Whether they are equal in JSON, where 0 is not false."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _listed(stop: object) -> object:
    return [stop] if isinstance(stop, str) else stop


def _describe_request(schema: dict[str, Any], kind: type[CompletionRequest]) -> None:
    """Adds the fields that are refused by their names."""
    words = "Known and not supported: only values that ask for nothing are taken."
    schema["properties"] |= {
        name: {"enum": [None, *neutral], "description": words} for name, neutral in kind.NEUTRAL.items()
    }


class CompletionRequest(_Asked):
    """The body of `POST /v1/chat/completions`. A field that OpenAI does not define is ignored."""

    model_config = ConfigDict(json_schema_extra=_describe_request)

    # What OpenAI defines and this server does not do: only a value that asks for nothing passes.
    NEUTRAL: ClassVar[dict[str, tuple[object, ...]]] = {
        "audio": (),
        "frequency_penalty": (0,),
        "function_call": (),
        "functions": ([],),
        "logit_bias": ({},),
        "metadata": ({},),
        "modalities": (["text"],),
        "moderation": (),
        "prediction": (),
        "presence_penalty": (0,),
        "prompt_cache_key": ("",),
        "prompt_cache_options": (),
        "prompt_cache_retention": (),
        "reasoning_effort": (),
        "safety_identifier": ("",),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "verbosity": (),
        "web_search_options": (),
    }

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, le=_MOST_TOKENS), _AS_WHOLE] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=_MOST_TOKENS), _AS_WHOLE] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=_MOST_TOKENS), _AS_WHOLE] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64), _AS_WHOLE] | None = None
    stop: Annotated[StopStrings, BeforeValidator(_listed, json_schema_input_type=StopString | StopStrings)] | None = (
        None
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=128), _AS_WHOLE] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), _AS_WHOLE] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = None
    user: str | None = None
    ignore_eos: bool | None = None

    @property
    def has_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @model_validator(mode="before")
    @classmethod
    def _nothing_unsupported(cls, asked: object) -> object:
        if isinstance(asked, dict):
            for name, neutral in cls.NEUTRAL.items():
                value = asked.get(name)
                if value is not None and not any(_is_same(value, one) for one in neutral):
                    raise _Unsupported(name)
        return asked

    @classmethod
    def parse(cls, body: bytes) -> CompletionRequest:
        """Raises MalformedRequest where `body` is not JSON, InvalidRequest naming the field that is wrong."""
        try:
            request = cls.model_validate_json(body)
        except _Unsupported as error:
            raise InvalidRequest(f"{error.name} is not supported by this server: leave it out", error.name) from None
        except ValidationError as error:
            raise _refusal(error) from None
        request.check_combinations()
        return request

    @property
    def called_tools(self) -> list[Tool]:
        """The tools that may be called."""
        chosen = self.tool_choice
        if chosen == "none":
            return []
        if isinstance(chosen, ChosenTool):
            return [tool for tool in self.tools or () if tool.function.name == chosen.function.name]
        return self.tools or []

    @property
    def must_call(self) -> bool:
        return self.tool_choice == "required" or isinstance(self.tool_choice, ChosenTool)

    @property
    def schema_of_answers(self) -> dict[str, Any] | None:
        """The JSON schema of every answer, if it is to be JSON."""
        return self.response_format.schema_of_answers if self.response_format else None

    def check_combinations(self) -> None:
        """Raises InvalidRequest where fields that are right by themselves cannot be honoured together."""
        if self.stream_options and not self.stream:
            raise MalformedRequest("stream_options needs stream to be true", "stream_options")
        if self.max_tokens and self.max_completion_tokens not in (None, self.max_tokens):
            raise MalformedRequest("max_tokens is max_completion_tokens by its older name: send one", "max_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise MalformedRequest("top_logprobs needs logprobs to be true", "top_logprobs")
        if self.logprobs and self.called_tools:
            raise MalformedRequest("logprobs cannot be had beside tools: send one of them", "logprobs")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise InvalidRequest("tools must have names of their own", "tools")
        if self.must_call and not self.called_tools:
            raise MalformedRequest("tool_choice asks for a tool that tools does not hold", "tool_choice")
        for name, is_bound in (
            ("tools", bool(self.called_tools)),
            ("response_format", self.schema_of_answers is not None),
        ):
            if is_bound and self.ignore_eos:
                raise MalformedRequest(f"{name} needs the end of the turn: leave ignore_eos out", "ignore_eos")
        if self.called_tools and self.schema_of_answers is not None:
            raise MalformedRequest("response_format cannot be had beside tools: send one of them", "response_format")


class _Unsupported(Exception):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def _refusal(error: ValidationError) -> InvalidRequest:
    errors = error.errors(include_url=False, include_input=False, include_context=False)
    # Of a union's members the one that got furthest is what the client meant.
    first = max(errors, key=lambda each: len(each["loc"]))
    if first["type"] == "json_invalid":
        return MalformedRequest(f"the body is not JSON: {first['msg']}")
    # Places in a union are named after its members too; a client knows only fields and indices.
    path = [part for part in first["loc"] if isinstance(part, int) or (_FIELD.fullmatch(part) and part != "str")]
    param = ".".join(str(part) for part in path) or None
    return InvalidRequest(f"{param or 'the body'}: {first['msg']}", param)


class _Answered(BaseModel):
    model_config = ConfigDict(frozen=True, json_schema_serialization_defaults_required=True)


def _is_nothing(value: object) -> bool:
    return not value


def _is_none(value: object) -> bool:
    return value is None


class Usage(_Answered):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TokenLogprob(_Answered):
    """A token's text and bytes; only some of a character's bytes make no text, and a replacement character stands there."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChoiceLogprobs(_Answered):
    content: list[ChosenLogprob]
    refusal: None = None


class NamedCall(_Answered):
    name: str
    arguments: str


class AnsweredCall(_Answered):
    id: str
    type: Literal["function"] = "function"
    function: NamedCall


class Answer(_Answered):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[AnsweredCall] | None = Field(default=None, exclude_if=_is_nothing)


class Choice(_Answered):
    index: int
    message: Answer
    logprobs: ChoiceLogprobs | None = None
    finish_reason: FinishReason


class Completion(_Answered):
    """`evicted_token_count` is ours: tokens of prompt and answer that the model no longer saw at the end."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    evicted_token_count: int


class DeltaCall(AnsweredCall):
    index: int


class Delta(_Answered):
    role: Literal["assistant"] | None = Field(default=None, exclude_if=_is_none)
    content: str | None = Field(default=None, exclude_if=_is_none)
    tool_calls: list[DeltaCall] | None = Field(default=None, exclude_if=_is_none)


class ChunkChoice(_Answered):
    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: FinishReason | None = None


class Chunk(_Answered):
    """One event of a stream. `evicted_token_count` is ours, and null before the last choice."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    evicted_token_count: int | None = None


class CountedChunk(Chunk):
    """An event of a stream that was asked for usage, which comes last, in a chunk without a choice."""

    usage: Usage | None = None


class Model(_Answered):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["perennial"] = "perennial"


class ModelList(_Answered):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(_Answered):
    status: str
    model: str


class ErrorBody(_Answered):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(_Answered):
    error: ErrorBody
