"""Several answers, logprobs, structured output and tools, through OpenAI's own client."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from runtime.models import SEEDLING, find_model
from tests.contract.openai_clients import TALK, Client, async_client, options, text_of
from tests.contract.servers import ServerProcess, started
from tests.templates import HERMES

pytestmark = pytest.mark.door

DRAWN = {"temperature": 1.0, "seed": 5}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of some days.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer", "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}


@pytest.fixture(scope="module")
def caller_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server whose model's template knows tools; the model does not, so that it is the grammar that calls."""
    directory: Path = tmp_path_factory.mktemp("models") / "caller"
    shutil.copytree(find_model(SEEDLING), directory)
    (directory / "chat_template.jinja").write_text(HERMES)
    with started("hypercorn-trio", model=str(directory), model_label=SEEDLING) as server:
        yield server


@pytest.fixture(scope="module")
def caller(caller_server: ServerProcess) -> Iterator[Client]:
    with async_client(caller_server) as client:
        yield client


def texts_of(answer: ChatCompletion) -> list[str | None]:
    assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
    return [choice.message.content for choice in answer.choices]


def texts_in(chunks: list[ChatCompletionChunk], count: int) -> list[str]:
    choices = [choice for chunk in chunks for choice in chunk.choices]
    return ["".join(choice.delta.content or "" for choice in choices if choice.index == n) for n in range(count)]


class TestSeveralAnswers:
    def test_are_the_answers_of_the_seeds_that_follow(self, client: Client) -> None:
        alone = [text_of(client.answer(**DRAWN | {"seed": 5 + index})) for index in range(3)]

        answer = client.answer(n=3, **DRAWN)

        assert texts_of(answer) == alone == texts_in(client.chunks(n=3, **DRAWN), 3)
        assert len(set(alone)) == 3

    def test_are_counted_with_one_prompt(self, client: Client) -> None:
        one, three = client.answer(max_tokens=4).usage, client.answer(max_tokens=4, n=3).usage

        assert one is not None
        assert three is not None
        assert three.prompt_tokens == one.prompt_tokens
        assert three.completion_tokens == 3 * one.completion_tokens
        *_, last = client.chunks(max_tokens=4, n=3, stream_options={"include_usage": True})
        assert last.usage == three

    def test_each_begin_with_a_role_and_end_with_a_reason(self, client: Client) -> None:
        choices = [choice for chunk in client.chunks(n=2, max_tokens=3) for choice in chunk.choices]

        for index in range(2):
            mine = [choice for choice in choices if choice.index == index]
            assert [choice.delta.role for choice in mine] == ["assistant", *[None] * (len(mine) - 1)]
            assert [choice.finish_reason for choice in mine] == [*[None] * (len(mine) - 1), "length"]

    def test_more_than_there_are_permits_are_refused_by_name(self, client: Client) -> None:
        with pytest.raises(openai.UnprocessableEntityError) as refused:
            client.answer(n=5)
        assert refused.value.param == "n"


def test_who_has_the_whole_answer_may_ask_for_the_next(client: Client) -> None:
    """Each takes all permits there are, under `reject`."""
    for _ in range(10):
        client.answer(n=4, max_tokens=2)
        client.chunks(n=4, max_tokens=2)


class TestLogprobs:
    def test_are_of_the_tokens_that_make_the_text(self, client: Client) -> None:
        answer = client.answer(logprobs=True, top_logprobs=3)

        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content
        assert "".join(one.token for one in logprobs.content) == text_of(answer)
        for one in logprobs.content:
            assert one.token.encode() == bytes(one.bytes or [])
            # Greedy, so that the token is the likeliest.
            assert (one.top_logprobs[0].token, one.top_logprobs[0].logprob) == (one.token, one.logprob)
            assert len(one.top_logprobs) == 3

    def test_of_a_stream_are_those_of_the_answer(self, client: Client) -> None:
        logprobs = client.answer(logprobs=True, **DRAWN).choices[0].logprobs
        chunks = client.chunks(logprobs=True, **DRAWN)

        assert logprobs is not None
        streamed = [
            one
            for chunk in chunks
            for choice in chunk.choices
            for one in (choice.logprobs and choice.logprobs.content) or []
        ]
        assert streamed == logprobs.content
        assert all(one.top_logprobs == [] for one in streamed)

    def test_tell_nothing_of_a_stop_string(self, client: Client) -> None:
        whole = text_of(client.answer())

        answer = client.answer(logprobs=True, stop=whole[8:16])

        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        assert whole[:8].startswith("".join(one.token for one in logprobs.content))

    def test_are_not_there_where_they_were_not_asked_for(self, client: Client) -> None:
        assert client.answer(max_tokens=2).choices[0].logprobs is None


def formatted(schema: dict[str, Any]) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "it", "strict": True, "schema": schema}}}


