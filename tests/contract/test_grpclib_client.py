"""A plain grpclib client with the stubs that betterproto2 generates."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from grpclib import GRPCError, Status
from grpclib.client import Channel

from proto.kakeya.v1 import (
    AppendTokensRequest,
    CloseSessionRequest,
    CreateSessionRequest,
    GenerateRequest,
    GetSessionInfoRequest,
    RuntimeServiceStub,
)
from runtime.settings import split_address
from tests.contract.loops import in_asyncio
from tests.contract.servers import ServerProcess
from tests.contract.stubs import PROMPT, digest_of

pytestmark = pytest.mark.door


@asynccontextmanager
async def grpclib_stub(server: ServerProcess) -> AsyncIterator[RuntimeServiceStub]:
    channel = Channel(*split_address(server.grpc))
    try:
        yield RuntimeServiceStub(channel)
    finally:
        channel.close()


def test_grpclib_with_generated_stubs_holds_a_conversation(plain: ServerProcess) -> None:
    async def converse() -> None:
        async with grpclib_stub(plain) as stub:
            session_id = (await stub.create_session(CreateSessionRequest())).session_id
            appended = await stub.append_tokens(AppendTokensRequest(session_id, PROMPT, 0))
            frames = [frame async for frame in stub.generate(GenerateRequest(session_id, 4, temperature=0.0))]
            info = await stub.get_session_info(GetSessionInfoRequest(session_id))
            closed = await stub.close_session(CloseSessionRequest(session_id))

        assert appended.history_digest == digest_of(PROMPT)
        assert [frame.token_id is not None for frame in frames] == [True] * 4 + [False]
        assert frames[-1].done is not None
        assert frames[-1].done.generated_token_count == 4
        assert info.history_length == closed.final_history_length == len(PROMPT) + 4

    in_asyncio(converse)


def test_grpclib_is_told_the_status_and_why(plain: ServerProcess) -> None:
    async def fail() -> None:
        async with grpclib_stub(plain) as stub:
            with pytest.raises(GRPCError) as unknown:
                await stub.get_session_info(GetSessionInfoRequest("unknown"))
            session_id = (await stub.create_session(CreateSessionRequest())).session_id
            with pytest.raises(GRPCError) as empty:
                _ = [frame async for frame in stub.generate(GenerateRequest(session_id, 4))]
            await stub.close_session(CloseSessionRequest(session_id))

        assert unknown.value.status is Status.NOT_FOUND
        assert empty.value.status is Status.INVALID_ARGUMENT
        assert "history" in (empty.value.message or "")

    in_asyncio(fail)
