"""A long append beside streams: what it costs them, and what both together get done."""

from __future__ import annotations

import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import trio

from actors import Runtime, SessionHandle, open_runtime
from bench.figures import Figure, figure, repeats
from bench.peers.speeds import prompt
from bench.scenario import Result, Setup
from bench.speed import prefill
from runtime.events import Token

T = TypeVar("T")

BUDGET_S = 50
STREAMS = 4
WINDOW = 1020
ALONE_S = 5.0
MOST_APPENDED = 8_000
# A machine that is too slow for all of them appends as many tokens as it can in this time.
LONGEST_APPEND_S = 10.0
_PACE_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Streaming:
    """Milliseconds between the tokens of a stream, for every pair, and tokens a second of all streams."""

    gaps_ms: list[float]
    tokens_a_second: float


async def streaming_while(runtime: Runtime, work: Callable[[], Awaitable[T]]) -> tuple[Streaming, T]:
    """What `STREAMS` sessions do while `work` runs, which begins once all of them stream; and what it returned."""
    gaps: list[float] = []
    begun = 0
    all_stream = trio.Event()
    is_at_work = False

    async def stream(session: SessionHandle) -> None:
        nonlocal begun
        async with session.generate(2**30) as events:
            before: float | None = None
            async for event in events:
                if not isinstance(event, Token):
                    continue
                now = time.perf_counter()
                if before is None:
                    begun += 1
                    if begun == STREAMS:
                        all_stream.set()
                elif is_at_work:
                    gaps.append(1000 * (now - before))
                before = now

    sessions = [await runtime.create_session() for _ in range(STREAMS)]
    for number, session in enumerate(sessions):
        await session.append(prompt(number))
    async with trio.open_nursery() as nursery:
        for session in sessions:
            nursery.start_soon(stream, session)
        await all_stream.wait()
        is_at_work = True
        began = time.perf_counter()
        worked = await work()
        seconds = time.perf_counter() - began
        nursery.cancel_scope.cancel()
    for session in sessions:
        await session.close()
    return Streaming(gaps, len(gaps) / seconds), worked


@dataclass(frozen=True, slots=True)
class Round:
    """Streams alone, an append alone, and both."""

    streams: Streaming
    append: float
    streams_beside: Streaming
    append_beside: float

    @property
    def median_ms(self) -> float:
        return statistics.median(self.streams.gaps_ms)

    @property
    def p99_beside_ms(self) -> float:
        gaps = sorted(self.streams_beside.gaps_ms)
        return gaps[int(0.99 * (len(gaps) - 1))]

    @property
    def share(self) -> float:
        """Tokens a second of both together over the sum of both alone."""
        together = self.streams_beside.tokens_a_second + self.append_beside
        return together / (self.streams.tokens_a_second + self.append)

    @property
    def paces(self) -> float:
        """What each keeps of its pace alone, added up: 1 where two tasks share a machine and neither gains."""
        return self.streams_beside.tokens_a_second / self.streams.tokens_a_second + self.append_beside / self.append


async def one_round(runtime: Runtime, count: int) -> Round:
    streams, _ = await streaming_while(runtime, partial(trio.sleep, ALONE_S))
    alone = await prefill(runtime, count)
    return Round(streams, alone, *await streaming_while(runtime, partial(prefill, runtime, count)))


async def run(setup: Setup) -> Result:
    """Several rounds on one runtime."""
    settings = replace(setup.settings, capacity=STREAMS + 1, max_concurrent=1, window=WINDOW)
    async with open_runtime(settings) as runtime:
        count = min(MOST_APPENDED, int(await prefill(runtime, _PACE_TOKENS) * LONGEST_APPEND_S))
        rounds = [await one_round(runtime, count) for _ in repeats(BUDGET_S)]

    def of(unit: str, value: Callable[[Round], float]) -> Figure:
        return figure(unit, [value(one) for one in rounds])

    return Result(
        WINDOW,
        {
            "tokens appended": figure("tokens", [count]),
            f"between tokens, median, {STREAMS} streams alone": of("ms", lambda one: one.median_ms),
            f"between tokens, p99, {STREAMS} streams beside the append": of("ms", lambda one: one.p99_beside_ms),
            "p99 beside the append over the median alone": of("x", lambda one: one.p99_beside_ms / one.median_ms),
            f"{STREAMS} streams alone": of("tokens/s", lambda one: one.streams.tokens_a_second),
            f"{STREAMS} streams beside the append": of("tokens/s", lambda one: one.streams_beside.tokens_a_second),
            "the append alone": of("tokens/s", lambda one: one.append),
            "the append beside the streams": of("tokens/s", lambda one: one.append_beside),
            "all tokens together over the sum of both alone": of("x", lambda one: one.share),
            "what each keeps of its pace alone, added up": of("x", lambda one: one.paces),
        },
    )