class TestStructuredOutput:
    @pytest.mark.parametrize("seed", range(5))
    def test_validates(self, client: Client, seed: int) -> None:
        answer = client.answer(temperature=1.0, seed=seed, max_tokens=200, **formatted(PERSON))

        jsonschema.validate(json.loads(text_of(answer)), PERSON)
        assert answer.choices[0].finish_reason == "stop"

    def test_of_a_stream_is_the_same(self, client: Client) -> None:
        asked = DRAWN | formatted(PERSON) | {"max_tokens": 200}

        assert texts_in(client.chunks(**asked), 1) == [text_of(client.answer(**asked))]

    def test_of_several_answers_validates_in_each(self, client: Client) -> None:
        answer = client.answer(n=3, max_tokens=200, **DRAWN, **formatted(PERSON))

        for text in texts_of(answer):
            jsonschema.validate(json.loads(text or ""), PERSON)

    def test_of_any_object_parses_when_it_is_whole(self, client: Client) -> None:
        asked = {"response_format": {"type": "json_object"}, "max_tokens": 300, "temperature": 1.0}
        whole = [
            text_of(answer)
            for answer in (client.answer(seed=seed, **asked) for seed in range(6))
            if answer.choices[0].finish_reason == "stop"
        ]

        assert all(isinstance(json.loads(text), dict) for text in whole)
        begun = client.answer(max_tokens=5, response_format={"type": "json_object"})
        assert text_of(begun).startswith("{")

    def test_that_was_cut_says_so(self, client: Client) -> None:
        answer = client.answer(max_tokens=3, **formatted(PERSON))

        assert answer.choices[0].finish_reason == "length"


def test_a_schema_given_as_a_class_comes_back_as_its_instance(plain: ServerProcess) -> None:
    class Pet(BaseModel):
        kind: bool
        legs: int

    with openai.OpenAI(**options(plain, "none")) as client:
        answer = client.chat.completions.parse(
            model=SEEDLING,
            messages=[{"role": "user", "content": "Tell me about the sea."}],
            response_format=Pet,
            max_tokens=100,
            temperature=0,
        )

    assert isinstance(answer.choices[0].message.parsed, Pet)


class TestTools:
    def test_that_must_be_called_are(self, caller: Client) -> None:
        answer = caller.answer(
            tools=[WEATHER, CLOCK], tool_choice="required", parallel_tool_calls=False, max_tokens=200
        )

        [choice] = answer.choices
        [call] = choice.message.tool_calls or []
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        assert call.type == "function"
        assert call.function.name in ("weather", "clock")

    @pytest.mark.parametrize("seed", range(4))
    def test_chosen_by_name_get_arguments_that_validate(self, caller: Client, seed: int) -> None:
        chosen = {"type": "function", "function": {"name": "weather"}}
        asked = {"tools": [CLOCK, WEATHER], "tool_choice": chosen, "parallel_tool_calls": False}

        answer = caller.answer(max_tokens=200, temperature=1.0, seed=seed, **asked)

        [call] = answer.choices[0].message.tool_calls or []
        assert call.type == "function"
        assert call.function.name == "weather"
        jsonschema.validate(json.loads(call.function.arguments), WEATHER["function"]["parameters"])

    def test_come_in_deltas_that_make_the_same_calls(self, caller: Client) -> None:
        asked = {
            "tools": [WEATHER],
            "tool_choice": "required",
            "parallel_tool_calls": False,
            "max_tokens": 200,
            **DRAWN,
        }

        [call] = caller.answer(**asked).choices[0].message.tool_calls or []
        chunks = caller.chunks(**asked)

        deltas = [one for chunk in chunks for choice in chunk.choices for one in choice.delta.tool_calls or []]
        assert {delta.index for delta in deltas} == {0}
        assert [bool(delta.id) for delta in deltas] == [True, *[False] * (len(deltas) - 1)]
        functions = [delta.function for delta in deltas if delta.function]
        assert call.type == "function"
        assert [function.name for function in functions] == [call.function.name, *[None] * (len(deltas) - 1)]
        assert functions[0].arguments == ""
        assert len(deltas) > 3
        assert "".join(function.arguments or "" for function in functions) == call.function.arguments
        assert chunks[-1].choices[0].finish_reason == "tool_calls"
        assert not any(choice.delta.content for chunk in chunks for choice in chunk.choices)

    def test_that_may_be_called_need_not_be(self, caller: Client) -> None:
        answer = caller.answer(tools=[WEATHER])

        assert answer.choices[0].message.tool_calls is None
        assert answer.choices[0].message.content

    def test_that_may_not_be_called_are_shown_and_not_called(self, caller: Client) -> None:
        shown, allowed, without = (
            caller.answer(**more)
            for more in ({"tools": [WEATHER], "tool_choice": "none"}, {"tools": [WEATHER]}, {"tools": openai.omit})
        )

        assert shown.choices[0].message.tool_calls is None
        assert shown.usage is not None
        assert allowed.usage is not None
        assert without.usage is not None
        # The same prompt, so that what was read of it serves whoever may call again.
        assert shown.usage.prompt_tokens == allowed.usage.prompt_tokens > without.usage.prompt_tokens

    def test_results_go_back_by_the_template(self, caller: Client) -> None:
        call = {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
        talk = [
            *TALK,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "noon", "tool_call_id": "call_1"},
        ]

        usage = caller.answer(messages=talk, tools=[CLOCK]).usage
        shorter = caller.answer(messages=TALK, tools=[CLOCK]).usage

        assert usage is not None
        assert shorter is not None
        assert usage.prompt_tokens > shorter.prompt_tokens
