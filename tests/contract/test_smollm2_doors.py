"""SmolLM2, a real model, behind both doors: a long conversation far past the window, JSON of a schema, and its refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from runtime.smollm2 import SMOLLM2
from runtime.text import Text
from tests.contract.loops import MOST_S
from tests.contract.servers import ServerProcess, started
from tests.contract.stubs import Stock, Stubs, stock

pytestmark = pytest.mark.door

TURNS, MOST_TOKENS = 30, 10
SINK, WINDOW = 4, 124
QUESTIONS = (
    "Tell me one fact about the moon.",
    "And one about the sea?",
    "Name a color that you like.",
    "What is two plus two?",
    "Say something kind.",
)


@pytest.fixture(scope="module")
def server(smollm2: Path) -> Iterator[ServerProcess]:
    settings: dict[str, Any] = {"model": SMOLLM2, "sink": SINK, "window": WINDOW, "http_overflow": "evict"}
    with started("perennial", **settings) as server:
        yield server


@pytest.fixture(scope="module")
def text(smollm2: Path) -> Text:
    return Text.load(smollm2)


@pytest.fixture(scope="module")
def client(server: ServerProcess, stubs: Stubs) -> Iterator[Stock]:
    with stock(stubs, server.grpc) as client:
        yield client


def completion(server: ServerProcess, messages: list[dict[str, str]], **fields: Any) -> dict[str, Any]:
    body = {"model": SMOLLM2, "messages": messages, "temperature": 0} | fields
    answer = httpx.post(f"{server.http}/v1/chat/completions", json=body, timeout=MOST_S)
    answer.raise_for_status()
    content: dict[str, Any] = answer.json()
    return content


def test_thirty_turns_far_past_the_window_are_answered_as_a_session_that_is_fed_them_at_once(
    server: ServerProcess, client: Stock, text: Text
) -> None:
    session = client.create(text.render([{"role": "user", "content": QUESTIONS[0]}]))
    history = text.render([{"role": "user", "content": QUESTIONS[0]}])
    for turn in range(1, TURNS):
        drawn = client.generated(session, MOST_TOKENS)
        after = text.render_next_turn(QUESTIONS[turn % len(QUESTIONS)], drawn[-1] in text.eos_token_ids)
        client.append(session, after)
        history += [*drawn, *after]
    info = client.info(session)

    assert info.history_length == len(history) > 4 * (SINK + WINDOW)
    assert info.evicted_token_count == len(history) - SINK - WINDOW
    assert client.generated(session, MOST_TOKENS) == client.generated(client.create(history), MOST_TOKENS)


def test_a_conversation_over_http_past_the_window_is_answered_as_over_grpc(
    server: ServerProcess, client: Stock, text: Text
) -> None:
    messages = []
    for question in QUESTIONS * 3:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": "I would say so."}]
    messages.append({"role": "user", "content": "What is the capital of France?"})
    prompt = text.render(messages)
    assert len(prompt) > 2 * (SINK + WINDOW)

    answer = completion(server, messages, max_tokens=MOST_TOKENS)

    session = client.create(prompt, eos_token_ids=sorted(text.eos_token_ids))
    assert answer["choices"][0]["message"]["content"] == text.decode(client.generated(session, MOST_TOKENS))
    assert answer["usage"]["prompt_tokens"] == len(prompt)


def test_it_knows_a_fact_and_ends_its_turn(server: ServerProcess) -> None:
    answer = completion(server, [{"role": "user", "content": "What is the capital of France?"}], max_tokens=20)

    assert answer["choices"][0]["message"]["content"] == "The capital of France is Paris."
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_it_fills_a_json_schema_with_what_it_was_told(server: ServerProcess) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "maximum": 150}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    answer = completion(
        server,
        [{"role": "user", "content": "Anna is 31 years old. Write her name and age as JSON."}],
        max_tokens=60,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": schema}},
    )

    assert json.loads(answer["choices"][0]["message"]["content"]) == {"name": "Anna", "age": 31}


def test_tools_are_refused_by_name_for_its_template_knows_none(server: ServerProcess) -> None:
    tools = [{"type": "function", "function": {"name": "clock"}}]
    body = {"model": SMOLLM2, "messages": [{"role": "user", "content": "What time is it?"}], "tools": tools}

    answer = httpx.post(f"{server.http}/v1/chat/completions", json=body, timeout=MOST_S)

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "tools"
    assert "knows no tools" in answer.json()["error"]["message"]


def test_the_log_says_what_became_of_its_tensors_in_one_line(server: ServerProcess) -> None:
    (line,) = [line for line in server.said if "tensors of the file" in line]

    assert "210 of Q4_1" in line
    assert "1 of Q8_0" in line
