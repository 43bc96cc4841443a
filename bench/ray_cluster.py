"""Our deployment on a local cluster of Ray's, for tests and benchmarks: started, changed, and its replicas killed."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import trio
import yaml

APPLICATION = "perennial"
_REPLICA = f"ray::ServeReplica:{APPLICATION}:{APPLICATION}"
_LONGEST_DEPLOY_S = 300.0
_EXAMPLE = Path(__file__).parents[1] / "docs" / "serve.yaml"


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on, each another one."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]


def configuration(http: int, grpc: int, arguments: Mapping[str, Any], **deployment: Any) -> dict[str, Any]:
    """What docs/serve.yaml has `serve run` do, on this machine alone: with other settings of ours, and options of Serve's."""
    configured: dict[str, Any] = yaml.safe_load(_EXAMPLE.read_text())
    configured["http_options"] |= {"host": "127.0.0.1", "port": http}
    configured["grpc_options"]["port"] = grpc
    (application,) = configured["applications"]
    application["args"] = dict(arguments)
    (usual,) = application["deployments"]
    if "num_replicas" in deployment:
        del usual["autoscaling_config"]
    usual |= {"health_check_period_s": 1, "ray_actor_options": {"num_cpus": 0.1}, **deployment}
    return configured


class Cluster:
    """A running one. Every method's waits end when Ray says so."""

    def __init__(self, control: trio.Process, address: str, folder: Path, environment: Mapping[str, str]) -> None:
        self._control = control
        self._address = address
        self._folder = folder
        self._environment = environment

    async def deploy(self, configured: Mapping[str, Any]) -> None:
        """Has Serve bring about what the configuration says; returns at once."""
        file = self._folder / "serve.yaml"
        file.write_text(yaml.safe_dump(dict(configured)))
        command = [
            str(Path(sys.executable).with_name("serve")),
            "run",
            "--non-blocking",
            "--address",
            self._address,
            str(file),
        ]
        with (self._folder / "log").open("ab") as log:
            await trio.run_process(command, stdout=log, stderr=subprocess.STDOUT, env=self._environment)

    async def settled(self, replicas: int) -> None:
        """Returns once what was deployed stands: so many replicas run, and none starts or stops. Raises TooSlowError."""
        await self._until(lambda states: states == {"RUNNING": replicas})

    async def served(self, least: int) -> None:
        """Returns once so many replicas run, or more. Raises TooSlowError."""
        await self._until(lambda states: states.get("RUNNING", 0) >= least)

    async def _until(self, condition: Callable[[dict[str, int]], bool]) -> None:
        assert self._control.stdin is not None
        with trio.fail_after(_LONGEST_DEPLOY_S):
            while True:
                await self._control.stdin.send_all(b"\n")
                if condition(json.loads(await _line(self._control))):
                    return
                # Serve tells its state when asked, and has no event for it.
                await trio.sleep(0.3)

    def replicas(self) -> list[psutil.Process]:
        """The processes of replicas, also of those that start or stop."""
        ours = psutil.Process(self._control.pid).children(recursive=True)
        return [each for each in ours if _title(each).startswith(_REPLICA)]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


async def _line(process: trio.Process) -> bytes:
    assert process.stdout is not None
    line = b""
    while not line.endswith(b"\n"):
        some = await process.stdout.receive_some(1)
        if not some:
            raise RuntimeError("Ray's local cluster ended")
        line += some
    return line


@asynccontextmanager
async def cluster(folder: Path, environment: Mapping[str, str] | None = None) -> AsyncIterator[Cluster]:
    """A cluster of this machine alone, for the block; what Ray and the replicas say goes to `folder`/log."""
    changed = {
        # Nobody else on this machine is to have the cluster run code.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "api.ray_serve.proxying.middleware",
        # Each replica would have as many threads as there are cores.
        "OMP_NUM_THREADS": "1",
        **(environment or {}),
    }
    everything = os.environ | changed
    command = [sys.executable, "-m", "bench.ray_control"]
    with (folder / "log").open("wb") as log:
        control = await trio.lowlevel.open_process(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=everything
        )
        try:
            yield Cluster(control, json.loads(await _line(control)), folder, everything)
        finally:
            with trio.CancelScope(shield=True):
                assert control.stdin is not None
                await control.stdin.aclose()
                await control.wait()
