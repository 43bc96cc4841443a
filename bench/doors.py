"""What Ray Serve costs before one server, and what strict routing saves before three: seconds at the client."""

from __future__ import annotations

import dataclasses
import http.client
import json
import random
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import trio

from api.client import Client, connect
from bench.figures import Figure, figure, over
from bench.ray_cluster import cluster, configuration, free_ports
from bench.scenario import Result, Setup
from bench.servers import serving
from runtime.errors import NotServing, SessionFailed, SessionMoved, StartError
from runtime.events import Done, Token
from runtime.settings import Settings

KEY = LABEL = "bench"
WINDOW = 508
LEASE_S = 2
CALLS, FIRSTS, DRAWN, STREAMS, REPEATS = 200, 30, 256, 8, 3
REPLICAS, SESSIONS, ROUTED_S = 3, 24, 40.0
# Serve's own choice, which knows nothing of sessions: the less busy one of two replicas.
_NO_ROUTING = "ray.serve._private.request_router:PowerOfTwoChoicesRequestRouter"


async def run(setup: Setup) -> Result:
    """Both doors of a plain server and of one replica, and turns of sessions on three replicas, routed and not."""
    if find_spec("ray") is None:
        raise StartError("Ray Serve is not installed: pip install 'perennial[ray]'")
    result = Result(window=WINDOW)
    plain, served = await at_plain(setup.settings), await at_serve(setup.settings)
    for name, one in plain.items():
        result.figures |= {
            f"{name}, plain": one,
            f"{name}, Serve": served[name],
            f"{name}, ratio": over(served[name], one),
        }
    for name, router in (("strict", {}), ("none", {"request_router_config": {"request_router_class": _NO_ROUTING}})):
        found = await routed(setup.settings, router)
        result.figures |= {f"{what}, routing {name}": one for what, one in found.items()}
    result.remarks.append(
        f"Replicas, Serve's proxy and controller and the client share this machine; {SESSIONS} sessions on {REPLICAS} "
        f"replicas, state_lease_s {LEASE_S}, on a store in a folder."
    )
    return result


def _arguments(settings: Settings, folder: Path, **changes: object) -> dict[str, object]:
    ours = {"state_dir": f"file://{folder}/store", "window": WINDOW, "capacity": SESSIONS, "state_lease_s": LEASE_S}
    return {
        "model": settings.model,
        "device": settings.device,
        "api_keys": KEY,
        "model_label": LABEL,
        **ours,
        **changes,
    }


async def at_plain(settings: Settings) -> dict[str, Figure]:
    (port,) = free_ports(1)
    with tempfile.TemporaryDirectory() as folder:
        arguments = _arguments(settings, Path(folder)) | {"api_keys": (KEY,)}
        changed = dataclasses.replace(settings, **arguments)  # type: ignore[arg-type]
        async with serving(changed, "--bind", f"127.0.0.1:{port}", "--api_keys", KEY) as (address, _):
            return await at_doors(address, port)


async def at_serve(settings: Settings) -> dict[str, Figure]:
    async with _deployed(settings, 1) as (address, port):
        return await at_doors(address, port)


