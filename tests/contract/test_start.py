"""A server's start and end, and the commands of the terminal, as whoever runs them sees them."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import termios
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from api.cli import main
from runtime import Settings
from tests.contract.conftest import KEYS
from tests.contract.loops import MOST_S
from tests.contract.servers import (
    KINDS,
    PATIENT,
    ServerProcess,
    complaints,
    environment,
    fails_to_start,
    free_port,
    held_model,
    program,
    started,
)
from tests.contract.stubs import ENDLESS, PROMPT, Stubs, refused, stock
from tests.contract.test_http_bad_input import COMPLETIONS, HELLO, checked, error_in

pytestmark = pytest.mark.door

PERENNIAL, HYPERCORN_ASYNCIO, HYPERCORN_TRIO = KINDS

# A grpc.health.v1.HealthCheckResponse on the wire. The package that knows it cannot be imported beside grpclib's.
SERVING, NOT_SERVING = b"\x08\x01", b"\x08\x02"


@dataclasses.dataclass
class Life:
    """What clients saw of one server from its first log line to its last."""

    loading: list[httpx.Response]
    serving: httpx.Response
    draining: httpx.Response | None
    health: list[bytes]
    streamed: str
    status: int
    log: list[str]


@pytest.fixture(scope="module", params=KINDS)
def life(request: pytest.FixtureRequest, stubs: Stubs, tmp_path_factory: pytest.TempPathFactory) -> Life:
    """The life of a server of each kind, told to stop while it works for one client of each door."""
    home = tmp_path_factory.mktemp("life")
    address = f"127.0.0.1:{free_port()}"
    with (
        held_model(home / "model") as (model, release),
        started(
            request.param,
            application=PATIENT,
            is_awaited=False,
            model=model,
            model_label="seedling",
            state_dir=home,
            grpc_bind=address,
        ) as server,
        httpx.Client(base_url=server.http, timeout=MOST_S) as http,
        stock(stubs, address) as client,
    ):
        watch = client.channel.unary_stream("/grpc.health.v1.Health/Watch")(b"", timeout=MOST_S, wait_for_ready=True)
        health = [next(watch)]
        loading = [http.get("/healthz"), http.post(COMPLETIONS, json=HELLO), http.get("/v1/models")]
        with refused(grpc.StatusCode.UNAVAILABLE):
            client.create()
        release()

        health.append(next(watch))
        serving = http.get("/healthz")
        tokens = client.stream(client.create(PROMPT), ENDLESS)
        next(tokens)
        body = HELLO | {"max_tokens": 20, "ignore_eos": True, "stream": True}
        with http.stream("POST", COMPLETIONS, json=body) as stream:
            pieces = stream.iter_text()
            first = next(pieces)
            server.process.terminate()
            streamed = first + "".join(pieces)

        health.append(next(watch))
        with refused(grpc.StatusCode.UNAVAILABLE):
            client.create()
        # Hypercorn shuts its own door first.
        draining = httpx.get(f"{server.http}/v1/models", timeout=MOST_S) if request.param == PERENNIAL else None
        next(tokens)
        tokens.cancel()
        status = server.wait()
    return Life(loading, serving, draining, health, streamed, status, server.said)


def test_while_the_model_loads_the_http_door_says_so(life: Life) -> None:
    health, *calls = life.loading

    assert (health.status_code, health.json()) == (503, {"status": "loading", "model": "seedling"})
    checked(health)
    for answer in calls:
        assert error_in(answer, 503)["type"] == "overloaded_error"
    assert {int(answer.headers["Retry-After"]) for answer in life.loading} == {1}


def test_once_it_serves_its_health_says_so(life: Life) -> None:
    assert (life.serving.status_code, life.serving.json()) == (200, {"status": "ok", "model": "seedling"})
    checked(life.serving)


def test_watchers_of_its_health_are_told_of_each_change(life: Life) -> None:
    assert life.health == [NOT_SERVING, SERVING, NOT_SERVING]


def test_while_it_drains_new_completions_are_refused(life: Life) -> None:
    if life.draining is not None:
        assert error_in(life.draining, 503)["type"] == "overloaded_error"
        assert int(life.draining.headers["Retry-After"]) >= 1


def test_a_stream_that_runs_when_it_is_told_to_stop_comes_to_its_end(life: Life) -> None:
    *_, last, done, nothing = life.streamed.split("\n\n")

    assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert (done, nothing) == ("data: [DONE]", "")


def test_it_ends_with_success_and_without_a_complaint(life: Life) -> None:
    assert life.status == 0
    assert complaints("".join(life.log)) == []


def test_the_log_names_the_ceiling_of_one_session_and_of_all_slabs(life: Life) -> None:
    found = next(match for line in life.log if (match := re.search(r"session_ceiling_bytes=(\d+) slabs=(\d+)", line)))

    assert any(f"all_slabs_ceiling_bytes={int(found[1]) * int(found[2])}" in line for line in life.log)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a value out of range": ({"window": 0}, "window must be"),
    "no model there": ({"model": "/nowhere"}, "'/nowhere'"),
    "more than the memory": ({"capacity": 2**20}, "lower window, capacity or max_concurrent"),
    "a certificate that is none": ({"tls_cert": __file__, "tls_key": __file__}, "tls_cert"),
    "a gRPC door open to others": ({"grpc_bind": "0.0.0.0:0"}, "grpc_bind"),
}


def refusal(kind: str, *flags: str, http: str = "", **settings: object) -> tuple[int, str]:
    """Status of a server that cannot start, and the one line that says why."""
    failed = fails_to_start(kind, *flags, http=http, **settings)
    said = complaints(failed.stderr)
    assert len(said) == 1, said
    return failed.returncode, said[0]


@pytest.mark.parametrize(("settings", "words"), REFUSED.values(), ids=REFUSED)
def test_a_server_that_cannot_start_says_why_in_one_line(settings: dict[str, Any], words: str) -> None:
    status, line = refusal(PERENNIAL, **settings)

    assert status == 1
    assert line.startswith("perennial: ")
    assert words in line


@pytest.mark.parametrize("kind", [HYPERCORN_ASYNCIO, HYPERCORN_TRIO])
@pytest.mark.parametrize("name", ["a value out of range", "no model there"])
def test_hypercorn_ends_with_the_one_line_of_a_server_that_cannot_start(kind: str, name: str) -> None:
    settings, words = REFUSED[name]
    # With a worker process Hypercorn's own status is 0 even where the worker's was not.
    more = ("--workers", "0") if "model" in settings else ()
    status, line = refusal(kind, *more, **settings)

    assert status == (1 if more else 0)
    assert line.startswith("perennial: ")
    assert words in line


@pytest.mark.parametrize("kind", KINDS)
def test_an_http_door_open_to_others_without_a_key_is_refused(kind: str) -> None:
    _, line = refusal(kind, http=f"0.0.0.0:{free_port()}")

    assert "api_keys" in line
    assert "allow_unauthenticated" in line


def test_a_model_of_an_architecture_that_no_engine_runs_is_refused(tmp_path: Path, seedling: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        shutil.copy(seedling / name, tmp_path)
    config = json.loads((seedling / "config.json").read_text())
    config |= {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    status, line = refusal(PERENNIAL, model=tmp_path)

    assert status == 1
    assert "gpt2" in line


@pytest.mark.parametrize("door", ["bind", "grpc_bind"])
def test_a_port_in_use_is_refused(door: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        status, line = refusal(PERENNIAL, http=address) if door == "bind" else refusal(PERENNIAL, grpc_bind=address)

    assert status == 1
    assert address in line


def perennial_run(*arguments: str, typed: str = "", **settings: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program("perennial"), *arguments],
        input=typed,
        env=environment(settings),
        capture_output=True,
        text=True,
        timeout=MOST_S,
        check=False,
    )


def test_doctor_says_on_which_grounds_forwards_are_bit_exact_and_what_was_tried() -> None:
    run = perennial_run("doctor")

    assert run.returncode == 0, run.stderr
    for part in ("linears", "attention", "norms", "activations"):
        assert re.search(rf"^ +{part}.*: .*(itself|whole numbers|fixed number of rows)", run.stdout, re.MULTILINE)
    assert re.search(r"^tried here +each (linear|kind of graph) at every count", run.stdout, re.MULTILINE)
    assert re.search(r"^kernel class +\S+ \S+ \S+", run.stdout, re.MULTILINE)
    assert not re.search("warning|Traceback", run.stdout + run.stderr)


def test_help_names_every_setting_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    words = " ".join(capsys.readouterr().out.split())

    for field in dataclasses.fields(Settings):
        assert f"--{field.name}" in words
    assert words.count("(default:") == len(dataclasses.fields(Settings)) + 1


TYPED = "Hello! My name is Peter.\nWhat is my name?\n"


def test_chat_answers_each_line_over_its_own_server_as_over_another(plain: ServerProcess) -> None:
    alone = perennial_run("chat", "--max-tokens", "20", typed=TYPED)
    connected = perennial_run("chat", "--max-tokens", "20", "--connect", plain.grpc, typed=TYPED)

    for run in (alone, connected):
        assert run.returncode == 0, run.stderr
        assert complaints(run.stderr) == []
        assert len(run.stdout.splitlines()) == 3
        assert all(run.stdout.splitlines())
    assert alone.stdout.splitlines()[1:] == connected.stdout.splitlines()[1:]


@pytest.mark.parametrize("command", ["serve", "chat"])
def test_a_name_of_no_model_is_refused_before_what_takes_seconds_is_imported(command: str) -> None:
    run = subprocess.run(
        [program("perennial"), command, "--model", "no such model"],
        env=environment({}) | {"PYTHONPROFILEIMPORTTIME": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=MOST_S,
        check=False,
    )

    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("perennial: no model at 'no such model': ")
    assert re.search(r"\| +trio$", run.stderr, re.MULTILINE)
    assert not re.search(r"\| +torch$", run.stderr, re.MULTILINE)


def test_chat_shows_on_a_terminal_that_it_loads_before_it_imports_what_takes_seconds() -> None:
    ours, theirs = os.openpty()
    termios.tcsetwinsize(ours, (30, 120))
    command = [program("perennial"), "chat"]
    with subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment({}) | {"PYTHONPROFILEIMPORTTIME": "1"},
    ) as chat:
        os.close(theirs)
        said = b""
        # The system's way to say that nobody has the terminal open any more.
        with suppress(OSError):
            while part := os.read(ours, 2**16):
                said += part
                if b"remembers" in said and said.endswith(b"> "):
                    os.write(ours, b"\n")
        os.close(ours)

    assert chat.returncode == 0, said[-2000:]
    imports = re.search(rb"\| +torch\r", said)
    assert imports is not None
    assert 0 <= said.find(b"loading seedling") < imports.start()
    assert said.rfind(b"loading seedling") < said.index(b"remembers")


def test_chat_without_the_key_of_a_server_says_so_in_one_line(keyed: ServerProcess) -> None:
    run = perennial_run("chat", "--connect", keyed.grpc, typed=TYPED)

    assert run.returncode == 1
    assert re.fullmatch("perennial: .*key.*\n", run.stderr)


def test_chat_with_the_key_of_a_server_talks_to_it(keyed: ServerProcess) -> None:
    run = perennial_run("chat", "--connect", keyed.grpc, "--max-tokens", "5", typed="Hello\n", api_keys=KEYS[1])

    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 2


def test_chat_with_nobody_says_so_in_one_line() -> None:
    run = perennial_run("chat", "--connect", f"127.0.0.1:{free_port()}", typed=TYPED)

    assert run.returncode == 1
    assert re.fullmatch("perennial: .*is it running.*\n", run.stderr)


@pytest.mark.parametrize("address", ["localhost", "localhost:", ":50051", "localhost:port", "127.0.0.1:70000"])
def test_chat_with_what_is_no_address_says_so_in_one_line(address: str) -> None:
    run = perennial_run("chat", "--connect", address, typed=TYPED)

    assert run.returncode == 1
    assert run.stderr == f"perennial: {address!r} is not HOST:PORT\n"


def test_chat_ends_quietly_where_nobody_reads_what_it_prints(plain: ServerProcess) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as broken:
        run = subprocess.run(
            [program("perennial"), "chat", "--connect", plain.grpc, "--max-tokens", "5"],
            input=TYPED.encode(),
            env=environment({}),
            stdout=broken,
            stderr=subprocess.PIPE,
            timeout=MOST_S,
            check=False,
        )

    assert (run.returncode, run.stderr) == (128 + signal.SIGPIPE, b"")
