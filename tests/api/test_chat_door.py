"""Chat completions over HTTP, on an engine whose forwards the test can hold."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import trio
from trio.testing import MockClock

from api.event_stream import KEEPALIVE_S
from runtime import Sampling
from tests.actors.engines import LedgerEngine, tiny_text
from tests.api.doors import JSON, House, open_house

GREEDY = Sampling()
COMPLETIONS = "/v1/chat/completions"
ASKED: dict[str, Any] = {"model": "seedling", "max_tokens": 6, "ignore_eos": True, "temperature": 0}


def said(*token_ids: int, role: str = "user") -> dict[str, str]:
    return {"role": role, "content": " ".join(f"word{token_id}" for token_id in token_ids)}


@asynccontextmanager
async def client_of(house: House) -> AsyncIterator[httpx.AsyncClient]:
    host, port = house.http
    async with httpx.AsyncClient(base_url=f"http://{host}:{port}", timeout=60) as client:
        yield client


async def complete(client: httpx.AsyncClient, *messages: dict[str, str], **more: Any) -> dict[str, Any]:
    response = await client.post(COMPLETIONS, json=ASKED | {"messages": messages} | more)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def text_of(answer: dict[str, Any], index: int = 0) -> str:
    text: str = answer["choices"][index]["message"]["content"]
    return text


def continued(engine: LedgerEngine, prompt: list[int], sampling: Sampling = GREEDY) -> str:
    """What the engine says behind a prompt, found without slabs."""
    return tiny_text().decode(engine.continued(prompt, 6, sampling))


def cached(answer: dict[str, Any]) -> int:
    count: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return count


class Stream:
    """A stream of events, read from a socket as it comes."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._received = b""

    async def ask(self, **body: Any) -> None:
        data = json.dumps(ASKED | {"stream": True} | body).encode()
        await self._stream.send_all(f"POST {COMPLETIONS} {JSON}{len(data)}\r\n\r\n".encode() + data)

    async def until(self, mark: bytes) -> bytes:
        """What comes up to and with `mark`."""
        while mark not in self._received:
            more = await self._stream.receive_some()
            assert more, self._received
            self._received += more
        before, _, self._received = self._received.partition(mark)
        return before + mark


class TestALongPrompt:
    async def test_is_not_waited_for_before_the_stream_begins(self) -> None:
        async with open_house() as house, await trio.open_tcp_stream(*house.http) as connection:
            stream = Stream(connection)
            house.engine.hold()
            await stream.ask(messages=[said(*range(5, 15))])
            await house.engine.begun()

            head = await stream.until(b'"role":"assistant"')

            assert head.startswith(b"HTTP/1.1 200 ")
            house.engine.open()
            await stream.until(b"data: [DONE]")

    async def test_is_no_silence(self, mock_clock: MockClock) -> None:
        async with open_house() as house, await trio.open_tcp_stream(*house.http) as connection:
            stream = Stream(connection)
            house.engine.hold()
            await stream.ask(messages=[said(*range(5, 15))])
            await house.engine.begun()
            await stream.until(b'"role":"assistant"')
            for _ in range(3):
                await trio.testing.wait_all_tasks_blocked(0.01)
                mock_clock.jump(KEEPALIVE_S + 1)

                assert b"data: " in await stream.until(b'"delta":{}')

            house.engine.open()
            rest = await stream.until(b"data: [DONE]")
            assert b"error" not in rest


