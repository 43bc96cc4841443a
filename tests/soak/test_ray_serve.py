"""Ten minutes of a deployment on Ray Serve whose replicas are killed, added, taken away and replaced under load."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from actors import open_runtime
from api.client import Client, connect
from bench.ray_cluster import Cluster, cluster, configuration, free_ports
from runtime import Settings
from tests.soak.deployed_sessions import UNHEARD, Seen, asked, begin, end, take_turns, told_in_all, undisturbed

pytest.importorskip("ray", reason="Ray Serve is not installed: pip install 'perennial[ray]'")
pytestmark = pytest.mark.soak

SESSIONS, REPLICAS, KILLS = 60, 3, 20
PAUSE_S = 4.0
KEY = "soak"
SETTINGS = {"device": "cpu", "window": 124}
LONGEST_S = 1800


async def talk(client: Client, seen: Seen, number: int, over: trio.Event) -> None:
    """One session: turns and pauses until it is `over`."""
    session = await begin(client, seen)
    await take_turns(session, seen, random.Random(number), PAUSE_S, over)
    await end(session, seen)


async def kill(running: Cluster, chance: random.Random, count: int) -> None:
    """Kills replicas at random, and never the last one that serves."""
    for _ in range(count):
        await trio.sleep(chance.uniform(1, 8))
        await running.served(REPLICAS - 1)
        chance.choice(running.replicas()).kill()


async def test_a_deployment_that_is_killed_grown_shrunk_and_upgraded_loses_nothing(
    tmp_path: Path, record: Callable[[str, str], None]
) -> None:
    http, grpc = free_ports(2)
    arguments = {
        **SETTINGS,
        "state_dir": f"file://{tmp_path}/store",
        "state_lease_s": 2,
        "capacity": 40,
        "api_keys": KEY,
    }

    def configured(replicas: int, label: str = "first") -> dict[str, object]:
        return configuration(http, grpc, arguments | {"model_label": label}, num_replicas=replicas)

    chance = random.Random(0)
    everyone = [Seen() for _ in range(SESSIONS)]
    over = trio.Event()
    async with cluster(tmp_path) as running, connect(f"127.0.0.1:{grpc}", key=KEY) as client:
        await running.deploy(configured(REPLICAS))
        await running.settled(REPLICAS)
        with trio.fail_after(LONGEST_S):
            async with trio.open_nursery() as nursery:
                for number, seen in enumerate(everyone):
                    nursery.start_soon(talk, client, seen, number, over)
                await kill(running, chance, KILLS // 2)
                await running.deploy(configured(REPLICAS + 1))
                await running.settled(REPLICAS + 1)
                await trio.sleep(5)
                await running.deploy(configured(REPLICAS))
                await running.settled(REPLICAS)
                await kill(running, chance, KILLS - KILLS // 2)
                await running.settled(REPLICAS)
                await running.deploy(configured(REPLICAS, "second"))
                await running.settled(REPLICAS)
                assert (await asked(Seen(), client.model_info)).model == "second"
                over.set()
    async with open_runtime(Settings(**SETTINGS)) as runtime:  # type: ignore[arg-type]
        for seen in everyone:
            assert await undisturbed(runtime, seen) == seen.digest
    tokens = [token for seen in everyone for turn in seen.turns for token in turn.drawn]
    record(
        f"{SESSIONS} sessions on {REPLICAS} replicas of Ray Serve: {KILLS} times `kill -9` at random, a replica more and one "
        "less, a rolling upgrade",
        f"0 of {len(tokens) - tokens.count(UNHEARD)} acknowledged tokens lost or changed, every history one server's; "
        f"{tokens.count(UNHEARD)} more were recorded and not heard of; asked "
        f"again after {told_in_all(everyone)}; "
        f"{sum(seen.reread for seen in everyone)} tokens read again",
    )
