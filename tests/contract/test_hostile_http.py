"""Servers of every kind under clients that mean harm, told to stop, and what their logs say of it."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from h2.connection import H2Connection
from h2.events import ResponseReceived
from h2.settings import SettingCodes

from runtime.models import SEEDLING
from tests.contract.loops import MOST_S
from tests.contract.servers import (
    JSON,
    KINDS,
    LONGEST_LINE,
    PATIENT,
    ServerProcess,
    complaints,
    environment,
    hangups,
    line_of,
    processes_of,
    program,
    started,
    until,
)

pytestmark = pytest.mark.door

COMPLETIONS = "/v1/chat/completions"
SECRET = "xyzzy"
TALK = {"model": SEEDLING, "messages": [{"role": "user", "content": f"Hi, {SECRET}!"}]}
ENDLESS = TALK | {"max_tokens": 2**31 - 1, "ignore_eos": True, "stream": True}
each_kind = pytest.mark.parametrize("kind", KINDS)


def connected(server: ServerProcess) -> socket.socket:
    host, _, port = server.http.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=MOST_S)


@contextmanager
def unread(
    server: ServerProcess, path: str, window: int, body: object = None, *, is_reset: bool = False
) -> Iterator[None]:
    """A request over HTTP/2 whose answer has begun and finds no more window than this; in the end it may be reset."""
    h2 = H2Connection()
    h2.initiate_connection()
    h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: window})
    method = "GET" if body is None else "POST"
    head = {":method": method, ":path": path, ":scheme": "http", ":authority": "localhost"}
    h2.send_headers(1, [*head.items(), ("content-type", "application/json")], end_stream=body is None)
    if body is not None:
        h2.send_data(1, json.dumps(body).encode(), end_stream=True)
    with connected(server) as connection:
        has_begun = False
        while not has_begun:
            connection.sendall(h2.data_to_send())
            has_begun = any(isinstance(event, ResponseReceived) for event in h2.receive_data(connection.recv(65536)))
        yield
        if is_reset:
            h2.reset_stream(1)
            connection.sendall(h2.data_to_send())


def drains(server: ServerProcess) -> bool:
    """Whether it has taken the first signal: until then a second one would be the same as none."""
    return any("draining calls=" in line for line in server.said)


@each_kind
def test_clients_of_http_2_that_do_not_read_do_not_keep_a_server_from_its_end(kind: str) -> None:
    # A connection has to end by itself before its host cancels it, which takes a slow machine seconds.
    flags = () if kind == "perennial" else ("--graceful-timeout", "10")
    with started(kind, *flags, application=PATIENT, http_overflow="evict") as server, ExitStack() as clients:
        for path, window, body in [
            ("/openapi.json", 1000, None),
            ("/metrics", 0, None),
            (COMPLETIONS, 0, ENDLESS),
            (COMPLETIONS, 0, TALK),
        ]:
            clients.enter_context(unread(server, path, window, body))
        if kind == "perennial":
            server.process.send_signal(signal.SIGTERM)
            until(lambda: drains(server))

        assert server.stop() == 0
    assert complaints("".join(server.said)) == []


def descriptors(server: ServerProcess) -> int:
    """Open files of the server and its processes."""
    return sum(each.num_fds() for each in processes_of(server))


@each_kind
def test_answers_that_nobody_reads_cost_no_descriptor_once_their_clients_have_left(kind: str) -> None:
    with started(kind) as server:
        # Its reading process starts beside the model, and opens files until it can answer.
        httpx.post(server.http + COMPLETIONS, json=TALK | {"max_tokens": 1}, timeout=MOST_S).raise_for_status()
        before = descriptors(server)
        for is_reset in [False, True] * 10:
            with unread(server, "/openapi.json", 1000, is_reset=is_reset):
                pass

        until(lambda: descriptors(server) <= before)
        assert server.stop() == 0
    assert complaints("".join(server.said)) == []


@each_kind
def test_a_stream_that_is_cut_by_the_servers_end_says_so(kind: str) -> None:
    # A host's calls are cut while there is time yet for their last words: here five seconds after the signal.
    flags = () if kind == "perennial" else ("--graceful-timeout", "15")
    with started(kind, *flags, application=PATIENT, http_overflow="evict") as server:
        with httpx.stream("POST", server.http + COMPLETIONS, json=ENDLESS, timeout=MOST_S) as stream:
            lines = stream.iter_lines()
            assert "data:" in next(lines)
            server.process.send_signal(signal.SIGTERM)
            if kind == "perennial":
                # The second one cuts the drain short.
                until(lambda: drains(server))
                server.process.send_signal(signal.SIGTERM)
            *_, last = [line for line in lines if line]

        assert server.wait() == 0
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "overloaded_error"
    assert complaints("".join(server.said)) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_lets_calls_come_to_their_end(number: signal.Signals) -> None:
    with started("perennial", application=PATIENT, http_overflow="evict") as server:
        asked = TALK | {"stream": True, "max_tokens": 100, "ignore_eos": True}
        with httpx.stream("POST", server.http + COMPLETIONS, json=asked, timeout=MOST_S) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.process.send_signal(number)
            *_, last = [line for line in lines if line]

        assert last == "data: [DONE]"
        assert server.wait() == 0


def test_a_server_that_was_started_to_outlive_its_terminal_does() -> None:
    with hangups(signal.SIG_IGN), started("perennial") as server:
        server.process.send_signal(signal.SIGHUP)

        asked = TALK | {"max_tokens": 20, "ignore_eos": True}
        assert all(httpx.post(server.http + COMPLETIONS, json=asked, timeout=MOST_S).is_success for _ in range(5))
        assert server.stop() == 0


def test_signals_that_come_again_and_again_do_not_change_the_exit_status() -> None:
    with started("perennial") as server:
        while server.process.poll() is None:
            server.process.send_signal(signal.SIGTERM)

        assert server.wait() == 0


@each_kind
def test_a_second_signal_does_not_change_the_exit_status(kind: str) -> None:
    with started(kind) as server:
        for _ in range(2):
            server.process.send_signal(signal.SIGTERM)

        assert server.wait() == 0
    assert complaints("".join(server.said)) == []


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_worker_whose_host_is_gone_ends_when_it_is_told_to(kind: str) -> None:
    with started(kind) as server:
        workers = processes_of(server)[1:]
        server.process.kill()
        server.process.wait()
        for worker in workers:
            with suppress(psutil.NoSuchProcess):
                worker.terminate()

        _, alive = psutil.wait_procs(workers, 60)
        assert not alive


@each_kind
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_all_of_a_servers_processes_lets_calls_come_to_their_end(kind: str, number: signal.Signals) -> None:
    """As a terminal that is closed sends it, or a service manager."""
    with started(kind, application=PATIENT, http_overflow="evict") as server:
        asked = TALK | {"stream": True, "max_tokens": 100, "ignore_eos": True}
        with httpx.stream("POST", server.http + COMPLETIONS, json=asked, timeout=MOST_S) as stream:
            lines = stream.iter_lines()
            next(lines)
            for each in processes_of(server):
                # Python's own bookkeeper, which says so when it is ended.
                if "resource_tracker" not in line_of(each):
                    each.send_signal(number)
            *_, last = [line for line in lines if line]

        assert last == "data: [DONE]"
        if kind != "perennial" and number is signal.SIGHUP:
            # Hypercorn then starts another worker.
            until(lambda: "".join(server.said).count("model loaded") == 2)
            server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
    assert complaints("".join(server.said)) == []


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@each_kind
def test_a_template_without_an_end_ends_with_its_time_and_with_the_server(
    kind: str, tmp_path: Path, seedling: Path
) -> None:
    model = shutil.copytree(seedling, tmp_path / "model")
    (model / "chat_template.jinja").write_text(LOOP)
    asked = TALK | {"model": "looping"}
    looping: dict[str, Any] = {"model": model, "model_label": "looping", "request_timeout_s": 2}
    with started(kind, application=PATIENT, **looping) as server:
        assert httpx.post(server.http + COMPLETIONS, json=asked, timeout=MOST_S).status_code == 504
        assert httpx.get(f"{server.http}/healthz", timeout=MOST_S).status_code == 200
        body = json.dumps(asked).encode()
        with connected(server) as connection:
            connection.sendall(f"POST {COMPLETIONS} {JSON}{len(body)}\r\n\r\n".encode() + body)
            assert httpx.get(f"{server.http}/healthz", timeout=MOST_S).status_code == 200

            # Within the time of a drain, or a killed process is what comes of it.
            assert server.stop() == 0
    assert complaints("".join(server.said)) == []


@each_kind
def test_no_line_of_the_log_is_long_or_has_a_clients_words(kind: str) -> None:
    body = json.dumps(TALK).encode()
    rude = [
        f"POST {COMPLETIONS} {JSON}{len(body)}\r\n{SECRET}: {SECRET}\r\nbroken\r\n\r\n".encode() + body,
        f"POST {COMPLETIONS} {JSON}{10**30}\r\n\r\n".encode() + SECRET.encode() * 2000,
        f"POST {COMPLETIONS} {JSON}-1{SECRET}\r\n\r\n".encode(),
        f"GET /{SECRET} HTTP/{SECRET}\r\n\r\n".encode(),
        f"GET / HTTP/1.1\r\nHost: {SECRET}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: {SECRET}"
        "\r\nSec-WebSocket-Version: 13\r\n\r\n".encode(),
        SECRET.encode() * 20_000,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SECRET.encode() * 20_000,
    ]
    with started(kind) as server:
        for said in rude:
            with connected(server) as connection:
                try:
                    connection.sendall(said)
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(65536):
                        pass
                except OSError:
                    pass
        for wrong in (TALK | {"seed": 10**30, "user": SECRET}, TALK | {SECRET: 1, "top_k": SECRET}):
            assert httpx.post(server.http + COMPLETIONS, json=wrong, timeout=MOST_S).status_code == 422
        assert httpx.get(f"{server.http}/healthz", timeout=MOST_S).status_code == 200
        assert server.stop() == 0

    assert SECRET not in "".join(server.said)
    assert str(10**30) not in "".join(server.said)
    assert max(map(len, server.said)) <= LONGEST_LINE
    assert complaints("".join(server.said)) == []


def test_a_start_does_not_need_a_home() -> None:
    program_text = (
        "import pwd, sys\n"
        "def getpwuid(uid): raise KeyError(uid)\n"
        "pwd.getpwuid = getpwuid\n"
        "from api.cli import main\n"
        "sys.exit(main(['serve', '--bind', '127.0.0.1:0', '--model', 'org/name']))"
    )
    names = ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME")
    variables = {name: value for name, value in environment({}).items() if name not in names}
    python = program("python")
    failed = subprocess.run([python, "-c", program_text], env=variables, capture_output=True, text=True, check=False)

    assert failed.returncode == 1
    (line,) = complaints(failed.stderr)
    assert re.match("perennial: .*HF_HOME", line)
