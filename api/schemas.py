"""OpenAI's shapes: what a chat completion is asked with, and what it is answered with."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    ValidationError,
    model_serializer,
    model_validator,
)

from runtime.errors import InvalidRequest, MalformedRequest

Role = Literal["system", "developer", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length"]

_MOST_TOKENS = 2**31 - 1


class _Asked(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


class TextPart(_Asked):
    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: None = None


class ChatMessage(_Asked):
    model_config = ConfigDict(extra="allow")

    role: Role
    content: str | list[TextPart]

    @model_validator(mode="after")
    def _no_calls(self) -> ChatMessage:
        for name in ("tool_calls", "function_call", "audio", "refusal"):
            if (self.model_extra or {}).get(name):
                raise ValueError(f"{name} in a message is not supported")
        return self

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates know it: one string, and `system` for the newer name of that role."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        name = (self.model_extra or {}).get("name")
        return {
            "role": "system" if self.role == "developer" else self.role,
            "content": content,
            **({"name": name} if name else {}),
        }


class StreamOptions(_Asked):
    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


StopString = Annotated[str, StringConstraints(min_length=1, max_length=256)]


def _listed(stop: object) -> object:
    return [stop] if isinstance(stop, str) else stop


class CompletionRequest(_Asked):
    """The body of `POST /v1/chat/completions`. A field that OpenAI does not define is ignored."""

    # What OpenAI defines and this server does not do: only a value that asks for nothing passes.
    NEUTRAL: ClassVar[dict[str, tuple[object, ...]]] = {
        "audio": (),
        "frequency_penalty": (0,),
        "function_call": (),
        "functions": ([],),
        "logit_bias": ({},),
        "logprobs": (False,),
        "metadata": ({},),
        "modalities": (["text"],),
        "moderation": (),
        "n": (1,),
        "parallel_tool_calls": (True, False),
        "prediction": (),
        "presence_penalty": (0,),
        "prompt_cache_key": ("",),
        "prompt_cache_options": (),
        "prompt_cache_retention": (),
        "reasoning_effort": (),
        "response_format": ({"type": "text"},),
        "safety_identifier": ("",),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "top_logprobs": (),
        "verbosity": (),
        "web_search_options": (),
    }

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, le=_MOST_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=_MOST_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=_MOST_TOKENS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Annotated[list[StopString], Field(max_length=4), BeforeValidator(_listed)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
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
                # 1 == True in Python, and not in JSON.
                if value is not None and not any(type(value) is type(one) and value == one for one in neutral):
                    if isinstance(value, float) and value in neutral:
                        continue
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
        if request.stream_options and not request.stream:
            raise MalformedRequest("stream_options needs stream to be true", "stream_options")
        if request.max_tokens and request.max_completion_tokens not in (None, request.max_tokens):
            raise MalformedRequest("max_tokens is max_completion_tokens by its older name: send one", "max_tokens")
        return request


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
    path = [part for part in first["loc"] if isinstance(part, int) or (part.isidentifier() and part != "str")]
    param = ".".join(str(part) for part in path) or None
    return InvalidRequest(f"{param or 'the body'}: {first['msg']}", param)


class _Answered(BaseModel):
    model_config = ConfigDict(frozen=True)


class Usage(_Answered):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Answer(_Answered):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(_Answered):
    index: int = 0
    message: Answer
    logprobs: None = None
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


class Delta(_Answered):
    role: Literal["assistant"] | None = None
    content: str | None = None

    @model_serializer(mode="wrap")
    def _without_nulls(self, fields: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in fields(self).items() if value is not None}


class ChunkChoice(_Answered):
    index: int = 0
    delta: Delta
    logprobs: None = None
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
