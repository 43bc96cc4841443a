"""The body of a chat completion's request, and what is wrong with one."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from api.request_parts import Asked, ChatMessage, ChosenTool, ResponseFormat, Tool
from runtime.errors import InvalidRequest, MalformedRequest

_MOST_TOKENS = 2**31 - 1
_FIELD = re.compile(r"[a-z]\w*")


def _whole(number: object) -> object:
    return int(number) if isinstance(number, float) and number.is_integer() else number


# In JSON, and so in its schemas, 4.0 is an integer.
_AS_WHOLE = BeforeValidator(_whole)


class StreamOptions(Asked):
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


class CompletionRequest(Asked):
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
