"""Both doors on the OpenVINO engine, with slabs as they are and of 8 bits. All of them run on it by `just openvino`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import trio

from api.client import ClientSession, connect
from runtime import Token
from runtime.engine.openvino_fit import fits_cpu
from tests.contract.openai_clients import CLIENTS, TALK
from tests.contract.servers import PATIENT, ServerProcess, started
from tests.contract.stubs import ENDLESS, PROMPT

pytestmark = [
    pytest.mark.door,
    pytest.mark.skipif(not fits_cpu(), reason="OpenVINO's kernels were not tried on such a CPU"),
]

# Past the window, so that slots are written anew.
VISIBLE, COUNT = 64, 80


@pytest.fixture(scope="module", params=["auto", "int8"])
def server(request: pytest.FixtureRequest) -> Iterator[ServerProcess]:
    with on_openvino(request.param) as server:
        yield server


def on_openvino(kv_dtype: str, state: Path | str = "") -> AbstractContextManager[ServerProcess]:
    return started(
        "perennial",
        application=PATIENT,
        backend="openvino",
        kv_dtype=kv_dtype,
        sink=4,
        window=VISIBLE - 4,
        http_overflow="evict",
        state_dir=state,
    )


async def drawn(session: ClientSession, count: int) -> list[int]:
    async with session.generate(count, temperature=0.8, seed=7) as events:
        return [event.token_id async for event in events if isinstance(event, Token)]


def test_streams_beside_each_other_say_what_one_says_alone(server: ServerProcess) -> None:
    async def talk() -> None:
        async with connect(server.grpc) as client:
            said: list[list[int]] = []

            async def stream(cut: int) -> None:
                async with client.session() as session:
                    for start in range(0, len(PROMPT), cut):
                        await session.append(PROMPT[start : start + cut])
                    said.append(await drawn(session, COUNT))

            await stream(len(PROMPT))
            async with trio.open_nursery() as nursery:
                for cut in (1, 3, 7):
                    nursery.start_soon(stream, cut)
            assert len(said[0]) == COUNT
            assert said == said[:1] * 4

    trio.run(talk)


def test_a_client_that_leaves_finds_its_session_usable(server: ServerProcess) -> None:
    async def leave() -> None:
        async with connect(server.grpc) as client, client.session() as session:
            await session.append(PROMPT)
            async with session.generate(ENDLESS) as events:
                await anext(events)

            assert len(await drawn(session, 1)) == 1

    trio.run(leave)


def test_a_completion_is_the_same_twice_and_as_a_stream(server: ServerProcess) -> None:
    with CLIENTS["sync"](server) as client:
        first, second = (client.answer(messages=TALK, max_tokens=20, seed=3, temperature=1.0) for _ in range(2))
        chunks = client.chunks(messages=TALK, max_tokens=20, seed=3, temperature=1.0)

    text = first.choices[0].message.content
    assert text
    assert second.choices[0].message.content == text
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text


def test_a_session_goes_on_after_a_restart_and_over_slabs_of_another_type_is_read_again(tmp_path: Path) -> None:
    async def begin(address: str) -> tuple[str, list[int]]:
        async with connect(address) as client:
            session = await client.create_session()
            await session.append(PROMPT)
            await drawn(session, COUNT)
            return session.id, await drawn(await session.fork(), COUNT)

    async def go_on(address: str, session_id: str) -> list[int]:
        async with connect(address) as client:
            return await drawn(client.find_session(session_id), COUNT)

    def complaints_of(server: ServerProcess) -> list[str]:
        return [line for line in server.said if "is read again" in line]

    with on_openvino("int8", tmp_path) as server:
        session_id, expected = trio.run(begin, server.grpc)
        assert server.stop() == 0
    with on_openvino("int8", tmp_path) as server:
        assert trio.run(go_on, server.grpc, session_id) == expected
        assert server.stop() == 0
        assert complaints_of(server) == []
    with on_openvino("auto", tmp_path) as server:
        assert len(trio.run(go_on, server.grpc, session_id)) == COUNT
        assert server.stop() == 0
        assert any("written by another engine" in line for line in complaints_of(server))
