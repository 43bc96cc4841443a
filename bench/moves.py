"""What it costs that a session moves to another server: seconds to leave and to take it, bytes, requests to the store."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import trio

from actors import Runtime
from actors.engine_thread import EngineThread
from actors.tree import open_sessions
from bench.figures import Figure, figure
from bench.scenario import Result, Setup
from runtime.durable import HistoryIdentity, SharedStore, SlabIdentity
from runtime.durable.objects import Listed, Objects, open_objects
from runtime.engine import Engine, load_engine
from runtime.events import Token
from runtime.metrics import Metrics
from runtime.settings import Settings
from runtime.text import Text

LENGTHS = (1_000, 8_000)
ROUNDS = 3
DRAWN = 64


class CountedObjects(Objects):
    """Counts requests by their kind, and bytes."""

    def __init__(self, inner: Objects) -> None:
        self._inner = inner
        self.requests: dict[str, int] = {}
        self.sent = self.received = 0

    def create(self, key: str, content: bytes) -> None:
        self._count("create", sent=len(content))
        self._inner.create(key, content)

    def put(self, key: str, content: bytes | memoryview) -> None:
        self._count("put", sent=len(content))
        self._inner.put(key, content)

    def read(self, key: str) -> bytes:
        content = self._inner.read(key)
        self._count("read", received=len(content))
        return content

    def has(self, key: str) -> bool:
        self._count("has")
        return self._inner.has(key)

    def list(self, prefix: str) -> list[Listed]:
        self._count("list")
        return self._inner.list(prefix)

    def delete(self, keys: Sequence[str]) -> None:
        self._count("delete")
        self._inner.delete(keys)

    def _count(self, kind: str, sent: int = 0, received: int = 0) -> None:
        self.requests[kind] = self.requests.get(kind, 0) + 1
        self.sent += sent
        self.received += received

    @property
    def words(self) -> str:
        return ", ".join(f"{count} {kind}" for kind, count in sorted(self.requests.items()))


@asynccontextmanager
async def server(
    settings: Settings, engine: Engine, thread: EngineThread, text: Text, objects: Objects, kernels: str
) -> AsyncIterator[Runtime]:
    """One of several servers, as far as the store can tell, on one engine."""
    facts = engine.facts
    of_slab = (facts.slab.dtype, facts.slab.sink, facts.slab.window, facts.slab.slots)
    identity = SlabIdentity("bench", facts.backend, kernels, facts.weights, facts.dtype, *of_slab)
    store = SharedStore(objects, HistoryIdentity("bench", facts.vocabulary), identity)
    async with open_sessions(settings, engine, thread, text, Metrics(), store=store) as runtime:
        yield runtime


async def first_token_s(runtime: Runtime, session_id: str) -> float:
    """From the call to the first token of a session that has to be taken."""
    began = time.perf_counter()
    async with runtime.find_session(session_id).generate(1) as events:
        async for event in events:
            if isinstance(event, Token):
                return time.perf_counter() - began
    raise AssertionError("no token came")


async def drawing_s(runtime: Runtime, is_kept: bool) -> float:
    """Seconds a token of one stream."""
    session = await runtime.create_session(is_kept=is_kept)
    await session.append(range(5, 25))
    began = 0.0
    async with session.generate(DRAWN + 1) as events:
        async for event in events:
            if isinstance(event, Token) and not began:
                began = time.perf_counter()
    seconds = (time.perf_counter() - began) / DRAWN
    await session.close()
    return seconds


async def run(setup: Setup) -> Result:
    """Moves between servers of one kernel class and of two, on a store in the file system."""
    longest = max(LENGTHS) + 2 * DRAWN
    settings = replace(setup.settings, window=longest - setup.settings.sink, capacity=1, max_concurrent=1)
    directory = Path(settings.model)
    result = Result(window=settings.window)
    text = Text.load(directory)
    with EngineThread() as thread, tempfile.TemporaryDirectory() as folder:
        engine = await thread.run(load_engine, settings, directory)
        store = await trio.to_thread.run_sync(open_objects, f"file://{folder}/bucket")
        for length in LENGTHS:
            figures = await moved(settings, engine, thread, text, store, length, result)
            result.figures |= {f"{name}, {length:,} tokens": found for name, found in figures.items()}
        async with server(settings, engine, thread, text, store, "one") as runtime:
            for name, is_kept in (("kept", True), ("not kept", False)):
                found = [1000 * await drawing_s(runtime, is_kept) for _ in range(ROUNDS)]
                result.figures[f"a token of a session that is {name}"] = figure("ms", found)
    result.remarks.append(
        "The store is a folder of this machine: over a network each request takes some milliseconds more."
    )
    return result


async def moved(
    settings: Settings, engine: Engine, thread: EngineThread, text: Text, store: Objects, length: int, result: Result
) -> dict[str, Figure]:
    """Leaves a session of so many tokens at one server, and takes it at another, of its class and of another one."""
    chance = random.Random(length)
    tokens = [chance.randrange(engine.facts.vocabulary) for _ in range(length)]
    leaving: list[float] = []
    taking: list[float] = []
    reading: list[float] = []
    came = CountedObjects(store)
    for number in range(ROUNDS):
        async with server(settings, engine, thread, text, store, "one") as runtime:
            session = await runtime.create_session()
            await session.append(tokens)
            ended = time.perf_counter()
        leaving.append(time.perf_counter() - ended)
        came = CountedObjects(store)
        async with server(settings, engine, thread, text, came, "one") as runtime:
            taking.append(await first_token_s(runtime, session.id))
        if number == 0:
            async with server(settings, engine, thread, text, store, "another") as runtime:
                reading.append(await first_token_s(runtime, session.id))
                await runtime.find_session(session.id).close()
    result.remarks.append(f"{length:,} tokens taken with {came.words}")
    return {
        "leaving": figure("s", leaving),
        "first token with the slab": figure("s", taking),
        "first token by reading again": figure("s", reading),
        "bytes taken": figure("MB", [came.received / 1e6]),
    }
