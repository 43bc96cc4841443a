"""200 streams at once from one stock client: no error, and each the same bits as alone."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import trio

from bench.servers import serving
from runtime import Settings
from tests.contract.stubs import make_stubs

pytestmark = pytest.mark.soak

STREAMS, TOKENS = 200, 24


def one(pb2: Any, stub: Any, number: int) -> list[int]:
    """The tokens of one session of its own."""
    session_id = stub.CreateSession(pb2.CreateSessionRequest()).session_id
    prompt = [3 + (number * 37 + place) % 2000 for place in range(10 + number % 40)]
    stub.AppendTokens(pb2.AppendTokensRequest(session_id=session_id, token_ids=prompt))
    sampling = {"temperature": 0.8, "seed": number} if number % 2 else {}
    frames = list(stub.Generate(pb2.GenerateRequest(session_id=session_id, max_tokens=TOKENS, **sampling)))
    assert frames[-1].done.generated_token_count == TOKENS
    stub.CloseSession(pb2.CloseSessionRequest(session_id=session_id))
    return [frame.token_id for frame in frames[:-1]]


async def test_two_hundred_streams_at_once_are_each_what_they_are_alone(
    tmp_path: Path, record: Callable[[str, str], None]
) -> None:
    stubs = await trio.to_thread.run_sync(make_stubs, tmp_path)
    async with serving(Settings(device="cpu", window=124, capacity=STREAMS)) as (address, _):

        def run() -> None:
            with grpc.insecure_channel(address) as channel, ThreadPoolExecutor(STREAMS) as pool:
                stub = stubs.services.RuntimeServiceStub(channel)
                together = list(pool.map(lambda number: one(stubs.messages, stub, number), range(STREAMS)))
                alone = [one(stubs.messages, stub, number) for number in range(STREAMS)]
                assert together == alone

        await trio.to_thread.run_sync(run)
    record(f"{STREAMS} streams at once from a stock gRPC client", f"each the {TOKENS} tokens that it is alone")
