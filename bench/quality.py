"""What fewer bits cost: perplexity of a text that everybody knows, in each form of weights and of keys and values."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
import trio

from bench.figures import Figure, figure
from bench.peers.processes import PeerFailed, installed, measured, qualities
from bench.peers.speeds import PERPLEXITY
from bench.scenario import Result, Setup
from runtime.engine import load_engine
from runtime.errors import PerennialError
from runtime.events import Sampling
from runtime.models import find_model
from runtime.rows import Row, RowBatch
from runtime.sampling import Draw
from runtime.settings import Settings
from runtime.text import Text

# The first pages of Alice's Adventures in Wonderland (Lewis Carroll, 1865), in the public domain.
TEXT = Path(__file__).parent / "texts" / "alice.txt"
FULL = "16 bits"
FORMS: Mapping[str, Mapping[str, Any]] = {
    FULL: {"weights": "none"},
    "int8": {"weights": "int8"},
    "int4": {"weights": "int4"},
    **{
        f"{FULL}, kv {kv_dtype}": {"weights": "none", "kv_dtype": kv_dtype, "backend": "openvino"}
        for kv_dtype in ("float32", "bfloat16", "float16", "int8")
    },
}
_PAIRS = {"int8": "llama.cpp Q8_0", "int4": "llama.cpp Q4_0", FULL: "llama.cpp BF16"}
_DRAWING = Draw(Sampling())


def perplexity(settings: Settings, tokens: Sequence[int]) -> tuple[float, str]:
    """That of all tokens but the first, read by one session, and what the engine is. Raises PerennialError."""
    engine: Any = load_engine(settings, find_model(settings.model))
    facts = engine.facts
    assert len(tokens) <= facts.slab.visible
    slab = engine.new_pool(1).acquire()
    lost = 0.0
    for start in range(0, len(tokens) - 1, facts.row_tile):
        given, expected = tokens[start : start + facts.row_tile], tokens[start + 1 : start + 1 + facts.row_tile]
        rows = tuple(Row(slab, start + n, token, _DRAWING) for n, token in enumerate(given[: len(expected)]))
        shares = torch.log_softmax(engine.logits(RowBatch(rows)).double(), dim=1)
        lost -= float(shares[torch.arange(len(expected)), torch.tensor(expected)].sum())
    described = f"{facts.backend}, {facts.dtype}, weights {facts.weights}, slabs in {facts.slab.dtype}"
    return math.exp(lost / (len(tokens) - 1)), described


async def run(setup: Setup) -> Result:
    """Perplexities of ours and of llama.cpp's, and by how much each form of ours is above that in 16 bits."""
    # Bits are the same in both, and nothing needs to be tried.
    settings = replace(setup.settings, determinism="fast", capacity=1, max_concurrent=1)
    tokens = Text.load(find_model(settings.model)).encode(TEXT.read_text())
    result = Result(settings.window)
    found: dict[str, Figure] = {}
    for name, changes in FORMS.items():
        try:
            value, described = await trio.to_thread.run_sync(perplexity, replace(settings, **changes), tokens)
        except PerennialError as error:
            result.remarks.append(f"perennial {name}: {error}")
        else:
            found[name] = figure("", [value])
            result.remarks.append(f"perennial {name}: {described}")
    result.remarks.append(f"{len(tokens)} tokens of {TEXT.name}")
    await _measure_peers(setup, tokens, found, result)
    for name, one in found.items():
        result.figures[f"{PERPLEXITY}, {f'perennial {name}' if name in FORMS else name}"] = one
    for name in FORMS:
        for other in (FULL, _PAIRS.get(name)):
            if name != other and name in found and other in found:
                more = 100 * (found[name].median / found[other].median - 1)
                result.figures[f"{PERPLEXITY}, {name} above {other}"] = figure("%", [more])
    return result


async def _measure_peers(setup: Setup, tokens: Sequence[int], found: dict[str, Figure], result: Result) -> None:
    versions = await installed(setup.peers)
    directory = str(find_model(setup.settings.model))
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(list(tokens), file)
        file.flush()
        for peer in qualities(directory, psutil.cpu_count(logical=False) or 1, file.name):
            if peer.package not in versions:
                result.remarks.append(f"{peer.label}: {peer.package} is not installed for {setup.peers}")
                continue
            try:
                found[peer.label] = (await measured(setup.peers, peer))[PERPLEXITY]
                result.peers[peer.package] = versions[peer.package]
            except PeerFailed as error:
                result.remarks.append(f"{peer.label}: {error}")
