"""The body of a request for a response, over HTTP or as a frame of a WebSocket, and the checks on it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, StringConstraints
from pydantic_core import from_json

from api.bounds import NO_CALLS, Bounds, Choice
from api.bounds import Tool as PlainTool
from api.dialects.asked import (
    AS_WHOLE,
    MOST_TOKENS,
    MOST_TOOLS,
    Asked,
    AskedBody,
    JsonObject,
    MostTokens,
    ToolName,
    describe_neutral,
    limit_of,
)
from api.dialects.sealed import unseal
from api.question import Question, check_length, temperature_of, thinking_options
from api.reading import Terms
from runtime.checks import short_repr
from runtime.errors import InvalidRequest, MalformedRequest, RequestError
from runtime.items import Call, Item, Message, Output, Reasoning
from runtime.script import head_of
from runtime.text import Text

# Tools that OpenAI's service runs itself. Clients send them to every server; this one cannot run them and leaves them out.
_HOSTED = frozenset(
    {
        *("web_search", "web_search_2025_08_26", "web_search_preview", "web_search_preview_2025_03_11"),
        *("file_search", "code_interpreter", "image_generation"),
    }
)
# A quote within a string is written with a backslash, so this is found in no text.
_LANE = re.compile(rb'"stream_id"\s*:\s*("(?:[^"\\]|\\.){0,256}")')
# What a client names and keeps with the server: as long as the longest that anybody's service makes, and more.
Name = Annotated[str, StringConstraints(max_length=256)]


class Part(Asked):
    """A part of a message's content, or of a call's output."""

    type: str
    text: str | None = None
    refusal: str | None = None


Content = str | Annotated[list[Part], Field(max_length=4096)]


class InputItem(Asked):
    """An item of a conversation; its type determines which fields it has."""

    type: str = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: Content | None = None
    summary: list[Part] | None = None
    encrypted_content: str | None = None
    call_id: str | None = None
    name: str | None = None
    namespace: str | None = None
    arguments: str | None = None
    output: Content | None = None

    def items(self, place: str) -> Iterator[Item]:
        """The item, independent of the dialect. Raises InvalidRequest that names what is missing or not supported."""
        match self.type:
            case "message":
                role = self._require(self.role, place, "role")
                said = _text_of(self._require(self.content, place, "content"), f"{place}.content")
                if role == "assistant":
                    if said.strip():
                        yield Message("assistant", said)
                else:
                    yield Message("user" if role == "user" else "system", said)
            case "reasoning":
                thought = _text_of(self.content or "", f"{place}.content")
                yield Reasoning(thought or unseal(self.encrypted_content))
            case "function_call":
                name = self._require(self.name, place, "name")
                arguments = self._require(self.arguments, place, "arguments")
                yield Call(visible_name(self.namespace, name), arguments, self._require(self.call_id, place, "call_id"))
            case "function_call_output":
                output = _text_of(self._require(self.output, place, "output"), f"{place}.output")
                yield Output(output, self._require(self.call_id, place, "call_id"))
            case _:
                raise InvalidRequest(
                    f"{place}: items of type {short_repr(self.type)} are not supported", f"{place}.type"
                )

    def _require(self, value: Any, place: str, name: str) -> Any:
        if value is None:
            raise InvalidRequest(f"{place}.{name}: a {self.type} needs it", f"{place}.{name}")
        return value


class Tool(Asked):
    """A function, or a namespace of functions."""

    type: str
    name: ToolName | None = None
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None
    tools: list[Tool] | None = None

    def plain(self, place: str, namespace: str | None = None) -> Iterator[PlainTool]:
        """The functions, independent of the dialect. Raises InvalidRequest."""
        if self.type in _HOSTED:
            return
        if self.type != "function" and (self.type != "namespace" or namespace is not None):
            raise InvalidRequest(f"{place}: tools of type {short_repr(self.type)} are not supported", f"{place}.type")
        if self.name is None:
            raise InvalidRequest(f"{place}.name: a tool needs one", f"{place}.name")
        if self.type == "function":
            name = visible_name(namespace, self.name)
            yield PlainTool(name, self.description, self.parameters, bool(self.strict))
        else:
            for index, tool in enumerate(self.tools or ()):
                yield from tool.plain(f"{place}.tools.{index}", self.name)


class ChosenTool(Asked):
    """The tool that must be called, or the tools that may be called."""

    type: Literal["function", "allowed_tools"]
    name: str | None = None
    namespace: str | None = None
    mode: Literal["auto", "required"] = "auto"
    tools: list[JsonObject] | None = None


class Format(Asked):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: JsonObject | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextOptions(Asked):
    format: Format | None = None
    verbosity: str | None = None


class ReasoningOptions(Asked):
    """`summary` is a hint: reasoning is sent whole."""

    effort: str | None = None
    summary: str | None = None


class ConversationRef(Asked):
    id: Name


class ResponseRequest(AskedBody):
    """The body of `POST /v1/responses`. A field that OpenAI does not define is ignored."""

    model_config = ConfigDict(json_schema_extra=describe_neutral)

    NEUTRAL: ClassVar[dict[str, tuple[object, ...]]] = {
        "background": (False,),
        "context_management": ([],),
        "max_tool_calls": (),
        "moderation": (),
        "prompt": (),
    }

    input: str | list[InputItem] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    conversation: Name | ConversationRef | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    truncation: Literal["auto", "disabled"] | None = None
    max_output_tokens: MostTokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=MOST_TOKENS), AS_WHOLE] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64), AS_WHOLE] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), AS_WHOLE] | None = None
    stream: bool | None = None
    store: bool | None = None
    generate: bool | None = None
    stream_id: Name | None = None
    include: list[str] | None = None
    metadata: JsonObject | None = None
    # Hints that change no answer.
    client_metadata: JsonObject | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: JsonObject | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    stream_options: JsonObject | None = None
    user: str | None = None

    @property
    def is_prewarm(self) -> bool:
        """Whether the input is only to be read, ahead of the request that follows."""
        return self.generate is False or bool((self.prompt_cache_options or {}).get("prewarm"))

    @property
    def conversation_id(self) -> str | None:
        return self.conversation.id if isinstance(self.conversation, ConversationRef) else self.conversation

    @property
    def has_logprobs(self) -> bool:
        return "message.output_text.logprobs" in (self.include or ())

    def namespaces(self) -> dict[str, tuple[str, str]]:
        """The namespace of each tool that has one and its name there, by the name that the model sees."""
        return {
            visible_name(space.name, tool.name or ""): (space.name or "", tool.name or "")
            for space in self.tools or ()
            if space.type == "namespace"
            for tool in space.tools or ()
        }

    def choice(self) -> Choice:
        """Which tools may be called."""
        is_parallel = self.parallel_tool_calls is not False
        match self.tool_choice:
            case "none":
                return NO_CALLS
            case ChosenTool(type="function", name=str() as name, namespace=namespace):
                return Choice(frozenset({visible_name(namespace, name)}), True, is_parallel)
            case ChosenTool(type="allowed_tools", tools=list() as tools, mode=mode):
                names = frozenset(visible_name(tool.get("namespace"), str(tool.get("name"))) for tool in tools)
                return Choice(names, mode == "required", is_parallel)
            case ChosenTool():
                raise InvalidRequest("tool_choice names no tool", "tool_choice")
            case chosen:
                return Choice(None, chosen == "required", is_parallel)

    def check_combinations(self) -> None:
        """Raises InvalidRequest if fields that are valid by themselves cannot be honoured together."""
        if self.previous_response_id is not None and self.conversation is not None:
            raise MalformedRequest(
                "previous_response_id and conversation both say what goes before: send one", "conversation"
            )
        if self.top_logprobs is not None and not self.has_logprobs:
            raise MalformedRequest("top_logprobs needs message.output_text.logprobs in include", "top_logprobs")
        if self.input is None and self.previous_response_id is None and self.conversation is None:
            raise InvalidRequest("input: there is nothing to answer: send some", "input")


def visible_name(namespace: str | None, name: str) -> str:
    """The name under which the model sees a tool."""
    return f"{namespace}.{name}" if namespace else name


def read(body: bytes, text: Text, terms: Terms) -> tuple[ResponseRequest, Question]:
    """The request in `body`, and the Question that it asks. Raises InvalidRequest, ModelNotFound or SlabOverflow."""
    asked = ResponseRequest.parse(body)
    asked.check_combinations()
    asked.check_model(terms.label)
    said = [*_items_of(asked)]
    places, items = tuple(place for place, _ in said), tuple(item for _, item in said)
    check_length((Message("system", asked.instructions or ""), *items), text, terms.most_tokens)
    tools = [plain for index, tool in enumerate(asked.tools or ()) for plain in tool.plain(f"tools.{index}")]
    names = [tool.name for tool in tools]
    if len(set(names)) < len(names):
        raise InvalidRequest("tools must have names of their own", "tools")
    choice = asked.choice()
    choice.check(names)
    schema = _schema_of(asked)
    bounds = Bounds.of_tools(tools, choice, text, schema, "text.format")
    if asked.has_logprobs and bounds.form is not None:
        raise MalformedRequest("logprobs cannot be had beside tools: send one of them", "include")
    effort = asked.reasoning.effort if asked.reasoning else None
    options = thinking_options(text, effort, {}, "reasoning.effort")
    question = Question(
        items,
        places,
        head_of(text, [tool.for_template() for tool in tools], options, asked.instructions or ""),
        options,
        bounds,
        temperature=temperature_of(asked.temperature, asked.top_p),
        top_p=asked.top_p or 1.0,
        top_k=asked.top_k or 0,
        seed=asked.seed,
        max_tokens=limit_of(asked.max_output_tokens),
        top_logprobs=(asked.top_logprobs or 0) if asked.has_logprobs else None,
        forgets=None if asked.truncation is None else asked.truncation == "auto",
    )
    return asked.model_copy(update={"input": None}), question


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame of a WebSocket: its lane, and its request or why there is none."""

    stream_id: str | None
    read: tuple[ResponseRequest, Question] | Exception


