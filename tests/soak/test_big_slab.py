"""A slab of a gigabyte is left on disk while its session rests, and no call that comes meanwhile waits for it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pytest
import trio

from actors import SessionHandle, open_runtime
from bench.models import QWEN3_06B, bench_model
from runtime import Settings

pytestmark = pytest.mark.soak

WINDOW, CALLS = 8188, 40
# A slab is written once its session has rested for 2 s, and this one is being written for a second or more.
REST_S, LONGER_S = 2.0, 1.0


async def test_no_call_waits_for_a_gigabyte_on_its_way_to_disk(
    tmp_path: Path, record: Callable[[str, str], None]
) -> None:
    model = await trio.to_thread.run_sync(bench_model, QWEN3_06B)
    settings = Settings(model=model, device="cpu", weights="int8", window=WINDOW, capacity=1, state_dir=str(tmp_path))
    chance = random.Random(0)
    async with open_runtime(settings) as runtime:
        session = await runtime.create_session()
        await session.append([chance.randrange(150_000) for _ in range(WINDOW + 4)])
        slab_bytes = (await session.info()).kv_live_bytes
        waited = [await _waited_for(session, REST_S + LONGER_S * chance.random()) for _ in range(CALLS)]
        await trio.sleep(REST_S)
        at_rest = [await _waited_for(session, 0.05) for _ in range(CALLS)]
    record(
        f"{CALLS} calls to a session while its slab of {slab_bytes / 2**20:.0f} MiB is being written",
        f"waited {1e3 * median(waited):.1f} ms (median) and {1e3 * max(waited):.1f} ms (longest); "
        f"without a write {1e3 * median(at_rest):.1f} and {1e3 * max(at_rest):.1f} ms",
    )


async def _waited_for(session: SessionHandle, rest_s: float) -> float:
    await trio.sleep(rest_s)
    began = time.perf_counter()
    await session.info()
    return time.perf_counter() - began
