"""Answers that follow a JSON schema, or call a tool instead."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from api.dialects.messages import request as messages
from api.dialects.responses import request as responses
from api.question import Question
from api.reading import Terms
from runtime.errors import MalformedRequest
from runtime.text import Text
from tests.runtime.test_tools import CALL, follows
from tests.templates import HERMES, LLAMA, text_with

TERMS = Terms("m", 4096)
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
ANSWER = '{"city": "Rome"}'


def in_responses(text: Text, choice: str) -> Question:
    asked: dict[str, Any] = {
        "model": "m",
        "input": "hello",
        "tools": [{"type": "function", "name": "clock", "parameters": PARAMETERS}],
        "tool_choice": choice,
        "text": {"format": {"type": "json_schema", "name": "place", "schema": SCHEMA}},
    }
    return responses.read(json.dumps(asked).encode(), text, TERMS)[1]


def in_messages(text: Text, choice: str) -> Question:
    kinds = {"auto": "auto", "required": "any", "none": "none"}
    asked: dict[str, Any] = {
        "model": "m",
        "max_tokens": 50,
        "messages": [{"role": "user", "content": "hello"}],
        "tools": [{"name": "clock", "input_schema": PARAMETERS}],
        "tool_choice": {"type": kinds[choice]},
        "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
    }
    return messages.read(json.dumps(asked).encode(), text, TERMS)[1]


DIALECTS = {"responses": (in_responses, "text.format"), "messages": (in_messages, "output_config.format")}
Ask = Callable[[Text, str], Question]


@pytest.mark.parametrize("choice", ["auto", "required", "none"])
@pytest.mark.parametrize("ask", [ask for ask, _ in DIALECTS.values()], ids=DIALECTS)
def test_an_answer_follows_the_schema_or_calls_a_tool_as_the_choice_has_it(ask: Ask, choice: str) -> None:
    text = text_with(HERMES)
    bounds = ask(text, choice).bounds
    grammar = bounds.grammar(text)

    assert grammar is not None
    assert follows(text, grammar, ANSWER) is (choice != "required")
    assert follows(text, grammar, CALL) is (choice != "none")
    assert not follows(text, grammar, "Rome")
    assert (bounds.reader() is None) is (choice == "none")


@pytest.mark.parametrize(("ask", "param"), DIALECTS.values(), ids=DIALECTS)
def test_both_are_refused_where_calls_look_like_other_json(ask: Ask, param: str) -> None:
    with pytest.raises(MalformedRequest, match="send one of them") as refused:
        ask(text_with(LLAMA), "auto")
    assert refused.value.param == param
