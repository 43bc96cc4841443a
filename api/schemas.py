"""OpenAI's shapes of what the HTTP door answers."""

from __future__ import annotations

from typing import Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
)

FinishReason = Literal["stop", "length", "tool_calls"]


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
