"""The body of a request for a message, and the checks on it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

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
from runtime.errors import InvalidRequest
from runtime.items import Call, Item, Message, Output, Reasoning
from runtime.script import head_of
from runtime.text import Text

# Such a block tells the vendor's service whom to bill. It differs between conversations, and a model need not read it.
_BILLING = "x-anthropic-billing-header:"

# Tools that the vendor's service runs itself, as OpenAI's does too; each has a date behind its name.
_HOSTED = ("web_search_", "web_fetch_", "code_execution_", "tool_search_tool_")

Place = tuple[str, Item]


class Block(Asked):
    """A block of a message's content; its type determines which fields it has."""

    type: str
    text: str | None = None
    thinking: str | None = None
    signature: str | None = None
    id: str | None = None
    name: str | None = None
    input: JsonObject | None = None
    tool_use_id: str | None = None
    tool_name: str | None = None
    is_error: bool | None = None
    content: str | list[Block] | None = None


class MessageIn(Asked):
    """A message. A system message keeps its place among the others."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class Tool(Asked):
    """A tool. One with `defer_loading` is shown to the model only where it is first referred to."""

    type: str | None = None
    name: ToolName
    description: str | None = None
    input_schema: JsonObject | None = None
    strict: bool | None = None
    defer_loading: bool | None = None

    def check_type(self, place: str) -> bool:
        """Whether it is a tool that the client runs; False if the vendor's service would. Raises InvalidRequest."""
        if self.type is not None and self.type.startswith(_HOSTED):
            return False
        if self.type not in (None, "custom"):
            raise InvalidRequest(f"{place}: tools of type {short_repr(self.type)} are not supported", f"{place}.type")
        return True

    def plain(self) -> PlainTool:
        """The tool, independent of the dialect."""
        return PlainTool(self.name, self.description, self.input_schema, bool(self.strict))