class TestAPrefix:
    """That a slab has read already is not read again, and no bit of the answer tells."""

    @pytest.mark.parametrize("drawn", [{}, {"temperature": 1.0, "seed": 7}], ids=["greedy", "sampled"])
    async def test_of_the_turn_before_is_cached(self, drawn: dict[str, Any]) -> None:
        sampling = Sampling(**drawn)
        async with open_house(max_concurrent=1) as house, client_of(house) as client:
            first = await complete(client, said(5, 6, 7), **drawn)
            second = await complete(client, said(5, 6, 7), said(8, 9), **drawn)
            third = await complete(client, said(5, 6, 7), said(8, 9), **drawn)

        assert text_of(first) == continued(house.engine, [5, 6, 7], sampling)
        assert text_of(second) == text_of(third) == continued(house.engine, [5, 6, 7, 8, 9], sampling)
        assert [cached(answer) for answer in (first, second, third)] == [0, 3, 5]

    async def test_that_another_completion_has_displaced_is_not(self) -> None:
        async with open_house(max_concurrent=1) as house, client_of(house) as client:
            await complete(client, said(5, 6, 7))
            await complete(client, said(50, 51))
            answer = await complete(client, said(5, 6, 7))

        assert (cached(answer), text_of(answer)) == (0, continued(house.engine, [5, 6, 7]))

    async def test_is_shared_by_several_answers(self) -> None:
        drawn = {"temperature": 1.0, "seed": 7, "n": 3}
        async with open_house(max_concurrent=3) as house, client_of(house) as client:
            answers = [await complete(client, said(5, 6, 7), **drawn) for _ in range(2)]

        expected = [continued(house.engine, [5, 6, 7], Sampling(1.0, seed=7 + index)) for index in range(3)]
        for answer in answers:
            assert [text_of(answer, index) for index in range(3)] == expected
        assert [cached(answer) for answer in answers] == [0, 3]


class TestAnOpenTurn:
    async def test_is_gone_on_with(self) -> None:
        async with open_house() as house, client_of(house) as client:
            answer = await complete(
                client, said(5, 6), said(7, role="assistant"), continue_final_message=True, add_generation_prompt=False
            )

        assert text_of(answer) == continued(house.engine, [5, 6, 7])

    async def test_must_be_the_assistants(self) -> None:
        async with open_house() as house, client_of(house) as client:
            body = ASKED | {"messages": [said(5)], "continue_final_message": True}
            refused = await client.post(COMPLETIONS, json=body)

        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "messages")


class TestTheModel:
    @pytest.mark.parametrize("label", ["seedling", "org/name", "org/name:FILE.gguf", "a b"])
    async def test_is_found_by_its_name_with_the_length_of_its_context(self, label: str) -> None:
        async with open_house(model_label=label) as house, client_of(house) as client:
            model = (await client.get(f"/v1/models/{label}")).json()
            listed = (await client.get("/v1/models")).json()

        assert (model["id"], model["object"]) == (label, "model")
        assert model["context_length"] == model["max_model_len"] == house.engine.spec.visible
        assert listed["data"] == [model]

    async def test_of_another_name_is_not_found(self) -> None:
        async with open_house() as house, client_of(house) as client:
            refused = [await client.get(f"/v1/models/{name}") for name in ("gpt-4", "org/gpt-4", "seedling/x")]

        assert [(each.status_code, each.json()["error"]["code"]) for each in refused] == [(404, "model_not_found")] * 3

    async def test_has_its_health_told_at_either_path(self) -> None:
        async with open_house() as house, client_of(house) as client:
            health = [(await client.get(path)).json() for path in ("/health", "/healthz")]

        assert health == [{"status": "ok", "model": "seedling"}] * 2


async def test_a_page_that_may_call_is_told_so_before_it_does() -> None:
    asks = {
        "Origin": "https://a.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
    }
    async with open_house(allowed_origins=("https://a.example",)) as house, client_of(house) as client:
        told = await client.options(COMPLETIONS, headers=asks)
        refused = await client.options(COMPLETIONS, headers=asks | {"Origin": "https://b.example"})
        answer = await client.post(
            COMPLETIONS, json=ASKED | {"messages": [said(5)]}, headers={"Origin": "https://a.example"}
        )

    assert told.status_code == 204
    assert told.headers["access-control-allow-origin"] == "https://a.example"
    assert "POST" in told.headers["access-control-allow-methods"]
    assert told.headers["access-control-allow-headers"] == asks["Access-Control-Request-Headers"]
    assert refused.status_code == 403
    assert "access-control-allow-origin" not in refused.headers
    assert answer.headers["access-control-allow-origin"] == "https://a.example"
