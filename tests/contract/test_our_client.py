"""Our own clients against a real server: in trio, in asyncio, without a loop; and a plain grpclib one."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import TypeVar

import pytest
import trio
from grpclib import GRPCError, Status
from grpclib.client import Channel
from grpclib.exceptions import StreamTerminatedError

from api.client import Client, ClientSession, connect
from api.client_sync import connect_sync
from proto.kakeya.v1 import (
    AppendTokensRequest,
    CloseSessionRequest,
    CreateSessionRequest,
    GenerateRequest,
    GetSessionInfoRequest,
    RuntimeServiceStub,
)
from runtime import Done, HistoryTruncated, Token
from runtime.errors import (
    HistoryMismatch,
    InvalidRequest,
    NotServing,
    SessionNotFound,
    SlabOverflow,
    SnapshotMismatch,
    Unauthenticated,
)
from runtime.events import Overflow, StopReason
from runtime.models import SEEDLING
from runtime.settings import split_address
from tests.contract.servers import ServerProcess, free_port, started
from tests.contract.stubs import ENDLESS, PROMPT, digest_of

pytestmark = pytest.mark.door

T = TypeVar("T")
TOO_LONG = [5] * 2000


def in_trio(function: Callable[[], Awaitable[T]]) -> T:
    return trio.run(function)


def in_asyncio(function: Callable[[], Coroutine[None, None, T]]) -> T:
    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        return runner.run(function())


# Lists the sessions of a server, by each client after the others.
CLIENTS = """
import asyncio, sys, trio
from api.client import connect
from api.client_sync import connect_sync

async def list_sessions():
    async with connect(sys.argv[1]) as client:
        await client.list_sessions()

def list_sessions_sync():
    with connect_sync(sys.argv[1]) as client:
        client.list_sessions()

ways = {"trio": lambda: trio.run(list_sessions), "asyncio": lambda: asyncio.run(list_sessions()), "sync": list_sessions_sync}
for way in sys.argv[2:]:
    ways[way]()
print(*sorted({"trio_asyncio", "torch", "quart"} & sys.modules.keys()))
"""

either_loop = pytest.mark.parametrize("run", [in_trio, in_asyncio])
Run = Callable[[Callable[[], Awaitable[None]]], None]


@either_loop
def test_a_session_lives_from_its_making_to_its_close(run: Run, plain: ServerProcess) -> None:
    async def converse() -> None:
        async with connect(plain.grpc) as client, client.session(label="ours") as session:
            appended = await session.append(PROMPT, 0)
            async with session.generate(5, temperature=1.0, seed=0) as events:
                told = [event async for event in events]
            info = await session.info()
            assert "ours" in [one.label for one in await client.list_sessions()]

            tokens = [event.token_id for event in told if isinstance(event, Token)]
            assert (appended.history_length, appended.history_digest) == (len(PROMPT), digest_of(PROMPT))
            assert [type(event) for event in told] == [Token] * 5 + [Done]
            assert isinstance(told[-1], Done)
            assert (told[-1].stop_reason, told[-1].generated_token_count) == (StopReason.MAX_TOKENS, 5)
            assert info.history_digest == digest_of(PROMPT + tokens)
        with pytest.raises(SessionNotFound):
            await lone(plain, session.id)

    run(converse)


async def lone(server: ServerProcess, session_id: str) -> int:
    """What a client of its own is told of a session's length."""
    async with connect(server.grpc) as client:
        return (await client.find_session(session_id).info()).history_length


@either_loop
def test_what_is_forgotten_is_an_event_of_its_own(run: Run, plain: ServerProcess) -> None:
    async def forget() -> None:
        async with connect(plain.grpc) as client, client.session() as session:
            evicted = (await session.append(TOO_LONG)).evicted_token_count
            async with session.generate(1) as events:
                told = [event async for event in events]

        assert told[0] == HistoryTruncated(evicted)
        assert [type(event) for event in told[1:]] == [Token, Done]

    run(forget)


@either_loop
def test_leaving_a_generation_early_cancels_it_and_the_session_answers(run: Run, plain: ServerProcess) -> None:
    async def leave() -> None:
        async with connect(plain.grpc) as client, client.session() as session:
            await session.append(PROMPT)
            async with session.generate(ENDLESS) as events:
                first = await anext(events)

            info = await session.info()
            async with session.generate(1) as events:
                assert [type(event) async for event in events][-2:] == [Token, Done]

        assert isinstance(first, Token)
        assert len(PROMPT) < info.history_length < ENDLESS

    run(leave)


@either_loop
def test_an_error_in_the_block_of_a_generation_comes_out_as_it_is(run: Run, plain: ServerProcess) -> None:
    async def err() -> None:
        async with connect(plain.grpc) as client, client.session() as session:
            await session.append(PROMPT)
            for error in (
                *(ZeroDivisionError(), FileNotFoundError(), TimeoutError()),
                *(StreamTerminatedError(), GRPCError(Status.UNAVAILABLE), NotServing("another one")),
            ):
                with pytest.raises(type(error)) as raised:
                    await break_off(session, error)
                assert raised.value is error
            assert (await session.info()).history_length > len(PROMPT)

    run(err)


@either_loop
def test_errors_are_those_of_an_embedded_runtime(run: Run, plain: ServerProcess) -> None:
    async def err() -> None:
        async with connect(plain.grpc) as client:
            for error, call in refusals(client):
                with pytest.raises(error):
                    await call()

    run(err)


async def break_off(session: ClientSession, error: Exception) -> None:
    async with session.generate(ENDLESS) as events:
        await anext(events)
        raise error


