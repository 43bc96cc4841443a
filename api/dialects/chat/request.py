"""The body of a chat completion's request, and what is wrong with one."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, StringConstraints, field_validator

from api.bounds import NO_CALLS, Bounds, Choice
from api.dialects.asked import (
    AS_WHOLE,
    MOST_TOKENS,
    MOST_TOOLS,
    Asked,
    AskedBody,
    JsonObject,
    MostTokens,
    describe_neutral,
    limit_of,
)
from api.dialects.chat.parts import ChatMessage, ChosenTool, ResponseFormat, Tool
from api.question import Question, check_length, temperature_of, thinking_options
from api.reading import Terms
from runtime.errors import InvalidRequest, MalformedRequest
from runtime.script import head_of
from runtime.text import Text

# Template options that a client may not set.
_NOT_OPTIONS = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "tokenize", "chat_template", "conversation"}
)


class StreamOptions(Asked):
    include_usage: bool = False
    include_obfuscation: Annotated[bool, Field(json_schema_extra={"const": False})] | None = None

    @field_validator("include_obfuscation")
    @classmethod
    def _refuse_obfuscation(cls, value: bool | None) -> bool | None:
        if value:
            raise ValueError("obfuscation is not supported")
        return value


StopString = Annotated[str, StringConstraints(min_length=1, max_length=256)]
StopStrings = Annotated[list[StopString], Field(max_length=4)]


def _as_list(stop: object) -> object:
    return [stop] if isinstance(stop, str) else stop


class CompletionRequest(AskedBody):
    """The body of `POST /v1/chat/completions`. A field that OpenAI does not define is ignored."""

    model_config = ConfigDict(json_schema_extra=describe_neutral)

    NEUTRAL: ClassVar[dict[str, tuple[object, ...]]] = {
        "audio": (),
        "frequency_penalty": (0,),
        "function_call": (),
        "functions": ([],),
        "logit_bias": ({},),
        "modalities": (["text"],),
        "moderation": (),
        "presence_penalty": (0,),
        "web_search_options": (),
    }

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: MostTokens | None = None
    max_completion_tokens: MostTokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=MOST_TOKENS), AS_WHOLE] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64), AS_WHOLE] | None = None
    stop: Annotated[StopStrings, BeforeValidator(_as_list, json_schema_input_type=StopString | StopStrings)] | None = (
        None
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=128), AS_WHOLE] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), AS_WHOLE] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, bool | int | float | str | None] | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    ignore_eos: bool | None = None
    # Hints that change no answer.
    metadata: JsonObject | None = None
    prediction: JsonObject | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: JsonObject | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    user: str | None = None
    verbosity: str | None = None

    @property
    def has_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

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
    def schema_of_answers(self) -> dict[str, Any] | None:
        """The JSON schema of every answer, if it is to be JSON."""
        return self.response_format.schema_of_answers if self.response_format else None

    @property
    def choice(self) -> Choice:
        """Which tools may be called."""
        if self.tool_choice == "none":
            return NO_CALLS
        chosen = self.tool_choice
        names = frozenset({chosen.function.name}) if isinstance(chosen, ChosenTool) else None
        return Choice(names, chosen == "required" or names is not None, self.parallel_tool_calls is not False)

    def check_combinations(self) -> None:
        """Raises InvalidRequest if fields that are valid by themselves cannot be honoured together."""
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
        if self.continue_final_message and self.add_generation_prompt:
            raise MalformedRequest(
                "continue_final_message leaves no place for add_generation_prompt", "add_generation_prompt"
            )
        self.choice.check(names)
        for name, is_bound in (
            ("tools", bool(self.called_tools)),
            ("response_format", self.schema_of_answers is not None),
        ):
            if is_bound and self.ignore_eos:
                raise MalformedRequest(f"{name} needs the end of the turn: leave ignore_eos out", "ignore_eos")
        if self.called_tools and self.schema_of_answers is not None:
            raise MalformedRequest("response_format cannot be had beside tools: send one of them", "response_format")


def read(body: bytes, text: Text, terms: Terms) -> tuple[CompletionRequest, Question]:
    """The request in `body`, and the Question that it asks. Raises InvalidRequest, ModelNotFound or SlabOverflow."""
    asked = CompletionRequest.parse(body)
    asked.check_combinations()
    asked.check_model(terms.label)
    said = [(f"messages.{n}", item) for n, message in enumerate(asked.messages) for item in message.items()]
    places, items = tuple(place for place, _ in said), tuple(item for _, item in said)
    check_length(items, text, terms.most_tokens)
    tools = [tool.plain() for tool in asked.tools or ()]
    options = thinking_options(text, asked.reasoning_effort, _options(asked), "reasoning_effort")
    if (schema := asked.schema_of_answers) is not None:
        bounds = Bounds.of_schema(schema, "response_format")
    else:
        bounds = Bounds.of_tools(tools, asked.choice, text)
    question = Question(
        items,
        places,
        head_of(text, [tool.for_template() for tool in tools], options),
        options,
        bounds,
        temperature=temperature_of(asked.temperature, asked.top_p),
        top_p=asked.top_p or 1.0,
        top_k=asked.top_k or 0,
        seed=asked.seed,
        max_tokens=limit_of(asked.max_completion_tokens or asked.max_tokens),
        stop=tuple(asked.stop or ()),
        top_logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
        count=asked.n or 1,
        ignores_eos=bool(asked.ignore_eos),
        is_open_turn=bool(asked.continue_final_message),
    )
    return asked.model_copy(update={"messages": [], "tools": None, "response_format": None}), question


def _options(asked: CompletionRequest) -> dict[str, Any]:
    given = asked.chat_template_kwargs or {}
    for name in given:
        if name in _NOT_OPTIONS:
            raise MalformedRequest(f"chat_template_kwargs.{name} is not a client's to set", "chat_template_kwargs")
    return given
