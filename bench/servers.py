"""Server processes for benchmarks."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import psutil
import trio

from runtime.settings import ENVIRONMENT_PREFIX, Settings


@asynccontextmanager
async def serving(settings: Settings, *flags: str, dies: bool = False) -> AsyncIterator[tuple[str, psutil.Process]]:
    """gRPC address and process of a `perennial serve` with these settings, for the block.

    Its end has to be a clean one, unless it `dies` in the block.
    """
    changed = {
        ENVIRONMENT_PREFIX + field.name.upper(): str(value)
        for field in dataclasses.fields(Settings)
        if (value := getattr(settings, field.name)) != field.default and field.name != "api_keys"
    }
    # Where it listens is in the log, whatever level the settings ask for.
    where = ["--bind", "", "--grpc_bind", "127.0.0.1:0", "--log_level", "info"]
    command = [Path(sys.executable).with_name("perennial"), "serve", *where, *flags]
    running = partial(trio.run_process, command, env=os.environ | changed, stderr=subprocess.PIPE, check=not dies)
    async with trio.open_nursery() as nursery:
        process = await nursery.start(running)
        yield await nursery.start(_grpc_address, process.stderr), psutil.Process(process.pid)
        process.terminate()


async def _grpc_address(log: trio.abc.ReceiveStream, *, task_status: trio.TaskStatus[str]) -> None:
    """Gives the address once the log names it, and reads on, for a full pipe would stop the server."""
    said: bytes | None = b""
    async for chunk in log:
        if said is not None:
            said += chunk
            if found := re.search(rb"serving .*grpc=(\S+)\n", said):
                task_status.started(found[1].decode())
                said = None
    if said is not None:
        raise RuntimeError(f"the server ended before it served: {said.decode().strip().splitlines()[-1:]}")
