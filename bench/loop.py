"""What the event loop costs: a round trip to an actor, a hand-over to the worker thread, and a token but for its forward."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import trio

from actors import Runtime, SessionHandle
from actors.engine_thread import EngineThread
from actors.tree import open_sessions
from bench.figures import figure, repeats
from bench.models import QWEN3_06B
from bench.scenario import Result, Setup
from runtime.engine import Engine, EngineFacts, load_engine
from runtime.events import Token
from runtime.metrics import Metrics
from runtime.models import find_model
from runtime.rows import RowBatch
from runtime.settings import Settings
from runtime.slab import SlabPool
from runtime.text import Text

BUDGET_S = 20
CALLS = 2_000


class ClockedEngine:
    """An engine that adds up the seconds spent in its forwards."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.seconds = 0.0

    @property
    def facts(self) -> EngineFacts:
        return self._engine.facts

    def new_pool(self, count: int) -> SlabPool:
        return self._engine.new_pool(count)

    def forward(self, batch: RowBatch) -> tuple[Token, ...]:
        began = time.perf_counter()
        try:
            return self._engine.forward(batch)
        finally:
            self.seconds += time.perf_counter() - began


@asynccontextmanager
async def clocked_runtime(settings: Settings) -> AsyncIterator[tuple[Runtime, ClockedEngine, EngineThread]]:
    """As `open_runtime`, with a clock around the engine."""
    directory = find_model(settings.model)
    with EngineThread() as thread:
        engine = ClockedEngine(await thread.run(load_engine, settings, directory))
        async with open_sessions(settings, engine, thread, Text.load(directory), Metrics()) as runtime:
            yield runtime, engine, thread


async def microseconds(call: Callable[[], Awaitable[object]]) -> float:
    """Of one of many calls."""
    began = time.perf_counter()
    for _ in range(CALLS):
        await call()
    return 1e6 * (time.perf_counter() - began) / CALLS


async def step(session: SessionHandle, engine: ClockedEngine, count: int) -> tuple[float, float]:
    """Milliseconds of a token, and the share of them that was not spent in forwards; of all tokens but the first."""
    async with session.generate(count + 1) as events:
        async for event in events:
            if isinstance(event, Token):
                break
        began, before = time.perf_counter(), engine.seconds
        async for event in events:
            if isinstance(event, Token):
                ended, inside = time.perf_counter(), engine.seconds
    seconds = ended - began
    return 1000 * seconds / count, 1 - (inside - before) / seconds


async def run(setup: Setup) -> Result:
    """Round trip and hand-over in microseconds, and what a token costs besides its forward."""
    count = 8 if setup.model == QWEN3_06B else 200
    steps, shares, besides = [], [], []
    async with clocked_runtime(replace(setup.settings, capacity=1, max_concurrent=1)) as (runtime, engine, thread):
        session = await runtime.create_session()
        await session.append([5, 6, 7, 8])
        trips = [await microseconds(session.info) for _ in repeats(2)]
        hand_overs = [await microseconds(partial(thread.run, _nothing)) for _ in repeats(2)]
        checkpoints = [await microseconds(trio.lowlevel.checkpoint) for _ in repeats(2)]
        await step(session, engine, 1)
        for _ in repeats(BUDGET_S):
            milliseconds, share = await step(session, engine, count)
            steps.append(milliseconds)
            shares.append(100 * share)
            besides.append(1000 * milliseconds * share)
    return Result(
        engine.facts.slab.window,
        {
            "a pass of trio's scheduler": figure("us", checkpoints),
            "a round trip to a session": figure("us", trips),
            "a hand-over to the worker thread and back": figure("us", hand_overs),
            "a token": figure("ms", steps),
            "a token but for its forward": figure("us", besides),
            "share of a token that is not its forward": figure("%", shares),
        },
    )


def _nothing() -> None:
    pass
