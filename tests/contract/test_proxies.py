"""nginx and Envoy before two servers, with the files of the docs: a session's calls come to one server while that lives."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.contract.loops import MOST_S
from tests.contract.servers import ServerProcess, free_port, started, until
from tests.contract.stubs import PROMPT, Stock, Stubs, stock

pytestmark = pytest.mark.door

DOCS = Path(__file__).parents[2] / "docs"
COMMANDS = {
    "nginx": ("nginx", "-e", "stderr", "-c"),
    "envoy": ("envoy", "--log-level", "warn", "--concurrency", "1", "-c"),
}
FILES = {"nginx": "nginx.conf", "envoy": "envoy.yaml"}
SESSIONS, CALLS = 20, 4


@contextmanager
def proxied(kind: str, folder: Path, servers: list[ServerProcess]) -> Iterator[tuple[str, str]]:
    """gRPC address and URL of a proxy of this kind before two servers, for the block."""
    command = COMMANDS[kind]
    text, doors = (DOCS / FILES[kind]).read_text(), {"50051": free_port(), "8000": free_port()}
    # Where the servers are, and then where the proxy listens.
    for number, server in enumerate(servers, 1):
        for usual, address in (("50051", server.grpc), ("8000", server.http.removeprefix("http://"))):
            host, _, port = address.rpartition(":")
            text = text.replace(f"10.0.0.{number}:{usual}", f"{host}:{port}")
            text = text.replace(
                f"address: 10.0.0.{number}, port_value: {usual}", f"address: {host}, port_value: {port}"
            )
    for usual, own in doors.items():
        text = re.sub(rf"listen {usual}\b", f"listen 127.0.0.1:{own}", text)
        text = text.replace(f"address: 0.0.0.0, port_value: {usual}", f"address: 127.0.0.1, port_value: {own}")
    if kind == "nginx":
        kept = "".join(
            f"{name}_temp_path {folder}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        text = f"daemon off; pid {folder}/pid; events {{}} http {{ access_log off; {kept} {text} }}"
    file = folder / FILES[kind]
    file.write_text(text)
    process = subprocess.Popen([*command, str(file)])
    try:
        grpc_address, url = f"127.0.0.1:{doors['50051']}", f"http://127.0.0.1:{doors['8000']}"
        until(lambda: answers(f"{url}/healthz"))
        yield grpc_address, url
    finally:
        process.terminate()
        process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=MOST_S) as reply:
            return bool(json.load(reply)["status"] == "ok")
    except OSError:
        return False


def appends_of(server: ServerProcess) -> float:
    with urllib.request.urlopen(f"{server.http}/metrics", timeout=MOST_S) as reply:
        told = re.search(r'grpc_requests_total\{code="OK",method="AppendTokens"\} (\S+)', reply.read().decode())
    return float(told[1]) if told else 0.0


def asked_until_taken(client: Stock, session_id: str, count: int) -> list[int]:
    """Tokens of a session whose server is gone: whoever is asked says that it has moved until the lease has lapsed."""
    tokens: list[int] = []

    def is_taken() -> bool:
        try:
            tokens.extend(client.generated(session_id, count))
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.ABORTED, grpc.StatusCode.UNAVAILABLE):
                return False
            raise
        return True

    until(is_taken)
    return tokens


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.skipif(shutil.which(kind) is None, reason=f"{kind} is not installed"))
        for kind in COMMANDS
    ],
)
def test_a_sessions_calls_come_to_one_server_and_go_on_at_the_other_when_that_is_gone(
    kind: str, tmp_path: Path, stubs: Stubs
) -> None:
    # Long enough that a call which came to the wrong server would be refused.
    shared: dict[str, Any] = {
        "state_dir": f"file://{tmp_path}/store",
        "window": 252,
        "capacity": SESSIONS + 1,
        "state_lease_s": 10,
    }
    with (
        started("perennial", **shared) as one,
        started("perennial", **shared) as two,
        proxied(kind, tmp_path, [one, two]) as (address, _),
        stock(stubs, address) as client,
        stock(stubs, one.grpc) as direct,
    ):
        undisturbed = direct.generated(direct.create(PROMPT), 2 * CALLS)
        metadata = {
            session_id: (("x-session-id", session_id),) for session_id in (client.create() for _ in range(SESSIONS))
        }
        by_session = {session_id: Stock(stubs, client.channel, metadata=told) for session_id, told in metadata.items()}
        for session_id, caller in by_session.items():
            caller.append(session_id, PROMPT)
        drawn = {session_id: caller.generated(session_id, CALLS) for session_id, caller in by_session.items()}
        assert min(appends_of(one), appends_of(two)) > 0
        one.process.kill()
        for session_id, caller in by_session.items():
            drawn[session_id] += asked_until_taken(caller, session_id, CALLS)
        assert all(tokens == undisturbed for tokens in drawn.values())
