"""What a proxy can send a session's calls by: the metadata that our client adds."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from grpclib.const import Cardinality, Handler
from grpclib.server import Server

from api.client import SESSION_HEADER, connect
from api.wire import SERVICE
from proto.kakeya.v1 import (
    GetSessionInfoRequest,
    GetSessionInfoResponse,
    ListSessionsRequest,
    ListSessionsResponse,
)


class Listener:
    """Answers two calls with nothing, and notes by which session each was sent."""

    def __init__(self) -> None:
        self.sent_by: list[Any] = []

    def __mapping__(self) -> dict[str, Handler]:
        unary = Cardinality.UNARY_UNARY
        info = Handler(self._answer(GetSessionInfoResponse()), unary, GetSessionInfoRequest, GetSessionInfoResponse)
        every = Handler(self._answer(ListSessionsResponse()), unary, ListSessionsRequest, ListSessionsResponse)
        return {f"/{SERVICE}/GetSessionInfo": info, f"/{SERVICE}/ListSessions": every}

    def _answer(self, response: Any) -> Any:
        async def answer(stream: Any) -> None:
            await stream.recv_message()
            self.sent_by.append(stream.metadata.get(SESSION_HEADER))
            await stream.send_message(response)

        return answer


async def called() -> list[Any]:
    listener = Listener()
    server = Server([listener])
    listening = socket.create_server(("127.0.0.1", 0))
    host, port = listening.getsockname()
    await server.start(sock=listening)
    async with connect(f"{host}:{port}") as client:
        for session_id in ("an_id-of-22-characters", "no id: é", "", "a" * 200):
            await client.find_session(session_id).info()
        await client.list_sessions()
    server.close()
    await server.wait_closed()
    return listener.sent_by


def test_a_call_on_a_session_says_on_which_one_where_that_can_be_a_header() -> None:
    assert asyncio.run(called()) == ["an_id-of-22-characters", None, None, None, None]
