"""Ten minutes of a deployment on Ray Serve whose replicas are killed, added, taken away and replaced under load."""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TypeVar

import pytest
import trio

from actors import Runtime, open_runtime
from api.client import Client, ClientSession, connect
from bench.ray_cluster import Cluster, cluster, configuration, free_ports
from runtime import Done, Settings, Token
from runtime.errors import CapacityExhausted, HistoryMismatch, NotServing, SessionFailed, SessionMoved
from runtime.events import Event

pytest.importorskip("ray", reason="Ray Serve is not installed: pip install 'perennial[ray]'")
pytestmark = pytest.mark.soak

SESSIONS, REPLICAS, KILLS = 60, 3, 20
KEY = "soak"
SETTINGS = {"device": "cpu", "window": 124}
LONGEST_S = 1800
# What a client is told while its session moves, or its replica is no more. It asks again.
PASSING = (SessionMoved, NotServing, SessionFailed, CapacityExhausted)
UNHEARD = -1

R = TypeVar("R")


@dataclass
class Turn:
    """What was appended, and what came; -1 for a token that was recorded and not heard of."""

    given: list[int]
    seed: int
    drawn: list[int] = field(default_factory=list)


@dataclass
class Seen:
    """What one session's client knows of it, and how often it was told to ask again."""

    session_id: str = ""
    turns: list[Turn] = field(default_factory=list)
    told: Counter[str] = field(default_factory=Counter)
    reread: int = 0
    digest: bytes = b""

    @property
    def length(self) -> int:
        return sum(len(turn.given) + len(turn.drawn) for turn in self.turns)


async def asked(seen: Seen, call: Callable[[], Awaitable[R]]) -> R:
    """The answer to a call that changes nothing, asked until there is one."""
    while True:
        try:
            return await call()
        except PASSING as error:
            seen.told[type(error).__name__] += 1
            await trio.sleep(0.3)


async def append(session: ClientSession, seen: Seen, turn: Turn) -> None:
    """Appends once, however often it has to be asked for."""
    length = seen.length
    while True:
        try:
            appended = await session.append(turn.given, expected_history_length=length)
        except PASSING as error:
            seen.told[type(error).__name__] += 1
            await trio.sleep(0.3)
        except HistoryMismatch:
            # An earlier try was recorded, and its answer lost.
            info = await asked(seen, session.info)
            assert info.history_length == length + len(turn.given)
            break
        else:
            assert appended.history_length == length + len(turn.given)
            seen.reread += appended.reread_token_count
            break
    seen.turns.append(turn)


async def draw(session: ClientSession, seen: Seen, turn: Turn, count: int) -> None:
    """Draws so many tokens, begun again wherever it was broken off."""
    while len(turn.drawn) < count:
        try:
            async with session.generate(count - len(turn.drawn), temperature=0.8, seed=turn.seed) as events:
                last: Event | None = None
                async for event in events:
                    last = event
                    if isinstance(event, Token):
                        turn.drawn.append(event.token_id)
            # A stream that was cut ends with an error, and never as one that is complete.
            assert isinstance(last, Done)
            seen.reread += last.reread_token_count
        except PASSING as error:
            seen.told[type(error).__name__] += 1
            await trio.sleep(0.3)
            info = await asked(seen, session.info)
            unheard = info.history_length - seen.length
            assert 0 <= unheard <= count - len(turn.drawn), (seen.session_id, unheard)
            turn.drawn += [UNHEARD] * unheard


async def talk(client: Client, seen: Seen, number: int, over: trio.Event) -> None:
    """One session: turns and pauses until it is `over`."""
    chance = random.Random(number)
    session = await asked(seen, client.create_session)
    seen.session_id = session.id
    while not over.is_set():
        turn = Turn([chance.randrange(3, 2000) for _ in range(chance.randrange(2, 30))], chance.randrange(2**32))
        await append(session, seen, turn)
        await draw(session, seen, turn, chance.randrange(10, 80))
        with trio.move_on_after(chance.expovariate(1 / 4)):
            await over.wait()
    info = await asked(seen, session.info)
    assert info.history_length == seen.length
    seen.digest = info.history_digest


async def kill(running: Cluster, chance: random.Random, count: int) -> None:
    """Kills replicas at random, and never the last one that serves."""
    for _ in range(count):
        await trio.sleep(chance.uniform(1, 8))
        await running.served(REPLICAS - 1)
        chance.choice(running.replicas()).kill()


async def undisturbed(runtime: Runtime, seen: Seen) -> bytes:
    """Checks every token of a session against those of one server that nothing happens to; the digest of its history."""
    session = await runtime.create_session()
    history = array("I")
    for turn in seen.turns:
        await session.append(turn.given)
        drawn: list[int] = []
        async with session.generate(len(turn.drawn), temperature=0.8, seed=turn.seed) as events:
            async for event in events:
                if isinstance(event, Token):
                    drawn.append(event.token_id)
        assert [one if one != UNHEARD else other for one, other in zip(turn.drawn, drawn, strict=True)] == drawn
        history.extend([*turn.given, *drawn])
    await session.close()
    return blake2b(history.tobytes()).digest()


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
    told = sum((seen.told for seen in everyone), Counter())
    tokens = [token for seen in everyone for turn in seen.turns for token in turn.drawn]
    record(
        f"{SESSIONS} sessions on {REPLICAS} replicas of Ray Serve: {KILLS} times `kill -9` at random, a replica more and one "
        "less, a rolling upgrade",
        f"0 of {len(tokens) - tokens.count(UNHEARD)} acknowledged tokens lost or changed, every history one server's; "
        f"{tokens.count(UNHEARD)} more were recorded and not heard of; asked "
        f"again after {', '.join(f'{count} {name}' for name, count in sorted(told.items()))}; "
        f"{sum(seen.reread for seen in everyone)} tokens read again",
    )
