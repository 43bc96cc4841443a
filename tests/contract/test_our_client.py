"""Our own client of the gRPC door, in a program of either event loop."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

import pytest

from api.client import Client, ClientSession, connect
from runtime import Done, HistoryTruncated, Overflow, StopReason, Token
from runtime.errors import (
    CapacityExhausted,
    HistoryMismatch,
    InvalidRequest,
    NotServing,
    PerennialError,
    SessionNotFound,
    SlabOverflow,
    Unauthenticated,
)
from tests.contract.conftest import KEYS, VISIBLE
from tests.contract.loops import Run, in_either_loop
from tests.contract.servers import ServerProcess, free_port
from tests.contract.stubs import ENDLESS, PROMPT, digest_of

pytestmark = pytest.mark.door


@in_either_loop
def test_our_client_holds_a_conversation_in_either_loop(keyed: ServerProcess, run: Run) -> None:
    async def converse() -> None:
        async with connect(keyed.grpc, key=KEYS[0]) as client, client.session(label="a test") as session:
            appended = await session.append(PROMPT, expected_history_length=0)
            async with session.generate(4) as events:
                got = [event async for event in events]
            await session.append([11] * VISIBLE)
            async with session.generate(1, temperature=1.0, seed=0) as events:
                truncated, token, _ = [event async for event in events]
            info = await session.info()

        assert appended.history_digest == digest_of(PROMPT)
        assert [type(event) for event in got] == [Token] * 4 + [Done]
        assert isinstance(got[-1], Done)
        assert (got[-1].stop_reason, got[-1].generated_token_count) == (StopReason.MAX_TOKENS, 4)
        assert truncated == HistoryTruncated(len(PROMPT) + 4)
        assert isinstance(token, Token)
        assert (info.history_length, info.evicted_token_count) == (VISIBLE + len(PROMPT) + 5, len(PROMPT) + 5)

    run(converse)


@in_either_loop
def test_our_client_leaves_a_stream_and_the_session_answers(keyed: ServerProcess, run: Run) -> None:
    async def leave() -> None:
        async with connect(keyed.grpc, key=KEYS[0]) as client, client.session() as session:
            await session.append(PROMPT)
            async with session.generate(ENDLESS) as events:
                first = await anext(events)
            info = await session.info()

        assert isinstance(first, Token)
        assert info.history_length > len(PROMPT)

    run(leave)


@in_either_loop
def test_our_client_raises_the_errors_of_an_embedded_runtime(keyed: ServerProcess, run: Run) -> None:
    async def fail() -> None:
        async with connect(keyed.grpc, key=KEYS[0]) as client, client.session(overflow=Overflow.ERROR) as session:
            with pytest.raises(InvalidRequest, match="token ids"):
                await session.append([2048])
            with pytest.raises(SlabOverflow):
                await session.append([5] * (VISIBLE + 1))
            with pytest.raises(HistoryMismatch, match="0"):
                await session.append([5], expected_history_length=3)
            with pytest.raises(SessionNotFound):
                await client.find_session("unknown").info()
            with pytest.raises(InvalidRequest):
                await first_of(session, 0)
            with pytest.raises(CapacityExhausted):
                await session.append([2000] * (2**20 + 1))
        assert await refusal_of(connect(keyed.grpc)) is Unauthenticated
        assert await refusal_of(connect(keyed.grpc, key=KEYS[0])) is SessionNotFound
        assert await refusal_of(connect(f"127.0.0.1:{free_port()}")) is NotServing

    run(fail)


async def first_of(session: ClientSession, max_tokens: int) -> None:
    async with session.generate(max_tokens) as events:
        await anext(events)


async def refusal_of(connection: AbstractAsyncContextManager[Client]) -> type[PerennialError]:
    async with connection as client:
        with pytest.raises(PerennialError) as raised:
            await client.find_session("unknown").info()
    return raised.type
