"""The HTTP door through clients that others wrote on top of OpenAI's, and through none at all."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import Iterator
from typing import Literal

import pytest
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, SecretStr

from runtime.models import SEEDLING
from tests.contract.loops import MOST_S
from tests.contract.servers import ServerProcess

pytestmark = pytest.mark.door

SEA = "Tell me about the sea."


class Weather(BaseModel):
    """Something with an end, even for a small model: every text of it is short."""

    sky: Literal["clear", "cloudy"]
    is_windy: bool


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    # A loop of asyncio's own: with trio_asyncio imported, a new loop would be made over trio.
    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        yield runner


@pytest.fixture(scope="module")
def model(server: ServerProcess, runner: asyncio.Runner) -> Iterator[ChatOpenAI]:
    model = ChatOpenAI(
        model=SEEDLING,
        base_url=f"{server.http}/v1",
        api_key=SecretStr("none"),
        temperature=0,
        max_completion_tokens=40,
        max_retries=0,
        timeout=MOST_S,
        stream_usage=True,
    )
    yield model
    runner.run(model.root_async_client.close())
    model.root_client.close()


def test_an_answer_is_the_same_whole_and_streamed_and_with_a_loop_and_without(
    model: ChatOpenAI, runner: asyncio.Runner
) -> None:
    async def streamed() -> str:
        return "".join([chunk.text async for chunk in model.astream(SEA)])

    whole = model.invoke(SEA)

    assert whole.text
    assert whole.response_metadata["finish_reason"] == "stop"
    assert "".join(chunk.text for chunk in model.stream(SEA)) == whole.text
    assert runner.run(model.ainvoke(SEA)).text == whole.text
    assert runner.run(streamed()) == whole.text


def test_the_tokens_used_are_counted_alike_whole_and_streamed(model: ChatOpenAI) -> None:
    chunks = [chunk.usage_metadata for chunk in model.stream(SEA) if chunk.usage_metadata]

    usage = model.invoke(SEA).usage_metadata

    assert usage is not None
    assert [chunk["total_tokens"] for chunk in chunks] == [usage["total_tokens"]]


# OpenAI's client puts the parsed object where its own type says none, and langchain serialises that.
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning")
def test_an_answer_by_a_schema_is_an_object_of_it(model: ChatOpenAI, runner: asyncio.Runner) -> None:
    structured = model.with_structured_output(Weather, method="json_schema")

    weather = structured.invoke("How is the weather?")

    assert isinstance(weather, Weather)
    assert runner.run(structured.ainvoke("How is the weather?")) == weather
    assert list(structured.stream("How is the weather?"))[-1] == weather


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not here")
def test_curl_shows_a_stream_line_by_line(server: ServerProcess) -> None:
    body = {"model": SEEDLING, "messages": [{"role": "user", "content": SEA}], "max_tokens": 4, "stream": True}
    command = ["curl", "-N", "--silent", "--show-error", "--max-time", "60", f"{server.http}/v1/chat/completions"]
    sent = ["-H", "content-type: application/json", "-d", json.dumps(body)]

    said = subprocess.run([*command, *sent], capture_output=True, text=True, check=True).stdout

    *events, nothing = said.split("\n\n")
    assert nothing == ""
    assert all(event.startswith("data: ") for event in events)
    assert events[-1] == "data: [DONE]"
    assert len(events) > 3
