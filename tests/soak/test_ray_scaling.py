"""A deployment on Ray Serve that nobody tells how large to be: a crowd comes, and goes."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from actors import open_runtime
from api.client import Client, connect
from bench.ray_cluster import cluster, configuration, free_ports
from runtime import Settings
from tests.soak.deployed_sessions import (
    UNHEARD,
    Seen,
    begin,
    end,
    take_turn,
    take_turns,
    told_in_all,
    undisturbed,
)

pytest.importorskip("ray", reason="Ray Serve is not installed: pip install 'perennial[ray]'")
pytestmark = pytest.mark.soak

CROWD, FEW = 24, 3
CROWDED_PAUSE_S, QUIET_PAUSE_S = 0.5, 5.0
CROWDED_S, LONGEST_S = 60, 900
KEY = "soak"
SETTINGS = {"device": "cpu", "window": 124}
# As the docs' example has it, but for waits that are Serve's own and minutes long.
AUTOSCALING = {
    "min_replicas": 1,
    "max_replicas": 4,
    "upscale_delay_s": 2,
    "downscale_delay_s": 12,
    "look_back_period_s": 11,
}
REPORTS = {"RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1"}


async def talk(client: Client, seen: Seen, number: int, left: trio.Event, shrunk: trio.Event) -> None:
    """One of the crowd until that has left; a few go on at leisure. Each takes a last turn when it has `shrunk`."""
    chance = random.Random(number)
    session = await begin(client, seen)
    await take_turns(session, seen, chance, CROWDED_PAUSE_S, left)
    if number < FEW:
        await take_turns(session, seen, chance, QUIET_PAUSE_S, shrunk)
    await shrunk.wait()
    await take_turn(session, seen, chance)
    await end(session, seen)


async def test_a_crowd_gets_replicas_and_leaves_one_and_no_session_notices(
    tmp_path: Path, record: Callable[[str, str], None]
) -> None:
    http, grpc = free_ports(2)
    arguments = {
        **SETTINGS,
        "state_dir": f"file://{tmp_path}/store",
        "state_lease_s": 2,
        "capacity": 8,
        "api_keys": KEY,
    }
    configured = configuration(http, grpc, arguments)
    configured["applications"][0]["deployments"][0]["autoscaling_config"] |= AUTOSCALING
    everyone = [Seen() for _ in range(CROWD)]
    left, shrunk = trio.Event(), trio.Event()
    async with cluster(tmp_path, REPORTS) as running, connect(f"127.0.0.1:{grpc}", key=KEY) as client:
        await running.deploy(configured)
        await running.settled(1)
        with trio.fail_after(LONGEST_S):
            async with trio.open_nursery() as nursery:
                came_at = trio.current_time()
                for number, seen in enumerate(everyone):
                    nursery.start_soon(talk, client, seen, number, left, shrunk)
                await running.served(3)
                grown_s = trio.current_time() - came_at
                await trio.sleep(CROWDED_S)
                left.set()
                left_at = trio.current_time()
                await running.settled(1)
                shrunk_s = trio.current_time() - left_at
                shrunk.set()
    async with open_runtime(Settings(**SETTINGS)) as runtime:  # type: ignore[arg-type]
        for seen in everyone:
            assert await undisturbed(runtime, seen) == seen.digest
    tokens = [token for seen in everyone for turn in seen.turns for token in turn.drawn]
    record(
        f"{CROWD} sessions crowd a deployment of Ray Serve that scales itself from one replica, and {FEW} remain",
        f"3 replicas or more after {grown_s:.0f} s, and one again {shrunk_s:.0f} s after the crowd; 0 of "
        f"{len(tokens) - tokens.count(UNHEARD)} acknowledged tokens lost or changed, every history one server's; asked again "
        f"after {told_in_all(everyone)}; {sum(seen.reread for seen in everyone)} tokens read again",
    )
