"""How our client ends a stream whose server ends it with an error after some tokens."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest
from grpclib import GRPCError, Status
from grpclib.const import Cardinality, Handler
from grpclib.server import Server

from api.client import connect
from api.wire import ERROR_KEY, SERVICE
from proto.kakeya.v1 import GenerateRequest, GenerateResponse
from runtime.errors import NotServing, PerennialError, SessionMoved
from runtime.events import Token

MOVED = "moved: another server has gone on with the session"


class Breaking:
    """Sends a token, and then an error, named or not, or nothing."""

    def __init__(self, error: GRPCError | None, named: str | None) -> None:
        self._error = error
        self._named = named

    def __mapping__(self) -> dict[str, Handler]:
        return {
            f"/{SERVICE}/Generate": Handler(self._generate, Cardinality.UNARY_STREAM, GenerateRequest, GenerateResponse)
        }

    async def _generate(self, stream: Any) -> None:
        await stream.recv_message()
        await stream.send_message(GenerateResponse(token_id=5))
        if self._error is not None:
            metadata = {} if self._named is None else {ERROR_KEY: self._named}
            await stream.send_trailing_metadata(
                status=self._error.status, status_message=self._error.message, metadata=metadata
            )


async def heard(error: GRPCError | None, named: str | None = None) -> list[object]:
    server = Server([Breaking(error, named)])
    listening = socket.create_server(("127.0.0.1", 0))
    host, port = listening.getsockname()
    await server.start(sock=listening)
    events: list[object] = []
    try:
        async with connect(f"{host}:{port}") as client, client.find_session("one").generate(9) as coming:
            async for event in coming:
                events.append(event)
    except PerennialError as raised:
        events.append(raised)
    server.close()
    await server.wait_closed()
    return events


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (GRPCError(Status.UNAVAILABLE, "the server is stopping"), NotServing),
        (GRPCError(Status.ABORTED, MOVED), SessionMoved),
    ],
)
def test_an_error_that_ends_a_stream_is_raised_after_its_tokens(error: GRPCError, kind: type[PerennialError]) -> None:
    token, raised = asyncio.run(heard(error))
    assert token == Token(5)
    assert type(raised) is kind
    assert str(raised) == error.message


def test_a_stream_that_ends_without_an_error_is_over() -> None:
    assert asyncio.run(heard(None)) == [Token(5)]
