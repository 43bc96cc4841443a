"""What agents rely on beside the recordings: histories told anew, answers broken off, lanes, and ids that nobody knows."""

from __future__ import annotations

import copy
from array import array
from typing import Any

import pytest

from runtime import Sampling
from tests import templates
from tests.actors.engines import LedgerEngine
from tests.api.agents import heard, heard_on, open_lane
from tests.api.doors import House, open_house
from tests.api.recordings import Heard
from tests.api.scripted import ScriptedEngine
from tests.templates import text_with

TOOL = {
    "name": "shell",
    "description": "Runs a command.",
    "input_schema": {"type": "object", "properties": {"command": {"type": "string"}, "limit": {"type": "number"}}},
}
CALL = 'Well.\n<tool_call>\n{"name": "shell", "arguments": {"command": "caf\u00e9", "limit": 5000.0}}\n</tool_call>'
ASKED: dict[str, Any] = {
    "model": "local-model",
    "max_tokens": 200,
    "system": "Be brief.",
    "tools": [TOOL],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "Say hi.", "cache_control": {"type": "ephemeral"}}]}
    ],
}


def new_engine() -> ScriptedEngine:
    return ScriptedEngine(text_with(templates.QWEN))


async def told(house: House, engine: ScriptedEngine, body: dict[str, Any], says: str) -> Heard:
    engine.write(says)
    answer = await heard(house.http, "/v1/messages", body)
    assert answer.error is None
    return answer


def going_on(answer: Heard, result: str) -> dict[str, Any]:
    """The same conversation with a tool's result, as a client tells it who spells and marks everything otherwise."""
    body = copy.deepcopy(ASKED)
    body["messages"] = [
        {"role": "user", "content": "Say hi."},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "another"},
                {"type": "text", "text": "Well."},
                {
                    "type": "tool_use",
                    "id": "toolu_anew",
                    "name": "shell",
                    "input": {"limit": 5000, "command": "caf\u00e9"},
                },
            ],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_anew", "content": result}]},
    ]
    return body


async def test_a_history_that_is_spelled_anew_is_not_read_again() -> None:
    engine = new_engine()
    async with open_house(engine, engine.text, model_label="local-model", sink=4, window=65_532) as house:
        first = await told(house, engine, ASKED, f"<think>\n  Hm. \n</think>\n\n{CALL}")
        history = len(engine.history)

        second = await told(house, engine, going_on(first, "hi"), "Done.")

        assert second.usage is not None
        assert (second.usage["cache_read_input_tokens"], second.usage["broke_at"]) == (history, None)


async def test_one_byte_of_a_result_that_changes_is_read_again_from_there_and_named() -> None:
    engine = new_engine()
    async with open_house(engine, engine.text, model_label="local-model", sink=4, window=65_532) as house:
        first = await told(house, engine, ASKED, f"<think>\nHm.\n</think>\n\n{CALL}")
        await told(house, engine, going_on(first, "hi"), "Done.")
        before = array("I", engine.history)

        changed = await told(house, engine, going_on(first, "ho"), "Done.")

        assert changed.usage is not None
        at = next(n for n, pair in enumerate(zip(before, engine.history, strict=False)) if pair[0] != pair[1])
        assert (changed.usage["cache_read_input_tokens"], changed.usage["broke_at"]) == (at, "messages.2.content.0")


async def test_lanes_of_one_socket_answer_in_their_own_order_and_name_each_others_responses() -> None:
    engine = new_engine()
    asked = {"type": "response.create", "model": "local-model"}
    async with (
        open_house(engine, engine.text, model_label="local-model", sink=4, window=65_532) as house,
        open_lane(house.http) as lane,
    ):
        engine.write("One.")
        first = await heard_on(lane, asked | {"input": "Say one.", "stream_id": "a"})
        history = len(engine.history)
        engine.write("Two.")
        second = await heard_on(
            lane, asked | {"input": "Say two.", "stream_id": "b", "previous_response_id": first.response_id}
        )

        assert [part.text for part in (*first.parts, *second.parts)] == ["One.", "Two."]
        assert second.usage is not None
        assert second.usage["input_tokens_details"]["cached_tokens"] == history


@pytest.mark.parametrize("kept", [True, False])
async def test_who_names_a_response_that_nobody_holds_is_told_so_and_the_socket_lives(kept: bool) -> None:
    engine = new_engine()
    asked = {"type": "response.create", "model": "local-model", "store": kept}
    async with (
        open_house(engine, engine.text, model_label="local-model", sink=4, window=65_532) as house,
        open_lane(house.http) as lane,
    ):
        lost = await heard_on(lane, asked | {"input": "Go on.", "previous_response_id": "resp_unknown"})
        engine.write("Hi.")
        whole = await heard_on(lane, asked | {"input": "Say hi."})

        assert lost.error is not None
        assert (lost.error["code"], [part.text for part in whole.parts]) == ("previous_response_not_found", ["Hi."])


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, seed=7)])
async def test_answers_after_reuse_and_forks_are_those_of_a_fresh_session(sampling: Sampling) -> None:
    engine = LedgerEngine(window=512)
    asked = {"model": "seedling", "max_output_tokens": 8, "temperature": sampling.temperature, "seed": sampling.seed}
    async with open_house(engine, sink=2, window=512) as house:
        ids: list[str | None] = [None]
        for before, said in [(0, "hello word7"), (1, "word8"), (1, "word9 word9"), (2, "word8"), (0, "hello word7")]:
            name = {"previous_response_id": ids[before]} if ids[before] else {}
            answer = await heard(house.http, "/v1/responses", asked | name | {"input": said})
            ids.append(answer.response_id)
            point = house.runtime.conversations.points.named(answer.response_id or "")
            assert point is not None
            assert answer.usage is not None
            length = answer.usage["input_tokens"]
            prompt, drawn = point.history[:length], point.history[length:]

            assert len(drawn) == answer.usage["output_tokens"]
            assert [*drawn] == engine.continued(prompt, len(drawn), sampling)
