"""The same GGUF files here and in llama.cpp: how long a load takes, what it takes of memory, decode and a prompt."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import psutil
import trio

from bench.figures import Figure, figure, over, pooled
from bench.peers.processes import Peer, PeerFailed, installed, made_gguf, measured
from bench.peers.speeds import LOAD, MEMORY, PREFILL, decoding
from bench.scenario import Result, Setup
from bench.speed import LABEL, WINDOW, ours

KINDS = ("Q8_0", "Q4_0", "Q4_K_M")
STREAMS = (1, 4, 8)
# Of both, one after the other.
ROUNDS = 3
THEIRS = "llama.cpp"


async def run(setup: Setup) -> Result:
    """Each file measured by both in turn, for the machine's pace drifts; then ours over theirs of each turn."""
    result = Result(WINDOW)
    versions = await installed(setup.peers)
    threads = str(psutil.cpu_count(logical=False) or 1)
    for kind, file in (await _files(setup, result)).items():
        size = (await trio.Path(file).stat()).st_size / 2**20
        result.figures[f"{kind}: the file"] = figure("MiB", [size])
        settings = replace(setup.settings, model=file, capacity=max(STREAMS), max_concurrent=1, window=WINDOW)
        rounds: list[dict[str, Figure]] = []
        for _ in range(ROUNDS):
            facts, mine = await ours(settings, STREAMS)
            everyone = {LABEL: mine | await _loaded(file, "again")}
            try:
                everyone[THEIRS] = await measured(
                    setup.peers, Peer(THEIRS, THEIRS, "llama_cpp_decode", (file, threads))
                )
                result.peers |= {name: version for name, version in versions.items() if name == "llama-cpp-python"}
            except PeerFailed as error:
                result.remarks.append(f"{THEIRS} {kind}: {error}")
            figures = {f"{who}, {kind}: {name}": one for who, each in everyone.items() for name, one in each.items()}
            over_file = figure("x", [everyone[LABEL][MEMORY].median / size])
            rounds.append(figures | compared(kind, everyone) | {f"{kind}, {MEMORY}, over the file": over_file})
        # What its probes find is known by now.
        first = await _loaded(file, "first")
        result.figures |= {f"{LABEL}, {kind}: {name}": one for name, one in first.items()}
        result.figures |= {name: pooled([one[name] for one in rounds if name in one]) for name in rounds[0]}
        result.remarks.append(
            f"{LABEL} {kind}: {facts.backend}, {facts.dtype}, weights {facts.weights}; {'; '.join(facts.tensors)}"
        )
    return result


async def _loaded(file: str, how: str) -> dict[str, Figure]:
    return await measured(sys.executable, Peer(LABEL, LABEL, "gguf_load", (file, how)))


async def _files(setup: Setup, result: Result) -> dict[str, str]:
    """Paths by the kind of weights: the model's own file, or those that llama.cpp makes of it."""
    model = setup.settings.model
    if model.endswith(".gguf"):
        return {Path(model).stem.rpartition(".")[2]: model}
    found = {}
    for kind in KINDS:
        try:
            found[kind] = await made_gguf(setup.peers, model, kind)
        except PeerFailed as error:
            result.remarks.append(f"{kind}: {error}")
    return found


def compared(kind: str, everyone: Mapping[str, Mapping[str, Figure]]) -> dict[str, Figure]:
    """Ours over theirs, of what both were measured at."""
    mine, theirs = everyone[LABEL], everyone.get(THEIRS, {})
    names = (LOAD, MEMORY, PREFILL, *map(decoding, STREAMS))
    return {
        f"{kind}, {name}, over {THEIRS}'s": over(mine[name], theirs[name])
        for name in names
        if name in mine.keys() & theirs.keys()
    }