class ToolChoice(Asked):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Asked):
    """`budget_tokens` and `display` are hints: the model itself decides how long it thinks."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None
    display: str | None = None


class OutputFormat(Asked):
    type: Literal["json_schema"]
    schema_: JsonObject = Field(alias="schema")


class OutputConfig(Asked):
    effort: str | None = None
    format: OutputFormat | None = None


def _keeps_all(management: object) -> bool:
    """Whether it only asks to keep what the server keeps anyway."""
    edits = management.get("edits", []) if isinstance(management, dict) else None
    return isinstance(edits, list) and all(isinstance(edit, dict) and edit.get("keep") == "all" for edit in edits)


class MessageRequest(AskedBody):
    """The body of `POST /v1/messages`, and of the one that counts its tokens. Unknown fields are ignored."""

    model_config = ConfigDict(json_schema_extra=describe_neutral)

    NEUTRAL: ClassVar[dict[str, tuple[object, ...]]] = {"container": (), "mcp_servers": ([],)}

    messages: Annotated[list[MessageIn], Field(min_length=1)]
    system: str | list[Block] | None = None
    max_tokens: MostTokens | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    context_management: JsonObject | None = None
    stop_sequences: (
        Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=16)] | None
    ) = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=MOST_TOKENS), AS_WHOLE] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64), AS_WHOLE] | None = None
    stream: bool | None = None
    metadata: JsonObject | None = None
    service_tier: str | None = None

    def choice(self) -> Choice:
        """Which tools may be called."""
        chosen = self.tool_choice
        if chosen is None:
            return Choice()
        if chosen.type == "none":
            return NO_CALLS
        names = frozenset({chosen.name or ""}) if chosen.type == "tool" else None
        return Choice(names, chosen.type in ("any", "tool"), not chosen.disable_parallel_tool_use)

    def effort(self) -> str | None:
        """How much the model is to think."""
        if self.thinking and self.thinking.type == "disabled":
            return "none"
        return self.output_config.effort if self.output_config else None


def read(body: bytes, text: Text, terms: Terms) -> tuple[MessageRequest, Question]:
    """The request in `body`, and the Question that it asks. Raises InvalidRequest, ModelNotFound or SlabOverflow."""
    asked = MessageRequest.parse(body)
    asked.check_model(terms.label)
    if asked.context_management and not _keeps_all(asked.context_management):
        raise InvalidRequest(
            "context_management is not supported but for `keep: all`: leave it out", "context_management"
        )
    own = [tool for index, tool in enumerate(asked.tools or ()) if tool.check_type(f"tools.{index}")]
    tools = {tool.name: tool for tool in own}
    if len(tools) < len(own):
        raise InvalidRequest("tools must have names of their own", "tools")
    said = [*_items_of(asked, tools)]
    places, items = tuple(place for place, _ in said), tuple(item for _, item in said)
    system = _system_of(asked)
    check_length((Message("system", system), *items), text, terms.most_tokens)
    choice = asked.choice()
    choice.check(tools)
    plain = [tool.plain() for tool in tools.values()]
    shown = [tool.plain().for_template() for tool in tools.values() if not tool.defer_loading]
    form = asked.output_config.format if asked.output_config else None
    bounds = Bounds.of_tools(plain, choice, text, form.schema_ if form else None, "output_config.format")
    options = thinking_options(text, asked.effort(), {}, "thinking")
    question = Question(
        items,
        places,
        head_of(text, shown, options, system),
        options,
        bounds,
        temperature=temperature_of(asked.temperature, asked.top_p),
        top_p=asked.top_p or 1.0,
        top_k=asked.top_k or 0,
        seed=asked.seed,
        max_tokens=limit_of(asked.max_tokens),
        stop=tuple(asked.stop_sequences or ()),
        # In this dialect words of the assistant's at the end begin its answer.
        is_open_turn=bool(items) and isinstance(items[-1], Message) and items[-1].role == "assistant",
    )
    return asked.model_copy(update={"messages": [], "system": None, "tools": None}), question


def _system_of(asked: MessageRequest) -> str:
    if asked.system is None or isinstance(asked.system, str):
        return asked.system or ""
    texts = [_text_of(block, f"system.{index}") for index, block in enumerate(asked.system)]
    return "\n\n".join(text for text in texts if not text.startswith(_BILLING))


def _items_of(asked: MessageRequest, tools: Mapping[str, Tool]) -> Iterator[Place]:
    for index, message in enumerate(asked.messages):
        place = f"messages.{index}"
        blocks = [Block(type="text", text=message.content)] if isinstance(message.content, str) else message.content
        if message.role == "assistant":
            yield from _assistants(blocks, place)
        else:
            yield from _others(message.role, blocks, place, tools)


def _assistants(blocks: list[Block], place: str) -> Iterator[Place]:
    for index, block in enumerate(blocks):
        at = f"{place}.content.{index}"
        match block.type:
            case "text":
                if (said := _text_of(block, at)).strip():
                    yield at, Message("assistant", said)
            case "thinking":
                yield at, Reasoning(block.thinking or unseal(block.signature))
            case "redacted_thinking":
                pass
            case "tool_use":
                if block.name is None or block.input is None:
                    raise InvalidRequest(f"{at}: a tool_use needs name and input", at)
                yield at, Call(block.name, json.dumps(block.input, ensure_ascii=False), block.id or "")
            case _:
                raise _unsupported(block, at)


def _others(
    role: Literal["user", "system"], blocks: list[Block], place: str, tools: Mapping[str, Tool]
) -> Iterator[Place]:
    """One item for each result of a call, and one for each run of text between them."""
    texts: list[str] = []
    begin = place
    for index, block in enumerate(blocks):
        at = f"{place}.content.{index}"
        match block.type:
            case "text":
                begin = begin if texts else at
                texts.append(_text_of(block, at))
            case "tool_result" if role == "user":
                if texts:
                    yield begin, Message(role, "\n\n".join(texts))
                    texts = []
                yield at, Output(_result(block, at, tools), block.tool_use_id or "")
            case _:
                raise _unsupported(block, at)
    if texts or not blocks:
        yield begin, Message(role, "\n\n".join(texts))


def _result(block: Block, place: str, tools: Mapping[str, Tool]) -> str:
    if block.content is None or isinstance(block.content, str):
        return block.content or ""
    parts = []
    for index, part in enumerate(block.content):
        at = f"{place}.content.{index}"
        if part.type == "text":
            parts.append(_text_of(part, at))
        elif part.type == "tool_reference":
            if (tool := tools.get(part.tool_name or "")) is None:
                raise InvalidRequest(f"{at}: tools holds no {short_repr(part.tool_name)}", at)
            parts.append(json.dumps(tool.plain().for_template(), ensure_ascii=False))
        else:
            raise _unsupported(part, at)
    return "\n".join(parts)


def _text_of(block: Block, place: str) -> str:
    if block.type != "text" or block.text is None:
        raise _unsupported(block, place)
    return block.text


def _unsupported(block: Block, place: str) -> InvalidRequest:
    return InvalidRequest(f"{place}: blocks of type {short_repr(block.type)} are not supported here", f"{place}.type")
