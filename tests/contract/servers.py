"""Server processes of every kind, as a user starts them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from runtime.models import SEEDLING, find_model

KINDS = ("perennial", "hypercorn-asyncio", "hypercorn-trio")
# The rest of a POST's head, up to its body's length.
JSON = "HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
# Of a log, with its end and what a host may put before it.
LONGEST_LINE = 2100
# The application of a server with much patience; with `perennial`, the module that serves as it does.
PATIENT = "tests.contract.patient:app"
_LONGEST_START_S = 240
_LONGEST_STOP_S = 120


def program(name: str) -> str:
    """The command of this name in this environment."""
    return str(Path(sys.executable).with_name(name))


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


@dataclass
class ServerProcess:
    """A server that runs: where it listens, and what it has said on stderr."""

    process: subprocess.Popen[str]
    http: str
    grpc: str = ""
    said: list[str] = field(default_factory=list)

    def stop(self) -> int:
        """Tells it to drain and stop; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        """Its exit status, once it has stopped of itself. One that does not is killed, and TimeoutExpired raised."""
        try:
            return self.process.wait(_LONGEST_STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def wait_until_ready(self) -> None:
        """Returns once it serves. Between the line that says that the model is loaded and that lies a moment."""
        while True:
            try:
                with urllib.request.urlopen(f"{self.http}/healthz", timeout=_LONGEST_START_S):
                    return
            except urllib.error.HTTPError as loading:
                loading.close()


def command(kind: str, http: str, *flags: str, application: str = "api.http:app") -> list[str]:
    is_patient = application == PATIENT
    if kind == "perennial":
        start = [program("python"), "-m", PATIENT.removesuffix(":app")] if is_patient else [program("perennial")]
        return [*start, "serve", "--bind", http, *flags]
    # Hypercorn's own 5 s pass between two requests of a client on a slow machine. Of an option given twice the last counts.
    patience = ["--keep-alive", "600", *(["--graceful-timeout", "60"] if is_patient else [])]
    worker = kind.removeprefix("hypercorn-")
    return [program("hypercorn"), "-k", worker, "--bind", http, application, *patience, *flags]


def environment(settings: dict[str, object]) -> dict[str, str]:
    chosen = {"grpc_bind": "127.0.0.1:0", "device": os.environ.get("PERENNIAL_DEVICE", "cpu")} | settings
    return os.environ | {f"PERENNIAL_{name.upper()}": str(value) for name, value in chosen.items()}


@contextmanager
def hangups(handled: signal.Handlers) -> Iterator[None]:
    """What is started in the block handles SIGHUP so: as usual, or not at all, as `nohup` has it."""
    before = signal.signal(signal.SIGHUP, handled)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


@contextmanager
def started(
    kind: str,
    *flags: str,
    is_awaited: bool = True,
    application: str = "api.http:app",
    descriptors: int | None = None,
    **settings: object,
) -> Iterator[ServerProcess]:
    """A server of this kind, loaded unless it is not `is_awaited`; it is ended when the block ends.

    It may open so many `descriptors`, or as many as this process.
    """
    http = f"127.0.0.1:{free_port()}"
    line = command(kind, http, *flags, application=application)
    if descriptors is not None:
        line = ["/bin/sh", "-c", f'ulimit -n {descriptors}; exec "$@"', "sh", *line]
    process = subprocess.Popen(line, env=environment(settings), stderr=subprocess.PIPE, text=True)
    server = ServerProcess(process, f"http://{http}")
    opened, loaded = threading.Event(), threading.Event()

    def listen() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            server.said.append(line)
            if found := re.search(r"serving .*grpc=(\S+)", line):
                server.grpc = found[1]
            if "Running on" in line:
                opened.set()
            # Both lines come once the model is there, the second one from `perennial serve` alone.
            if ("model loaded" in line and kind != "perennial") or "serving http=" in line:
                loaded.set()
        opened.set()
        loaded.set()

    listener = threading.Thread(target=listen)
    listener.start()
    try:
        assert (loaded if is_awaited else opened).wait(_LONGEST_START_S), server.said
        if is_awaited and kind != "perennial":
            opened.wait(_LONGEST_START_S)
            server.wait_until_ready()
        yield server
    finally:
        try:
            if process.poll() is None:
                server.stop()
        finally:
            listener.join()
            assert process.stderr is not None
            process.stderr.close()


def processes_of(server: ServerProcess) -> list[psutil.Process]:
    """The server's process, and those that it has started."""
    process = psutil.Process(server.process.pid)
    return [process, *process.children(recursive=True)]


def readers_of(server: ServerProcess) -> list[psutil.Process]:
    """The processes that read requests, and are ended when they take too long or too much."""
    return [each for each in processes_of(server) if "api.reading" in line_of(each)]


def line_of(process: psutil.Process) -> str:
    """How the process was started; nothing where it has ended since."""
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


def memory_of(server: ServerProcess) -> int:
    """Bytes that the server's processes hold, but for those that read requests."""
    own = set(processes_of(server)) - set(readers_of(server))
    return sum(map(resident_bytes_of, own))


def resident_bytes_of(process: psutil.Process) -> int:
    """What the process holds in memory; 0 where it has ended since."""
    with suppress(psutil.NoSuchProcess):
        resident: int = process.memory_info().rss
        return resident
    return 0


def until(condition: Callable[[], bool], longest_s: float = 240) -> None:
    """Returns once `condition` holds, which no event tells of."""
    end = time.monotonic() + longest_s
    while not condition():
        assert time.monotonic() < end, "it did not come to be"
        threading.Event().wait(0.02)


def fails_to_start(kind: str, *flags: str, http: str = "", **settings: object) -> subprocess.CompletedProcess[str]:
    """What became of a server that should not start."""
    line = command(kind, http or f"127.0.0.1:{free_port()}", *flags)
    return subprocess.run(
        line, env=environment(settings), capture_output=True, text=True, timeout=_LONGEST_START_S, check=False
    )


def complaints(log: str) -> list[str]:
    """Lines on stderr that do more than inform, be they ours or Hypercorn's own."""
    return [line for line in log.splitlines() if not re.search(r" INFO |\[INFO\]", line)]


def certificate_in(directory: Path) -> tuple[Path, Path]:
    """A certificate for this machine, signed by itself, and its key, as PEM files."""
    certificate, key = directory / "certificate.pem", directory / "key.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    )
    subprocess.run([*command.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    return certificate, key


@contextmanager
def held_model(directory: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A copy of the bundled model that takes until the call, or the end of the block, to load: with a `state_dir`.

    The weights' digest is read with the rest of them, and one of these files is a pipe.
    """
    shutil.copytree(find_model(SEEDLING), directory)
    pipe = directory / "more.safetensors"
    os.mkfifo(pipe)
    # For reading too, so that it opens at once; as long as it is open, a reader waits for more. Who comes later finds a file.
    with ExitStack() as stack:
        stack.callback(os.close, os.open(pipe, os.O_RDWR))
        file = directory / "empty"
        file.touch()
        stack.callback(os.replace, file, pipe)
        yield directory, stack.close
