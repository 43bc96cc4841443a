"""What clients really send for a chat completion, and the question that is made of it."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from api.dialects.chat.request import read
from api.question import Question
from api.reading import Terms
from runtime.errors import InvalidRequest, MalformedRequest
from runtime.text import Text
from tests.templates import DEEPSEEK, HERMES, PLAIN, QWEN3, text_with

TERMS = Terms("m", 4096)
ASKED: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


def question(text: Text, **more: Any) -> Question:
    return read(json.dumps(ASKED | more).encode(), text, TERMS)[1]


def tool(schema: dict[str, Any] | None, name: str = "clock", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": schema} | more}


class TestThinking:
    @pytest.mark.parametrize(
        "asked", [{"reasoning_effort": "none"}, {"chat_template_kwargs": {"enable_thinking": False}}], ids=str
    )
    def test_is_switched_off_by_the_templates_own_switch(self, asked: dict[str, Any]) -> None:
        assert question(text_with(QWEN3), **asked).options == {"enable_thinking": False}

    def test_that_cannot_be_switched_off_is_refused_by_name(self) -> None:
        with pytest.raises(MalformedRequest, match="reasoning_effort") as refused:
            question(text_with(DEEPSEEK), reasoning_effort="none")
        assert refused.value.param == "reasoning_effort"

    @pytest.mark.parametrize("effort", ["none", "minimal", "low", "high", "xhigh"])
    def test_of_a_model_that_does_not_think_is_nothing_to_refuse(self, effort: str) -> None:
        assert question(text_with(PLAIN), reasoning_effort=effort) == question(text_with(PLAIN))

    @pytest.mark.parametrize("name", ["messages", "tools", "chat_template", "add_generation_prompt"])
    def test_options_do_not_take_the_place_of_the_request(self, name: str) -> None:
        with pytest.raises(MalformedRequest, match=name):
            question(text_with(QWEN3), chat_template_kwargs={name: "x"})


# What agents' tools have in their schemas, and no grammar follows to the letter.
LOOSE: dict[str, dict[str, Any]] = {
    "int64": {"type": "object", "properties": {"a": {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}}},
    "$schema unheard of": {"$schema": "https://example.org/mine", "type": "object"},
    "propertyNames": {"type": "object", "propertyNames": {"pattern": "^a"}},
    "not": {"type": "object", "properties": {"a": {"not": {}}}},
    "uniqueItems": {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}},
    "lookahead": {"type": "object", "properties": {"a": {"type": "string", "pattern": "^(?!b).*$"}}},
    "overlapping oneOf": {
        "type": "object",
        "properties": {"a": {"oneOf": [{"type": "integer"}, {"type": "number", "minimum": 3}]}},
    },
    "500 optional ones": {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(500)}},
    "format": {"type": "object", "properties": {"a": {"type": "string", "format": "of a kind of its own"}}},
    "if": {"type": "object", "if": {"required": ["a"]}, "then": {"required": ["b"]}},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "minContains": {"type": "object", "properties": {"a": {"type": "array", "contains": {"type": "integer"}}}},
    "properties null": {"type": "object", "properties": None},
    "type unheard of": {"type": "object", "properties": {"a": {"type": "date"}}},
    "reference to nowhere": {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}},
}
# These are followed as they are.
FOLLOWED: dict[str, dict[str, Any] | None] = {
    "none": None,
    "empty": {},
    "annotations": {"type": "object", "title": "T", "description": "D", "properties": {"a": {"default": 1}}},
    "$schema": {"$schema": "https://json-schema.org/draft/2020-12/schema", "type": "object"},
    "$defs": {"type": "object", "properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"b": {"type": "string"}}},
}


class TestATool:
    text = text_with(HERMES)

    @pytest.mark.parametrize("name", [*LOOSE, *FOLLOWED])
    def test_that_is_not_strict_is_never_refused_for_its_schema(self, name: str) -> None:
        asked = question(self.text, tools=[tool({**LOOSE, **FOLLOWED}[name])])

        assert asked.bounds.grammar(self.text) is not None

    @pytest.mark.parametrize("name", LOOSE)
    def test_that_is_strict_is_refused_by_its_name(self, name: str) -> None:
        tools = [tool({}, "first"), tool(LOOSE[name], "second", strict=True)]
        with pytest.raises(InvalidRequest, match="second") as refused:
            question(self.text, tools=tools)
        assert refused.value.param == "tools.1"
        assert "\n" not in str(refused.value)

    @pytest.mark.parametrize("name", FOLLOWED)
    def test_that_is_strict_is_followed_where_it_can_be(self, name: str) -> None:
        assert question(self.text, tools=[tool(FOLLOWED[name], strict=True)]).bounds.grammar(self.text) is not None

    def test_that_is_loosened_is_logged_without_what_it_says(self, caplog: pytest.LogCaptureFixture) -> None:
        question(self.text, tools=[tool({"type": "object", "propertyNames": {"pattern": "^xyzzy"}}, "plugh")])

        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert "xyzzy" not in caplog.text
        assert "plugh" not in caplog.text

    def test_is_refused_where_the_template_knows_none(self) -> None:
        with pytest.raises(MalformedRequest, match="knows no tools") as refused:
            question(text_with(PLAIN), tools=[tool({})])
        assert refused.value.param == "tools"

    @pytest.mark.parametrize("name", ["server.tool", "server/tool", "mcp:tool", "a-b_c", "a" * 128])
    def test_may_be_named_as_agents_name_theirs(self, name: str) -> None:
        assert question(self.text, tools=[tool({}, name)]).bounds.grammar(self.text) is not None

    def test_may_be_one_of_hundreds(self) -> None:
        asked = question(self.text, tools=[tool({"type": "object"}, f"tool_{n}") for n in range(300)])

        assert asked.bounds.grammar(self.text) is not None


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ({"top_p": 0}, {"temperature": 0}),
        ({"max_tokens": -1}, {"max_tokens": 2**31 - 1}),
        ({"max_completion_tokens": -1}, {"max_tokens": 2**31 - 1}),
        ({"stop": None, "n": None, "tools": None, "seed": None}, {}),
        ({"user": "me", "store": True, "verbosity": "low", "metadata": {"a": "b"}}, {}),
        ({"prompt_cache_key": "k", "safety_identifier": "s", "service_tier": "auto"}, {}),
    ],
    ids=str,
)
def test_what_clients_send_means_what_they_mean_by_it(asked: dict[str, Any], meant: dict[str, Any]) -> None:
    text = text_with(PLAIN)

    assert question(text, **asked) == question(text, **meant)


def test_calls_of_earlier_turns_are_taken_as_clients_send_them_back() -> None:
    call = {"id": "1", "type": None, "function": {"name": "clock", "arguments": "{"}}
    messages = [
        *ASKED["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": [{"type": "text", "text": "noon"}], "tool_call_id": "1"},
    ]

    items = question(text_with(HERMES), messages=messages).items

    assert [type(item).__name__ for item in items] == ["Message", "Call", "Output"]