def read_frame(body: bytes, text: Text, terms: Terms) -> Frame:
    """Reads a frame. It raises nothing: a fault in the frame is part of the result, to be reported on its lane."""
    stream_id = None
    try:
        asked = from_json(body)
        if isinstance(asked, dict):
            lane = asked.get("stream_id")
            stream_id = lane if isinstance(lane, str) else None
            kind = asked.get("type")
            if kind != "response.create":
                raise InvalidRequest(
                    f"frames of type {short_repr(kind)} are not supported: send response.create", "type"
                )
        return Frame(stream_id, read(body, text, terms))
    except RequestError as error:
        return Frame(stream_id, error)
    except ValueError as error:
        return Frame(stream_id, MalformedRequest(f"the frame is not JSON: {error}"))


def lane_in(body: bytes) -> str | None:
    """The lane of a frame that was not read, as far as its bytes tell without that."""
    with suppress(ValueError):
        if (found := _LANE.search(body)) is not None:
            lane: str = from_json(found[1])
            return lane
    return None


def _items_of(asked: ResponseRequest) -> Iterator[tuple[str, Item]]:
    if isinstance(asked.input, str):
        yield "input", Message("user", asked.input)
    else:
        for index, item in enumerate(asked.input or ()):
            place = f"input.{index}"
            for plain in item.items(place):
                yield place, plain


def _schema_of(asked: ResponseRequest) -> dict[str, Any] | None:
    form = asked.text.format if asked.text else None
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return {"type": "object"}
    if form.schema_ is None:
        raise InvalidRequest("text.format.schema: the type json_schema needs one", "text.format.schema")
    return form.schema_


def _text_of(content: str | list[Part], place: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for index, part in enumerate(content):
        text = part.refusal if part.type == "refusal" else part.text
        if part.type not in _TEXTS or text is None:
            raise InvalidRequest(
                f"{place}.{index}: parts of type {short_repr(part.type)} are not supported", f"{place}.{index}.type"
            )
        texts.append(text)
    return "".join(texts)


_TEXTS = frozenset({"input_text", "output_text", "text", "reasoning_text", "summary_text", "refusal"})
