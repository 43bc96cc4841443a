"""Decode and prefill: ours, the floor, and what people run today, one after the other, on as many threads as there are cores."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
import trio

from actors import Runtime, open_runtime
from bench.figures import Figure, figure, over, repeats
from bench.floor import floors, memory_floor
from bench.peers.processes import PeerFailed, installed, measured, speeds
from bench.peers.speeds import GENERATED_TOKENS, PREFILL, PREFILL_TOKENS, decoding, prompt
from bench.scenario import Result, Setup
from runtime.dtypes import dtype_named
from runtime.engine import EngineFacts
from runtime.engine.machine import Level, level
from runtime.errors import InvalidSetting
from runtime.events import Token
from runtime.models import find_model
from runtime.settings import Settings

BUDGET_S = 30
WINDOW = 1020
LABEL = "perennial"
BF16 = "llama.cpp BF16"


@dataclass(frozen=True, slots=True)
class Mode:
    """What is changed of the settings, and how many streams are measured under it."""

    changes: Mapping[str, Any]
    streams: tuple[int, ...]


MODES = {
    "strict": Mode({}, (1, 4, 8, 32)),
    "fast": Mode({"determinism": "fast"}, (1,)),
    "int8": Mode({"weights": "int8"}, (1, 4, 8)),
    "int4": Mode({"weights": "int4"}, (1, 4, 8)),
}


def _memory_of(mode: str) -> str:
    return f"memory's floor, {mode}"


async def decode(runtime: Runtime, streams: int) -> float:
    """Tokens a second of so many sessions that decode side by side: what each does, added up."""
    speeds: list[float] = []
    begun = 0
    all_decode = trio.Event()

    async def run(number: int) -> None:
        nonlocal begun
        session = await runtime.create_session()
        await session.append(prompt(number))
        async with session.generate(GENERATED_TOKENS + 2) as events:
            await anext(events)
            begun += 1
            if begun == streams:
                all_decode.set()
            await all_decode.wait()
            # This one may have been drawn while others read their prompts.
            await anext(events)
            began = ended = time.perf_counter()
            async for event in events:
                if isinstance(event, Token):
                    ended = time.perf_counter()
        speeds.append(GENERATED_TOKENS / (ended - began))
        await session.close()

    async with trio.open_nursery() as nursery:
        for number in range(streams):
            nursery.start_soon(run, number)
    return sum(speeds)


async def prefill(runtime: Runtime, count: int) -> float:
    """Tokens a second at which a new session reads so many."""
    session = await runtime.create_session()
    began = time.perf_counter()
    await session.append(prompt(0, count))
    seconds = time.perf_counter() - began
    await session.close()
    return count / seconds


async def ours(settings: Settings, streams: Sequence[int]) -> tuple[EngineFacts, dict[str, Figure]]:
    """What the engine is, and tokens a second by what is done. Raises InvalidSetting."""
    taken: dict[str, list[float]] = {PREFILL: [], **{decoding(count): [] for count in streams}}
    async with open_runtime(settings) as runtime:
        await decode(runtime, 1)
        for _ in repeats(BUDGET_S):
            taken[PREFILL].append(await prefill(runtime, PREFILL_TOKENS))
            for count in streams:
                taken[decoding(count)].append(await decode(runtime, count))
        return runtime.facts, {name: figure("tokens/s", values) for name, values in taken.items()}


async def run(setup: Setup) -> Result:
    """Tokens a second of everyone, then ours against the floor, against ourselves and against the others."""
    result = Result(WINDOW)
    everyone: dict[str, dict[str, Figure]] = {}
    widest = max(max(mode.streams) for mode in MODES.values())
    settings = replace(setup.settings, capacity=widest, max_concurrent=1, window=WINDOW)
    # What is computed in torch: without instructions for 16-bit numbers these are a type to hold keys and values in.
    dtype = "" if level() >= Level.AVX512_BF16 else "float32"
    for name, mode in MODES.items():
        try:
            facts, everyone[name] = await ours(replace(settings, **mode.changes), mode.streams)
        except InvalidSetting as error:
            result.remarks.append(f"{LABEL} {name}: {error}")
        else:
            dtype = dtype or facts.dtype
            result.remarks.append(f"{LABEL} {name}: {facts.backend}, {facts.dtype}, weights {facts.weights}")
            everyone[_memory_of(name)] = {decoding(1): memory_floor(facts, setup.settings.model)}
    torch.set_num_threads(psutil.cpu_count(logical=False) or 1)
    everyone["floor"] = floors(setup.settings.model, dtype_named(dtype), MODES["strict"].streams)
    await _measure_peers(setup, dtype, everyone, result)
    for who, figures in everyone.items():
        label = f"{LABEL} {who}" if who in MODES else who
        result.figures |= {f"{label}: {name}": one for name, one in figures.items()}
    result.figures |= compared(everyone)
    return result


async def _measure_peers(setup: Setup, dtype: str, everyone: dict[str, dict[str, Figure]], result: Result) -> None:
    versions = await installed(setup.peers)
    directory = str(find_model(setup.settings.model))
    for peer in speeds(directory, psutil.cpu_count(logical=False) or 1, dtype):
        if peer.package not in versions:
            result.remarks.append(f"{peer.label}: {peer.package} is not installed for {setup.peers}")
            continue
        try:
            everyone[peer.label] = await measured(setup.peers, peer)
            result.peers[peer.package] = versions[peer.package]
        except PeerFailed as error:
            result.remarks.append(f"{peer.label}: {error}")


def compared(everyone: Mapping[str, Mapping[str, Figure]]) -> dict[str, Figure]:
    """The ratios that targets are about, as far as both sides were measured."""
    one = decoding(1)
    pairs = {
        "a step of 1 stream over the floor's": ("floor", one, "strict", one),
        "8 streams over 1": ("strict", decoding(8), "strict", one),
        "32 streams over 1": ("strict", decoding(32), "strict", one),
        "prefill, strict over fast": ("strict", PREFILL, "fast", PREFILL),
        "prefill, fast over the floor": ("fast", PREFILL, "floor", PREFILL),
        **{f"a step of 1 stream over its memory's, {mode}": (_memory_of(mode), one, mode, one) for mode in MODES},
        **{
            f"{done}, {mode} over {peer}": (mode, done, peer, done)
            for mode, peer in (
                ("strict", BF16),
                ("fast", BF16),
                ("int8", "llama.cpp Q8_0"),
                ("int4", "llama.cpp Q4_K_M"),
            )
            for done in (PREFILL, one, decoding(4), decoding(8))
        },
    }
    return {
        name: over(everyone[upper][above], everyone[lower][below])
        for name, (upper, above, lower, below) in pairs.items()
        if above in everyone.get(upper, {}) and below in everyone.get(lower, {})
    }
