"""Starts that are refused and stops at bad moments, beside what test_start.py follows from start to end."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import threading
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
from safetensors.torch import load_file, save_file

from runtime.models import SEEDLING, find_model
from runtime.settings import split_address
from tests.contract.loops import MOST_S
from tests.contract.servers import (
    JSON,
    KINDS,
    PATIENT,
    ServerProcess,
    complaints,
    fails_to_start,
    free_port,
    held_model,
    started,
)
from tests.contract.stubs import PROMPT, Stubs, kinds_of, refused, stock

pytestmark = pytest.mark.door

# A grpc.health.v1.HealthCheckResponse on the wire: SERVING is 1, NOT_SERVING 2.
_NOT_SERVING = b"\x08\x02"


def test_a_directory_in_use_by_another_server_is_refused(tmp_path: Path) -> None:
    with started("perennial", state_dir=tmp_path):
        for kind in KINDS:
            failed = fails_to_start(kind, state_dir=tmp_path)

            assert len(complaints(failed.stderr)) == 1, failed.stderr
            assert re.match("perennial: state_dir=.* in use by another server", complaints(failed.stderr)[0])


@pytest.mark.parametrize("kind", KINDS[1:])
def test_hypercorn_says_in_one_line_that_the_grpc_port_is_in_use(kind: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        failed = fails_to_start(kind, grpc_bind=address)

    assert len(complaints(failed.stderr)) == 1, failed.stderr
    assert complaints(failed.stderr)[0].startswith(f"perennial: grpc_bind={address} cannot be listened on")


def _with_a_list_for_a_configuration(model: Path) -> None:
    (model / "config.json").write_text("[]")


def _with_a_weight_that_is_no_number(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("perennial", _with_a_list_for_a_configuration),
        ("perennial", _with_a_weight_that_is_no_number),
        ("hypercorn-trio", _with_a_weight_that_is_no_number),
    ],
)
def test_a_damaged_model_is_told_of_in_one_line(kind: str, change: Callable[[Path], None], tmp_path: Path) -> None:
    model = shutil.copytree(find_model(SEEDLING), tmp_path / "model")
    change(model)
    # With a worker process Hypercorn's own status is 0 even where the worker's was not.
    failed = fails_to_start(kind, *(["--workers", "0"] if kind != "perennial" else []), model=model)

    assert failed.returncode == 1
    assert len(complaints(failed.stderr)) == 1, failed.stderr
    assert complaints(failed.stderr)[0].startswith("perennial: ")


@pytest.mark.parametrize("kind", KINDS)
def test_a_grpc_stream_that_runs_when_the_server_is_told_to_stop_comes_to_its_end(kind: str, stubs: Stubs) -> None:
    with started(kind, application=PATIENT) as server, stock(stubs, server.grpc) as client:
        session_id = client.create(PROMPT)
        watch = client.channel.unary_stream("/grpc.health.v1.Health/Watch")(b"", timeout=MOST_S)
        next(watch)
        stream = client.stream(session_id, 300)
        frames = [next(stream)]

        server.process.send_signal(signal.SIGTERM)
        assert next(watch) == _NOT_SERVING
        with refused(grpc.StatusCode.UNAVAILABLE):
            client.create()
        frames += stream

        assert kinds_of(frames) == ["token_id"] * 300 + ["done"]
        assert server.wait() == 0
    assert complaints("".join(server.said)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_told_to_stop_while_it_loads_stops_once_it_has_loaded(kind: str, tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    with (
        held_model(tmp_path / "model") as (model, release),
        started(kind, is_awaited=False, model=model, state_dir=tmp_path, grpc_bind=address) as server,
        ExitStack() as at_end,
    ):
        at_end.callback(release)
        with socket.create_connection(split_address(server.http.removeprefix("http://"))):
            pass
        server.process.send_signal(signal.SIGTERM)
        release()

        assert server.wait() == 0
    assert complaints("".join(server.said)) == []


def test_a_second_server_on_the_same_directory_starts_where_the_first_has_stopped(stubs: Stubs, tmp_path: Path) -> None:
    with started("perennial", state_dir=tmp_path) as server, stock(stubs, server.grpc) as client:
        session_id = client.create(PROMPT)
        expected = client.generated(client.call("ForkSession", session_id=session_id).session_id, 10)
    with started("hypercorn-trio", state_dir=tmp_path) as server, stock(stubs, server.grpc) as client:
        assert client.generated(session_id, 10) == expected


def tokens_generated(server: ServerProcess) -> float:
    with urllib.request.urlopen(f"{server.http}/metrics", timeout=MOST_S) as reply:
        [found] = re.findall(r"^perennial_generated_tokens_total (\S+)$", reply.read().decode(), re.MULTILINE)
        return float(found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_client_that_does_not_read_does_not_keep_a_server_from_its_end(kind: str) -> None:
    # Logprobs make of each token some kilobytes, so that the socket is full soon.
    endless = {"max_tokens": 10**6, "ignore_eos": True, "stream": True, "logprobs": True, "top_logprobs": 20}
    body = json.dumps({"model": SEEDLING, "messages": [{"role": "user", "content": "Hi."}], **endless}).encode()
    head = f"POST /v1/chat/completions {JSON}{len(body)}\r\n\r\n".encode()
    with started(kind, http_overflow="evict") as server, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        host, _, port = server.http.removeprefix("http://").partition(":")
        client.connect((host, int(port)))
        client.sendall(head + body)
        before, count = 0.0, tokens_generated(server)
        while not before == count > 0:
            threading.Event().wait(1)  # Several tokens' time: as many as before are as many as there will be.
            before, count = count, tokens_generated(server)

        assert server.stop() == 0


@pytest.mark.parametrize("kind", KINDS[1:])
def test_without_time_for_a_drain_a_server_ends_all_the_same(kind: str) -> None:
    with (
        started(kind, "--graceful-timeout", "0") as server,
        socket.create_connection(split_address(server.http.removeprefix("http://"))),
    ):
        server.process.send_signal(signal.SIGTERM)

        assert server.wait() == 0
    assert complaints("".join(server.said)) == []