def refusals(client: Client) -> list[tuple[type[Exception], Callable[[], Awaitable[object]]]]:
    async def with_session(overflow: Overflow, tokens: list[int], expected: int | None) -> None:
        async with client.session(overflow=overflow) as session:
            await session.append(tokens, expected)

    async def generate_nothing() -> None:
        async with client.session() as session, session.generate(5) as events:
            await anext(events)

    async def save() -> None:
        async with client.session() as session:
            await session.save()

    return [
        (SessionNotFound, client.find_session("nobody").info),
        (InvalidRequest, partial(with_session, Overflow.EVICT, [2048], None)),
        (HistoryMismatch, partial(with_session, Overflow.EVICT, PROMPT, 1)),
        (SlabOverflow, partial(with_session, Overflow.ERROR, TOO_LONG, None)),
        (InvalidRequest, generate_nothing),
        (SnapshotMismatch, save),
    ]


@either_loop
def test_nobody_who_listens_is_not_serving(run: Run) -> None:
    async def call() -> None:
        async with connect(f"127.0.0.1:{free_port()}") as client:
            with pytest.raises(NotServing):
                await client.create_session()

    run(call)


async def test_a_cancelled_generation_leaves_a_session_that_answers(plain: ServerProcess) -> None:
    async with connect(plain.grpc) as client, client.session() as session:
        await session.append(PROMPT)
        with trio.CancelScope() as scope:
            async with session.generate(ENDLESS) as events:
                async for _ in events:
                    scope.cancel()

        assert (await session.info()).history_length > len(PROMPT)


async def test_many_sessions_of_one_client_go_on_at_once(plain: ServerProcess) -> None:
    told: dict[int, list[int]] = {}

    async def one(client: Client, number: int) -> None:
        async with client.session() as session:
            await session.append(PROMPT[number:])
            async with session.generate(10) as events:
                told[number] = [event.token_id async for event in events if isinstance(event, Token)]

    async with connect(plain.grpc) as client:
        async with trio.open_nursery() as nursery:
            for number in range(6):
                nursery.start_soon(one, client, number)
        together = dict(told)
        for number in range(6):
            await one(client, number)

    assert together == told


def test_the_client_without_a_loop_makes_the_same_calls(plain: ServerProcess) -> None:
    with connect_sync(plain.grpc) as client:
        with client.session(label="sync") as session:
            session.append(PROMPT)
            with session.generate(5, temperature=1.0, seed=0) as events:
                told = list(events)
            fork = session.fork()
            tokens = [event.token_id for event in told if isinstance(event, Token)]

            assert [type(event) for event in told] == [Token] * 5 + [Done]
            assert fork.info().history_digest == session.info().history_digest == digest_of(PROMPT + tokens)
            assert "sync" in [one.label for one in client.list_sessions()]
            assert client.model_info().model == SEEDLING
            assert fork.close() == len(PROMPT) + 5
        with pytest.raises(SessionNotFound):
            client.find_session(session.id).info()


def test_the_client_without_a_loop_leaves_a_generation_early(plain: ServerProcess) -> None:
    with connect_sync(plain.grpc) as client, client.session() as session:
        session.append(PROMPT)
        with session.generate(ENDLESS) as events:
            first = next(events)

        assert isinstance(first, Token)
        assert len(PROMPT) < session.info().history_length < ENDLESS


def test_the_client_without_a_loop_raises_typed_errors(plain: ServerProcess) -> None:
    with connect_sync(plain.grpc) as client:
        session = client.create_session()
        with pytest.raises(InvalidRequest):
            session.append([2048])
        with pytest.raises(InvalidRequest), session.generate(5) as events:
            next(events)
        session.close()
    with connect_sync(f"127.0.0.1:{free_port()}") as client, pytest.raises(NotServing):
        client.list_sessions()


def test_a_key_is_sent_with_every_call() -> None:
    with started("perennial", api_keys="secret") as server:
        with connect_sync(server.grpc, key="secret") as client, client.session() as session:
            session.append(PROMPT)
            with session.generate(1) as events:
                assert [type(event) for event in events] == [Token, Done]
        for key in ("", "wrong"):
            with connect_sync(server.grpc, key=key) as client, pytest.raises(Unauthenticated):
                client.create_session()


def test_a_plain_grpclib_client_talks_to_the_server(plain: ServerProcess) -> None:
    async def converse() -> None:
        channel = Channel(*split_address(plain.grpc))
        try:
            stub = RuntimeServiceStub(channel)
            session_id = (await stub.create_session(CreateSessionRequest(client_label="grpclib"))).session_id
            appended = await stub.append_tokens(AppendTokensRequest(session_id, PROMPT))
            frames = [frame async for frame in stub.generate(GenerateRequest(session_id, 5))]
            info = await stub.get_session_info(GetSessionInfoRequest(session_id))
            closed = await stub.close_session(CloseSessionRequest(session_id))
            with pytest.raises(GRPCError) as caught:
                await stub.get_session_info(GetSessionInfoRequest(session_id))
        finally:
            channel.close()

        tokens = [frame.token_id for frame in frames if frame.token_id is not None]
        assert appended.history_length == len(PROMPT)
        assert len(tokens) == 5
        assert frames[-1].done is not None
        assert info.history_digest == digest_of(PROMPT + tokens)
        assert closed.final_history_length == len(PROMPT) + 5
        assert caught.value.status is Status.NOT_FOUND

    in_asyncio(converse)


@pytest.mark.parametrize(
    ("ways", "loaded"), [("asyncio sync", ""), ("trio asyncio", "trio_asyncio"), ("trio sync", "trio_asyncio")]
)
def test_a_client_works_where_nothing_else_was_loaded_and_loads_little(
    ways: str, loaded: str, plain: ServerProcess
) -> None:
    command = [sys.executable, "-W", "error", "-c", CLIENTS, plain.grpc, *ways.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout, done.stderr) == (0, f"{loaded}\n", "")
