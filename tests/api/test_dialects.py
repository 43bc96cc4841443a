"""What clients send in every dialect, and what each makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from api.dialects.chat import request as chat
from api.dialects.messages import request as messages
from api.dialects.responses import request as responses
from api.question import Question
from api.reading import Terms
from runtime.errors import InvalidRequest, SlabOverflow
from runtime.text import Text
from tests.templates import HERMES, text_with

TERMS = Terms("m", 4096)
SAID = {"messages": [{"role": "user", "content": "hello"}]}
Body = dict[str, Any]


def tool_of_chat(schema: object, **more: Any) -> Body:
    return {"type": "function", "function": {"name": "clock", "parameters": schema} | more}


def tool_of_responses(schema: object, **more: Any) -> Body:
    return {"type": "function", "name": "clock", "parameters": schema} | more


def tool_of_messages(schema: object, **more: Any) -> Body:
    return {"name": "clock", "input_schema": schema} | more


class Dialect:
    """How a request is written in a dialect, and read."""

    def __init__(
        self, read: Callable[[bytes, Text, Terms], tuple[Any, Question]], said: Body, tool: Callable[..., Body]
    ) -> None:
        self._read = read
        self._said = said
        self.tool = tool

    def question(self, **more: Any) -> Question:
        body = json.dumps({"model": "m", **self._said, **more}).encode()
        return self._read(body, text_with(HERMES), TERMS)[1]

    def refusal(self, **more: Any) -> InvalidRequest:
        with pytest.raises(InvalidRequest) as refused:
            self.question(**more)
        return refused.value


CHAT = Dialect(chat.read, SAID, tool_of_chat)
RESPONSES = Dialect(responses.read, {"input": "hello"}, tool_of_responses)
MESSAGES = Dialect(messages.read, SAID, tool_of_messages)
in_each = pytest.mark.parametrize("dialect", [CHAT, RESPONSES, MESSAGES], ids=["chat", "responses", "messages"])


class TestATool:
    """llguidance has a key of its own in schemas, by which a schema says how it is to be followed."""

    @in_each
    @pytest.mark.parametrize("guidance", [5, None, [1], "x", {"lenient": 5}, {"x": {}}, True], ids=str)
    def test_is_followed_whatever_its_schema_tells_the_grammar(self, dialect: Dialect, guidance: object) -> None:
        question = dialect.question(tools=[dialect.tool({"type": "object", "x-guidance": guidance})])

        assert question.bounds.grammar(text_with(HERMES)) is not None


class TestANumberThatIsNone:
    """JSON has neither NaN nor infinity, and no client could read an answer that quotes one."""

    @in_each
    @pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")], ids=str)
    @pytest.mark.parametrize("place", ["metadata", "tools"])
    def test_is_refused_by_the_name_of_its_field(self, dialect: Dialect, number: float, place: str) -> None:
        odd = {"type": "object", "properties": {"a": {"type": "number", "default": [number]}}}
        error = dialect.refusal(**{place: {"a": number} if place == "metadata" else [dialect.tool(odd)]})

        assert str(error).startswith(place)
        assert (error.param or "").startswith(place)

    def test_is_refused_in_the_arguments_of_an_earlier_call(self) -> None:
        call = {"type": "tool_use", "id": "1", "name": "clock", "input": {"a": float("nan")}}
        said = [*SAID["messages"], {"role": "assistant", "content": [call]}]

        assert (MESSAGES.refusal(messages=said).param or "").startswith("messages.1.content")

    def test_is_refused_in_the_schema_of_an_answer(self) -> None:
        form = {"type": "json_schema", "name": "a", "schema": {"const": float("inf")}}

        assert (RESPONSES.refusal(text={"format": form}).param or "").startswith("text.format.schema")


@pytest.mark.parametrize("value", [[1], {"a": 1}], ids=str)
def test_an_option_of_the_wrong_type_is_named_as_the_client_names_it(value: object) -> None:
    assert CHAT.refusal(chat_template_kwargs={"depth": value}).param == "chat_template_kwargs.depth"


@pytest.mark.parametrize(
    ("dialect", "field"),
    [(CHAT, "max_tokens"), (CHAT, "max_completion_tokens"), (RESPONSES, "max_output_tokens"), (MESSAGES, "max_tokens")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_answer_of_minus_one_tokens_may_have_all_there_is_room_for(dialect: Dialect, field: str) -> None:
    assert dialect.question(**{field: -1}) == dialect.question(**{field: 2**31 - 1})
    assert dialect.refusal(**{field: -2}).param == field
    assert dialect.refusal(**{field: 0}).param == field


class TestAToolOfTheVendors:
    @pytest.mark.parametrize(
        "kind",
        ["web_search", "web_search_2025_08_26", "web_search_preview", "web_search_preview_2025_03_11", "file_search"],
    )
    def test_that_openai_runs_is_left_out(self, kind: str) -> None:
        assert RESPONSES.question(tools=[{"type": kind}]) == RESPONSES.question()

    @pytest.mark.parametrize("kind", ["mcp", "computer_use_preview", "local_shell", "shell", "custom"])
    def test_that_openai_does_not_run_is_refused_by_its_type(self, kind: str) -> None:
        error = RESPONSES.refusal(tools=[RESPONSES.tool({}), {"type": kind}])

        assert (error.param, repr(kind) in str(error)) == ("tools.1.type", True)

    @pytest.mark.parametrize(
        "kind",
        ["web_search_20250305", "web_fetch_20250910", "code_execution_20250825", "tool_search_tool_bm25_20251119"],
    )
    def test_that_anthropic_runs_is_left_out(self, kind: str) -> None:
        assert MESSAGES.question(tools=[{"type": kind, "name": "web_search", "max_uses": 5}]) == MESSAGES.question()

    @pytest.mark.parametrize("kind", ["bash_20250124", "text_editor_20250728", "computer_20250124", "memory_20250818"])
    def test_whose_schema_only_anthropics_models_know_is_refused_by_its_type(self, kind: str) -> None:
        error = MESSAGES.refusal(tools=[MESSAGES.tool({}), {"type": kind, "name": "bash"}])

        assert (error.param, repr(kind) in str(error)) == ("tools.1.type", True)

    def test_of_the_kind_that_clients_define_is_a_tool(self) -> None:
        assert MESSAGES.question(tools=[MESSAGES.tool({}, type="custom")]) == MESSAGES.question(
            tools=[MESSAGES.tool({})]
        )


@pytest.mark.parametrize("field", ["conversation", "stream_id"])
def test_a_name_that_the_server_keeps_for_a_client_has_a_bound(field: str) -> None:
    RESPONSES.question(**{field: "x" * 256})

    assert RESPONSES.refusal(**{field: "x" * 257}).param == field


def test_words_that_begin_the_answer_are_continued() -> None:
    def is_open(*last: Body) -> bool:
        return MESSAGES.question(messages=[*SAID["messages"], *last]).is_open_turn

    call = {"type": "tool_use", "id": "1", "name": "clock", "input": {}}
    assert is_open({"role": "assistant", "content": "Once upon"})
    assert not is_open()
    assert not is_open({"role": "assistant", "content": " "})
    assert not is_open({"role": "assistant", "content": [{"type": "text", "text": "Well."}, call]})
    assert not MESSAGES.question(messages=[{"role": "assistant", "content": ""}]).is_open_turn


@pytest.mark.parametrize(
    ("dialect", "field"), [(RESPONSES, "instructions"), (MESSAGES, "system")], ids=["responses", "messages"]
)
def test_instructions_that_can_never_fit_are_refused_by_their_length(dialect: Dialect, field: str) -> None:
    with pytest.raises(SlabOverflow, match="1000000 characters"):
        dialect.question(**{field: "x" * 999_995})


def test_logprobs_beside_tools_are_refused() -> None:
    asked: Body = {
        "include": ["message.output_text.logprobs"],
        "tools": [{"type": "function", "name": "f", "parameters": {}}],
    }

    assert RESPONSES.refusal(**asked).param == "include"
    assert RESPONSES.question(**asked | {"tool_choice": "none"}).top_logprobs == 0
