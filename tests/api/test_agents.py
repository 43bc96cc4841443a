"""What agents rely on beside the recordings: histories told anew, answers broken off, lanes, and ids that nobody knows."""

from __future__ import annotations

import copy
from array import array
from collections.abc import Awaitable, Callable
from importlib import import_module
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from api.event_stream import KEEPALIVE_S
from runtime import Sampling
from tests import templates
from tests.actors.engines import LedgerEngine
from tests.api.agents import calling, heard, heard_on, open_lane
from tests.api.doors import House, open_house
from tests.api.recordings import Heard
from tests.api.scripted import ScriptedEngine
from tests.api.test_rude_clients import tasks_living
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


async def test_frames_that_wait_share_the_room_for_bodies_until_their_client_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(import_module("api.http.app"), "MOST_UPLOAD_BYTES", 2**20)
    short = {"type": "response.create", "model": "seedling", "max_output_tokens": 2, "input": "hello"}
    long = {"type": "unheard of", "padding": "x" * 300_000}
    async with open_house() as house:
        house.engine.hold()
        async with open_lane(house.http) as leaves:
            await leaves.send(short)
            await house.engine.begun()
            # What comes after it is read after it, so all that is before it waits by then.
            for frame in (long, long, long, {"type": "unheard of", "stream_id": "another"}):
                await leaves.send(frame)
            while (await leaves.receive()).get("stream_id") != "another":
                pass
            async with open_lane(house.http) as other:
                refused = await heard_on(other, long)
        house.engine.open()
        async with open_lane(house.http) as other:
            # The server learns that the first has left when its socket says so.
            with trio.fail_after(100):
                while (read := await heard_on(other, long)).error == refused.error:
                    pass

    assert refused.error is not None
    assert read.error is not None
    assert "too many long bodies" in refused.error["message"]
    assert "unheard of" in read.error["message"]


async def test_lanes_whose_requests_were_answered_are_forgotten() -> None:
    engine = new_engine()
    async with open_house(engine, engine.text) as house, open_lane(house.http) as lane:
        await heard_on(lane, {"type": "unheard of", "stream_id": "first"})
        await trio.testing.wait_all_tasks_blocked(0.01)
        tasks = tasks_living()
        for number in range(200):
            answer = await heard_on(lane, {"type": "unheard of", "stream_id": f"lane {number}"})
            assert answer.error is not None

        await trio.testing.wait_all_tasks_blocked(0.01)
        assert tasks_living() <= tasks


class TestALongPrompt:
    """An agent gives up on a stream in which nothing comes for minutes, and each has an event that says nothing new."""

    @pytest.mark.parametrize(
        ("path", "asked", "begins", "silence"),
        [
            ("/v1/responses", {"input": "hello word7"}, 2, "response.in_progress"),
            ("/v1/messages", {"messages": [{"role": "user", "content": "hello word7"}]}, 1, "ping"),
        ],
        ids=["responses", "messages"],
    )
    async def test_is_no_silence(
        self, mock_clock: MockClock, path: str, asked: dict[str, Any], begins: int, silence: str
    ) -> None:
        body = {"model": "seedling", "stream": True, "max_tokens": 2, "max_output_tokens": 2} | asked
        async with open_house() as house:
            house.engine.hold()
            async with calling(house.http, path, body) as call:
                await house.engine.begun()
                heard_first = [await call.receive() for _ in range(begins)]
                assert None not in heard_first
                await self.check_silence(mock_clock, call.receive, silence)
                house.engine.open()
                while (event := await call.receive()) is not None:
                    assert event["type"] not in ("error", "response.failed")

    async def test_is_no_silence_on_a_socket(self, mock_clock: MockClock) -> None:
        async with open_house() as house, open_lane(house.http) as lane:
            house.engine.hold()
            frame = {"type": "response.create", "model": "seedling", "max_output_tokens": 2, "input": "hello word7"}
            await lane.send(frame)
            await house.engine.begun()
            for _ in range(2):
                await lane.receive()
            await self.check_silence(mock_clock, lane.receive, "response.in_progress")
            house.engine.open()

    async def check_silence(
        self, clock: MockClock, receive: Callable[[], Awaitable[dict[str, Any] | None]], expected: str
    ) -> None:
        for _ in range(3):
            await trio.testing.wait_all_tasks_blocked(0.01)
            clock.jump(KEEPALIVE_S + 1)
            event = await receive()
            assert event is not None
            assert event["type"] == expected


async def test_words_that_begin_an_answer_are_continued_and_counted() -> None:
    engine = new_engine()
    begun = {"model": "local-model", "messages": [said("user", "Tell me."), said("assistant", "Once upon")]}
    async with open_house(engine, engine.text, model_label="local-model", sink=4, window=65_532) as house:
        answer = await told(house, engine, begun | {"max_tokens": 20}, " a time.")

        assert [part.text for part in answer.parts] == [" a time."]
        assert engine.text.spelled(array("I", engine.history)).endswith("<|im_start|>assistant\nOnce upon a time.")
        assert answer.usage is not None
        async with calling(house.http, "/v1/messages/count_tokens", begun) as call:
            counted = await call.receive()
        assert counted == {"input_tokens": answer.usage["reused"] + answer.usage["read"]}


def said(role: str, words: str) -> dict[str, Any]:
    return {"role": role, "content": words}
