"""Clients of the gRPC port that mean harm, at servers of every kind: it costs them their connection, and nobody else anything."""

from __future__ import annotations

import httpx
import pytest
import trio

from api.client import connect
from proto.kakeya.v1 import GenerateRequest
from runtime.errors import InvalidRequest
from runtime.models import SEEDLING
from runtime.settings import split_address
from tests.api.hostile import (
    CHECK,
    DATA,
    END_STREAM,
    GRPC_CALLS,
    INITIAL_WINDOW_SIZE,
    PREFACE,
    REFLECTION,
    SERVICE,
    SETTINGS,
    UNKNOWN,
    WATCH,
    Call,
    floods,
    frame,
    message,
    peer_at,
    resets,
    send_anything,
    serves_sessions,
    setting,
)
from tests.contract.loops import MOST_S
from tests.contract.servers import ServerProcess, memory_of

pytestmark = pytest.mark.door

OK, INVALID_ARGUMENT, RESOURCE_EXHAUSTED = "0", "3", "8"
# What caches and the allocator may keep; a fault of these kinds keeps a multiple.
SLACK_BYTES = 40 * 2**20


async def serves_all(server: ServerProcess) -> bool:
    """Whether clients of both doors that mean well are served."""
    talk = {"model": SEEDLING, "messages": [{"role": "user", "content": "Hi!"}], "max_tokens": 3}
    async with httpx.AsyncClient(base_url=server.http, timeout=MOST_S) as client:
        answer = await client.post("/v1/chat/completions", json=talk)
    return answer.status_code == 200 and await serves_sessions(server.grpc)


async def test_frames_of_types_that_are_unknown_are_ignored(besieged: ServerProcess) -> None:
    async with peer_at(besieged.grpc) as peer:
        for kind in UNKNOWN:
            number = await peer.open(CHECK, ends=False)
            for stream_id in (0, number):
                await peer.send(frame(kind, 0xFF, stream_id, b"\x80" * 100))
            await peer.send(frame(DATA, END_STREAM, number, message()))

            assert (await peer.status(number))["grpc-status"] == OK
    assert await serves_all(besieged)


async def test_a_byte_that_is_no_ascii_in_a_header_costs_its_call_alone(besieged: ServerProcess) -> None:
    async with peer_at(besieged.grpc) as peer:
        for name in ("user_agent", "authorization", "anything", "grpc_timeout"):
            number = await peer.open(CHECK, message(), ends=True, **{name: b"caf\xc3\xa9\xff"})
            assert (await peer.status(number))["grpc-status"] == INVALID_ARGUMENT
        number = await peer.open(CHECK, message())
        assert (await peer.status(number))["grpc-status"] == OK
    assert await serves_all(besieged)


async def test_four_gigabytes_are_refused_at_their_prefix_and_not_held(besieged: ServerProcess) -> None:
    async def promises(path: str) -> None:
        async with peer_at(besieged.grpc) as peer:
            number = await peer.open(path, message(length=2**32 - 1), ends=False)
            assert (await peer.status(number))["grpc-status"] == RESOURCE_EXHAUSTED

            await floods(peer, [frame(DATA, 0, number, bytes(16384))] * 800)

    before = memory_of(besieged)
    async with trio.open_nursery() as nursery:
        for path in [CHECK, WATCH, REFLECTION, f"{SERVICE}/CreateSession"] * 5:
            nursery.start_soon(promises, path)

    assert memory_of(besieged) < before + SLACK_BYTES
    assert await serves_all(besieged)


async def test_streams_that_are_opened_and_reset_are_not_kept(besieged: ServerProcess) -> None:
    async def opened_and_reset(count: int) -> None:
        for _ in range(count):
            async with peer_at(besieged.grpc) as peer:
                await floods(peer, resets(peer, 20_000, Call(CHECK)))

    await opened_and_reset(1)
    before = memory_of(besieged)

    await opened_and_reset(8)

    assert memory_of(besieged) < before + SLACK_BYTES
    assert await serves_all(besieged)


async def test_streams_that_are_not_read_give_their_sessions_back(besieged: ServerProcess) -> None:
    async with connect(besieged.grpc) as client, peer_at(besieged.grpc, setting(INITIAL_WINDOW_SIZE, 0)) as peer:
        numbers = []
        for _ in range(2):
            session = await client.create_session()
            await session.append([1, 2, 3])
            request = GenerateRequest(session_id=session.id, max_tokens=10**6)
            numbers.append(await peer.open(f"{SERVICE}/Generate", message(bytes(request))))
        await peer.is_reset(*numbers)

    assert await serves_all(besieged)


@pytest.mark.parametrize(
    "said", [b"", PREFACE, PREFACE + frame(SETTINGS)[:5]], ids=["nothing", "a preface", "half a frame"]
)
async def test_a_connection_on_which_nothing_is_called_is_closed(besieged: ServerProcess, said: bytes) -> None:
    async with await trio.open_tcp_stream(*split_address(besieged.grpc)) as stream:
        await stream.send_all(said)

        with trio.fail_after(MOST_S):
            async for _ in stream:
                pass


async def test_a_connection_whose_call_has_ended_is_closed(besieged: ServerProcess) -> None:
    async with peer_at(besieged.grpc) as peer:
        await peer.status(await peer.open(CHECK, message()))

        assert await peer.farewell() == 0


async def test_a_client_that_answers_no_ping_is_gone(besieged: ServerProcess) -> None:
    async with peer_at(besieged.grpc) as peer:
        peer.answers_pings = False
        await peer.open(WATCH, message())

        assert await peer.farewell() is None


async def test_a_label_and_eos_ids_beyond_their_bounds_are_refused(besieged: ServerProcess) -> None:
    async with connect(besieged.grpc) as client:
        for eos, label in ((0, "x" * 257), (65, "")):
            with pytest.raises(InvalidRequest):
                await client.create_session(range(eos), label=label)
    async with httpx.AsyncClient(base_url=besieged.http, timeout=MOST_S) as client:
        assert len((await client.get("/v1/runtime")).content) < 10_000


async def test_random_frames_end_nothing_but_their_connections(besieged: ServerProcess) -> None:
    await send_anything(besieged.grpc, GRPC_CALLS, 200, 20)

    assert await serves_all(besieged)
