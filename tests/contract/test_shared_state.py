"""Two servers on one store: what one of them told outlives it, and the other one goes on with the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest

from api.client_sync import connect_sync
from runtime.errors import SessionMoved
from tests.contract.servers import started, until
from tests.contract.stubs import PROMPT, Stock, Stubs, digest_of, refused, stock
from tests.s3_server import S3Server, s3_program

pytestmark = pytest.mark.door

MORE = 50


@pytest.fixture
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a store that servers started by a test can open: a bucket, or a folder where no S3 server is installed."""
    if s3_program() is None:
        return f"file://{tmp_path}"
    server: S3Server = request.getfixturevalue("s3_server")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return f"{server.url}/shared"


def test_a_killed_servers_session_goes_on_at_the_other_with_the_same_tokens(store: str, stubs: Stubs) -> None:
    shared: dict[str, Any] = {
        "state_dir": store,
        "sink": 4,
        "window": 252,
        "capacity": 2,
        # Longer than a busy machine holds up who renews it.
        "state_lease_s": 20,
    }
    with (
        started("perennial", **shared) as one,
        started("hypercorn-trio", **shared) as two,
        stock(stubs, one.grpc) as killed,
        stock(stubs, two.grpc) as other,
    ):
        session_id = killed.create(PROMPT)
        with refused(grpc.StatusCode.ABORTED) as words:
            other.info(session_id)
        assert words[0].startswith("moved: another server holds the session")
        with connect_sync(two.grpc) as ours, pytest.raises(SessionMoved, match="another server"):
            ours.find_session(session_id).info()

        told: list[int] = []
        stream = killed.stream(session_id, 10_000)
        while len(told) < 20:
            told.append(next(stream).token_id)
        one.process.kill()
        with refused(grpc.StatusCode.UNAVAILABLE):
            told.extend(frame.token_id for frame in stream)
        until(lambda: is_free(other, session_id))

        info = other.info(session_id)
        kept = info.history_length - len(PROMPT)
        # Tokens on their way may have been recorded and not heard of.
        assert len(told) <= kept
        undisturbed = other.generated(other.create(PROMPT), kept + MORE)
        assert told == undisturbed[: len(told)]
        assert info.history_digest == digest_of([*PROMPT, *undisturbed[:kept]])
        assert other.generated(session_id, MORE) == undisturbed[kept:]
        with refused(grpc.StatusCode.ABORTED) as words:
            other.append(session_id, [5], expected_history_length=len(PROMPT))
        assert words[0].startswith("history_length is ")


def is_free(client: Stock, session_id: str) -> bool:
    try:
        client.info(session_id)
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.ABORTED:
            return False
        raise
    return True
