"""A hundred thousand frames at each door of each kind of server, of every type there is: each costs its connection at most."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.api.hostile import GRPC_CALLS, HTTP_CALLS, send_anything
from tests.contract.servers import KINDS, LONGEST_LINE, complaints, started
from tests.contract.test_hostile_grpc import serves_all

pytestmark = pytest.mark.soak

CONNECTIONS, FRAMES = 5000, 20


@pytest.mark.parametrize("kind", KINDS)
async def test_random_frames_end_nothing_but_their_connections(kind: str, record: Callable[[str, str], None]) -> None:
    with started(kind) as server:
        for address, calls in ((server.grpc, GRPC_CALLS), (server.http.removeprefix("http://"), HTTP_CALLS)):
            await send_anything(address, calls, CONNECTIONS, FRAMES, at_once=50)

            assert await serves_all(server)
        assert server.stop() == 0
    assert complaints("".join(server.said)) == []
    assert max(map(len, server.said)) <= LONGEST_LINE
    record(
        f"{CONNECTIONS} connections with {CONNECTIONS * FRAMES} random frames of every type, at each door of {kind}",
        "no server ended, no line of complaint, and others were answered",
    )
