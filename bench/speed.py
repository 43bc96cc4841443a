"""Decode and prefill, against the floor: the model's linears alone, reading their weights once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import trio
from torch import nn
from transformers import AutoModelForCausalLM

from actors import Runtime, SessionHandle, open_runtime
from bench.flatness import spread
from runtime.events import Token
from runtime.models import find_model
from runtime.settings import Settings

PROMPT, GENERATED = 64, 32
PREFILL = 512
SESSIONS = (1, 8, 32)
REPEATS = 5


async def tokens_a_second(runtime: Runtime, sessions: int) -> float:
    """Of `sessions` that decode side by side, from the moment when all do to the moment when the first has done."""
    began: list[float] = []
    ended: list[float] = []
    made = 0
    all_decode = trio.Event()

    async def run(number: int) -> None:
        nonlocal made
        session = await runtime.create_session()
        await session.append([3 + (number + 7 * index) % 1000 for index in range(PROMPT)])
        async with session.generate(GENERATED) as events:
            await anext(events)
            began.append(time.perf_counter())
            if len(began) == sessions:
                all_decode.set()
            await all_decode.wait()
            async for event in events:
                if isinstance(event, Token) and not ended:
                    made += 1
        ended.append(time.perf_counter())
        await session.close()

    async with trio.open_nursery() as nursery:
        for number in range(sessions):
            nursery.start_soon(run, number)
    return made / (min(ended) - max(began))


async def prefill_tokens_a_second(session: SessionHandle) -> float:
    began = time.perf_counter()
    await session.append([3 + 11 * index % 1000 for index in range(PREFILL)])
    return PREFILL / (time.perf_counter() - began)


def floor_tokens_a_second(linears: Sequence[nn.Linear], rows: int) -> float:
    """What the linears alone do with so many rows at once."""
    inputs = {
        linear.in_features: torch.randn(rows, linear.in_features, dtype=linear.weight.dtype) for linear in linears
    }
    with torch.inference_mode():
        began = time.perf_counter()
        for linear in linears:
            linear(inputs[linear.in_features])
        return rows / (time.perf_counter() - began)


def median_of(repeats: int, measure: Callable[[], float]) -> dict[str, float]:
    """Of some measurements after one that warms up."""
    measure()
    return spread([measure() for _ in range(repeats)])


def floors(settings: Settings, dtype: torch.dtype) -> dict[str, Any]:
    model: Any = AutoModelForCausalLM.from_pretrained(find_model(settings.model), dtype=dtype)
    everything = [module for module in model.modules() if isinstance(module, nn.Linear)]
    layers = [module for module in model.get_decoder().modules() if isinstance(module, nn.Linear)]
    return {
        "decode": {rows: median_of(REPEATS, partial(floor_tokens_a_second, everything, rows)) for rows in SESSIONS},
        # Only the last token of a prompt needs the head.
        "prefill": median_of(REPEATS, partial(floor_tokens_a_second, layers, 256)),
    }


async def ours(settings: Settings) -> dict[str, Any]:
    decode: dict[int, list[float]] = {count: [] for count in SESSIONS}
    prefill: list[float] = []
    async with open_runtime(settings) as runtime:
        for repeat in range(REPEATS + 1):
            for count in SESSIONS:
                speed = await tokens_a_second(runtime, count)
                if repeat:
                    decode[count].append(speed)
            session = await runtime.create_session()
            speed = await prefill_tokens_a_second(session)
            if repeat:
                prefill.append(speed)
            await session.close()
        dtype = runtime.facts.dtype
    return {
        "dtype": dtype,
        "decode": {count: spread(speeds) for count, speeds in decode.items()},
        "prefill": spread(prefill),
    }


async def run(settings: Settings) -> dict[str, Any]:
    """Tokens a second: ours under strict, and the floor in the same type, each a median of some runs."""
    wide = replace(settings, capacity=max(SESSIONS), max_concurrent=1, window=1020)
    strict, fast = [await ours(replace(wide, determinism=determinism)) for determinism in ("strict", "fast")]
    floor = floors(settings, getattr(torch, strict["dtype"]))

    def median(of: dict[str, Any]) -> float:
        return float(of["median"])

    one = median(strict["decode"][1])
    return {
        "threads": torch.get_num_threads(),
        "unit": "tokens a second",
        "strict": strict,
        "fast": fast,
        "floor": floor,
        "ratios": {
            "step of one session over the floor's": median(floor["decode"][1]) / one,
            **{f"{count} sessions over one": median(strict["decode"][count]) / one for count in SESSIONS[1:]},
            "prefill, strict over fast": median(strict["prefill"]) / median(fast["prefill"]),
            "prefill, fast over the floor": median(fast["prefill"]) / median(floor["prefill"]),
        },
    }
