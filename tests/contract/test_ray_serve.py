"""Replicas on a local cluster of Ray's, by the YAML of the docs: both doors, and a replica that is killed."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import trio

from bench.ray_cluster import Cluster, cluster, configuration, free_ports
from tests.contract.loops import MOST_S
from tests.contract.stubs import PROMPT, Stock, Stubs, digest_of, refused, stock

pytest.importorskip("ray", reason="Ray Serve is not installed: pip install 'perennial[ray]'")
pytestmark = pytest.mark.door

KEY = "key"
COUNT = 120
# Chance alone would send so many follow-ups to the replica that can answer them once in a thousand times.
TURNS = 10


@dataclass
class Deployed:
    running: Cluster
    http: str
    grpc: str

    def post(self, path: str, body: dict[str, object]) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        asked = urllib.request.Request(f"{self.http}{path}", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(asked, timeout=MOST_S) as reply:
            answer: dict[str, Any] = json.load(reply)
            return answer


@pytest.fixture
async def deployed(tmp_path: Path) -> AsyncIterator[Deployed]:
    http, grpc_port = free_ports(2)
    arguments = {
        "device": "cpu",
        "sink": 4,
        "window": 508,
        "capacity": 4,
        "state_dir": f"file://{tmp_path}/store",
        "state_lease_s": 1,
        "api_keys": KEY,
    }
    async with cluster(tmp_path) as running:
        await running.deploy(configuration(http, grpc_port, arguments, num_replicas=2))
        await running.settled(2)
        yield Deployed(running, f"http://127.0.0.1:{http}", f"127.0.0.1:{grpc_port}")


async def test_replicas_answer_as_one_server_does_and_one_that_is_killed_costs_nothing(
    deployed: Deployed, stubs: Stubs
) -> None:
    # One test, for a cluster takes as long to start as all that is asked of it here.
    with stock(stubs, deployed.grpc, KEY) as client:
        await trio.to_thread.run_sync(answers_as_one_server_does, client, deployed)
        await trio.to_thread.run_sync(goes_on_after_a_kill, client, deployed)
    with stock(stubs, deployed.grpc) as stranger, refused(grpc.StatusCode.UNAUTHENTICATED):
        await trio.to_thread.run_sync(stranger.create)
    # A conversation is sent anew where its part of the ring has gone to another replica.
    await deployed.running.settled(2)
    await trio.to_thread.run_sync(follow_ups_find_their_server, deployed)


def answers_as_one_server_does(client: Stock, deployed: Deployed) -> None:
    # As bytes: one process holds grpcio's messages of this service or grpclib's. These are an empty request, and SERVING.
    assert client.channel.unary_unary("/grpc.health.v1.Health/Check")(b"") == b"\x08\x01"
    session_id = client.create(PROMPT)
    assert client.info(session_id).history_digest == digest_of(PROMPT)
    with refused(grpc.StatusCode.NOT_FOUND):
        client.info("no-session-has-this-id")
    with refused(grpc.StatusCode.INVALID_ARGUMENT):
        client.append(session_id, [2**31])
    with refused(grpc.StatusCode.ABORTED) as words:
        client.append(session_id, [5], expected_history_length=3)
    assert words[0].startswith(f"history_length is {len(PROMPT)}, not 3")
    stream = client.stream(session_id, 100_000)
    next(stream)
    stream.cancel()
    assert client.close(session_id) > len(PROMPT)
    with urllib.request.urlopen(f"{deployed.http}/healthz", timeout=MOST_S) as reply:
        assert json.load(reply)["status"] == "ok"


def goes_on_after_a_kill(client: Stock, deployed: Deployed) -> None:
    undisturbed = client.generated(client.create(PROMPT), COUNT)
    session_id = client.create(PROMPT)
    told: list[int] = []
    stream = client.stream(session_id, 100_000)
    while len(told) < 20:
        told.append(next(stream).token_id)
    for replica in deployed.running.replicas():
        replica.kill()
    with refused(grpc.StatusCode.UNAVAILABLE):
        told.extend(frame.token_id for frame in stream)
    info = client.info(session_id)
    kept = info.history_length - len(PROMPT)
    assert len(told) <= kept <= COUNT
    assert told == undisturbed[: len(told)]
    assert info.history_digest == digest_of([*PROMPT, *undisturbed[:kept]])
    assert client.generated(session_id, COUNT - kept) == undisturbed[kept:]


def follow_ups_find_their_server(deployed: Deployed) -> None:
    answer: dict[str, Any] = {"id": None}
    for turn in range(TURNS):
        asked = {"model": "seedling", "input": f"Hello {turn}", "max_output_tokens": 4}
        before = {"previous_response_id": answer["id"]} if answer["id"] else {}
        answer = deployed.post("/v1/responses", asked | before)
    assert answer["object"] == "response"