@asynccontextmanager
async def _deployed(settings: Settings, replicas: int, **deployment: Any) -> AsyncIterator[tuple[str, int]]:
    """gRPC address and HTTP port of a local cluster with so many replicas, for the block."""
    http_port, grpc_port = free_ports(2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        configured = configuration(
            http_port, grpc_port, _arguments(settings, folder), num_replicas=replicas, **deployment
        )
        async with cluster(folder) as running:
            await running.deploy(configured)
            await running.settled(replicas)
            yield f"127.0.0.1:{grpc_port}", http_port


async def at_doors(address: str, port: int) -> dict[str, Figure]:
    """Milliseconds of single calls and tokens a second of streams at both doors of a server."""
    async with connect(address, key=KEY) as client:
        session = await client.create_session()
        await session.append(range(5, 25))
        await drawn(client, 8)
        calls = [1000 * await _timed(session.info) for _ in range(CALLS)]

        async def turn() -> None:
            await session.append([5, 6])
            async with session.generate(1) as events:
                async for _ in events:
                    pass

        firsts = [1000 * await _timed(turn) for _ in range(FIRSTS)]
        alone = [DRAWN / await _timed(lambda: drawn(client, DRAWN)) for _ in range(REPEATS)]
        beside = [STREAMS * DRAWN / await _timed(lambda: side_by_side(client)) for _ in range(REPEATS)]
    completions = await trio.to_thread.run_sync(completion_ms, port)
    return {
        "GetSessionInfo": figure("ms", calls),
        "append of 2 tokens and the next one": figure("ms", firsts),
        "one stream": figure("tokens/s", alone),
        f"{STREAMS} streams": figure("tokens/s", beside),
        "chat completion of 1 token, HTTP": figure("ms", completions),
    }


async def _timed(call: Callable[[], Awaitable[object]]) -> float:
    began = time.perf_counter()
    await call()
    return time.perf_counter() - began


async def drawn(client: Client, count: int) -> None:
    async with client.session() as session:
        await session.append(range(5, 25))
        async with session.generate(count) as events:
            async for _ in events:
                pass


async def side_by_side(client: Client) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(STREAMS):
            nursery.start_soon(drawn, client, DRAWN)


def completion_ms(port: int) -> list[float]:
    """Milliseconds of completions on one connection."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = json.dumps({"model": LABEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1})
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    found = []
    for _ in range(FIRSTS + 1):
        began = time.perf_counter()
        connection.request("POST", "/v1/chat/completions", body, headers)
        reply = connection.getresponse()
        reply.read()
        if reply.status != 200:
            raise RuntimeError(f"a completion was answered with {reply.status}")
        found.append(1000 * (time.perf_counter() - began))
    connection.close()
    return found[1:]


@dataclasses.dataclass
class Turns:
    """What the sessions' turns took, how often they had to ask again, and how many tokens were read again for them."""

    seconds: list[float] = dataclasses.field(default_factory=list)
    asked_again: int = 0
    reread: int = 0


async def routed(settings: Settings, deployment: dict[str, Any]) -> dict[str, Figure]:
    """Turns of many sessions on three replicas."""
    turns = Turns()
    async with _deployed(settings, REPLICAS, **deployment) as (address, _), connect(address, key=KEY) as client:
        with trio.move_on_after(ROUTED_S):
            async with trio.open_nursery() as nursery:
                for number in range(SESSIONS):
                    nursery.start_soon(take_turns, client, number, turns)
    count = len(turns.seconds)
    return {
        "turns": figure("turns/s", [count / ROUTED_S]),
        "a turn of 10 tokens read and 10 drawn": figure("s", turns.seconds),
        "asked again": figure("times a turn", [turns.asked_again / count]),
        "read again": figure("tokens a turn", [turns.reread / count]),
    }


async def take_turns(client: Client, number: int, turns: Turns) -> None:
    chance = random.Random(number)
    session = await client.create_session()
    while True:
        began, drawn_tokens = time.perf_counter(), 0
        given = [chance.randrange(3, 2000) for _ in range(10)]
        while True:
            try:
                turns.reread += (await session.append(given)).reread_token_count
                break
            except (SessionMoved, NotServing, SessionFailed):
                turns.asked_again += 1
                await trio.sleep(0.1)
        while drawn_tokens < 10:
            try:
                async with session.generate(10 - drawn_tokens) as events:
                    async for event in events:
                        drawn_tokens += isinstance(event, Token)
                        turns.reread += event.reread_token_count if isinstance(event, Done) else 0
            except (SessionMoved, NotServing, SessionFailed):
                turns.asked_again += 1
                await trio.sleep(0.1)
        turns.seconds.append(time.perf_counter() - began)
        await trio.sleep(chance.expovariate(2))
