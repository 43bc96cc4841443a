"""What clients are told when the engine fails: the server ends, and not before each of them knows why."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
import trio

from api.client import connect
from api.http import DEPRECATION
from runtime.errors import EngineFailed, PerennialError
from tests.actors.engines import BREAKS
from tests.api.doors import HELLO, House, open_house

BREAKING: dict[str, object] = {**HELLO, "messages": [{"role": "user", "content": f"word{BREAKS}"}]}
COMPLETIONS = "/v1/chat/completions"


@asynccontextmanager
async def failing_house() -> AsyncIterator[tuple[House, trio.Nursery]]:
    """A house whose engine fails in the block, and a nursery for clients that are still there when it has."""
    with trio.fail_after(100):
        async with trio.open_nursery() as clients:
            with pytest.RaisesGroup(EngineFailed, flatten_subgroups=True):
                async with open_house(http_overflow="evict") as house:
                    yield house, clients
                    await trio.sleep_forever()


def client_of(house: House) -> httpx.AsyncClient:
    host, port = house.http
    return httpx.AsyncClient(base_url=f"http://{host}:{port}", timeout=100)


async def test_an_http_client_is_answered_with_500_and_all_headers() -> None:
    answers: list[httpx.Response] = []

    async def ask(house: House, body: dict[str, object]) -> None:
        async with client_of(house) as client:
            answers.append(await client.post(COMPLETIONS, json=body))

    async with failing_house() as (house, clients):
        clients.start_soon(ask, house, BREAKING)

    assert [answer.status_code for answer in answers] == [500]
    assert answers[0].json()["error"]["type"] == "server_error"
    assert {name: answers[0].headers[name] for name in DEPRECATION} == DEPRECATION


async def test_a_stream_that_runs_ends_with_an_error() -> None:
    lines: list[str] = []
    has_begun = trio.Event()

    async def stream(house: House) -> None:
        body = HELLO | {"stream": True, "max_tokens": 10**6, "ignore_eos": True}
        async with client_of(house) as client, client.stream("POST", COMPLETIONS, json=body) as response:
            async for line in response.aiter_lines():
                lines.append(line)
                has_begun.set()

    async def ask(house: House) -> None:
        async with client_of(house) as client:
            await client.post(COMPLETIONS, json=BREAKING)

    async with failing_house() as (house, clients):
        clients.start_soon(stream, house)
        await has_begun.wait()
        clients.start_soon(ask, house)

    *_, last = [line for line in lines if line]
    assert '"server_error"' in last


async def test_a_grpc_client_is_told_so() -> None:
    told: list[PerennialError] = []

    async def ask(house: House) -> None:
        async with connect(house.grpc) as client:
            session = await client.create_session()
            with pytest.raises(PerennialError) as caught:
                await session.append([BREAKS])
            told.append(caught.value)

    async with failing_house() as (house, clients):
        clients.start_soon(ask, house)

    assert "engine" in str(told[0])
