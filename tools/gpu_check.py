"""`python -m tools.gpu_check`: what the CUDA engine does on the card of this machine, as a table and as JSON.

It needs the project's dependencies alone and takes eight minutes at most. Each part is tried by itself, and one that fails says
why. Without a card the same runs on the CPU with a small model, for whoever changes it.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, StaticCache

from bench.figures import Figure, figure, over
from bench.machine import describe_machine
from bench.models import QWEN3_06B, SMALL, bench_model
from runtime.engine.graph_engine import GraphEngine
from runtime.engine.machine import kernel_class
from runtime.events import Sampling
from runtime.models import SEEDLING, find_model
from runtime.rows import Row, RowBatch
from runtime.sampling import Draw
from runtime.settings import Settings
from runtime.slab import Slab

GREEDY = Draw(Sampling())
SAMPLED = Draw(Sampling(temperature=0.8, top_p=0.95, seed=7))
SESSIONS = (1, 8, 64)
PROMPT, GENERATED = 512, 64
WINDOW = 1020
# Without a card.
_SHORT = 92
SECONDS = 480
_COPIED_BYTES = 2**30
# Of Qwen3-0.6B: queries, keys and values; what follows attention; gate and up; down.
_LINEARS_OF_A_LAYER = ((1024, 4096), (2048, 1024), (1024, 6144), (3072, 1024))
_ROWS_TRIED = (1, 8, 16, 32, 64, 128, 256)
_KERNELS_SHOWN = 20
_FORMS = (("none", "bfloat16"), ("none", "float16"), ("int8", "bfloat16"), ("int4", "bfloat16"))
_FORMS_OF_A_CPU = (("none", "float32"), ("int8", "float32"))


@dataclass(slots=True)
class Report:
    """What was found: figures, and lines in words."""

    device: str
    versions: Mapping[str, str]
    figures: dict[str, Figure] = field(default_factory=dict)
    lines: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, found: Figure) -> None:
        self.figures[name] = found
        print(f"{name:<52} {found.median:>12.3f} {found.unit:<9} ({found.min:.3f} to {found.max:.3f})", flush=True)

    def say(self, name: str, words: str) -> None:
        self.lines[name] = words
        print(f"{name:<52} {words}", flush=True)


@dataclass(frozen=True, slots=True)
class Bench:
    """Where it runs, and on what."""

    device: torch.device
    model: str
    generated: int
    window: int

    def engine(self, model: str = "", **changed: Any) -> GraphEngine:
        chosen = Settings(window=self.window, capacity=max(SESSIONS), **changed)
        return GraphEngine.load(chosen, find_model(model or self.model), self.device)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def main() -> int:
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--out", type=Path, default=Path("gpu_check.json"), help="where the JSON goes")
    given.add_argument("--seconds", type=float, default=SECONDS, help="no part begins after so many seconds")
    options = given.parse_args()
    has_card = torch.cuda.is_available()
    device = torch.device("cuda" if has_card else "cpu")
    on = (
        Bench(device, bench_model(QWEN3_06B), GENERATED, WINDOW)
        if has_card
        else Bench(device, bench_model(SMALL), 4, _SHORT)
    )
    report = Report(
        kernel_class(device) if has_card else f"no card: {describe_machine()}",
        {name: version(name) for name in ("torch", "transformers", "perennial")},
    )
    print(report.device, dict(report.versions))
    began = time.perf_counter()
    for name, part in _PARTS.items():
        if time.perf_counter() - began > options.seconds:
            report.say(name, "left out: the time is over")
            continue
        try:
            part(on, report)
        except Exception as error:
            report.say(name, f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        options.out.write_text(json.dumps(asdict(report), indent=1))
    print(f"written to {options.out}")
    return any(line.startswith(("failed", "differs")) for line in report.lines.values())


# What is exact.


def exactness(on: Bench, report: Report) -> None:
    """Logits of a history past the window, however it is cut and whoever runs beside it, in each form."""
    for weights, dtype in _FORMS if on.device.type == "cuda" else _FORMS_OF_A_CPU:
        name = f"exact: weights={weights} dtype={dtype}"
        try:
            engine = on.engine(SEEDLING, weights=weights, dtype=dtype)
        except Exception as error:
            report.say(name, f"failed to load: {type(error).__name__}: {str(error).splitlines()[0]}")
            continue
        report.say(name, _tried(engine))


def _tried(engine: GraphEngine) -> str:
    choice = random.Random(0)
    count = 3 * engine.facts.slab.window
    tokens = [choice.randrange(engine.facts.vocabulary) for _ in range(count)]
    tile = engine.facts.row_tile
    whole = fed(engine, tokens, repeat(tile))
    cuts = {"ones": repeat(1), "sevens": repeat(7), "33s": repeat(33), "random": _random_cut(tile, 1)}
    for name, cut in cuts.items():
        if not torch.equal(fed(engine, tokens, cut), whole):
            return f"differs when cut in {name}"
    if not torch.equal(fed(engine, tokens, _random_cut(tile - 8, 2), beside=7), whole):
        return "differs beside seven sessions"
    drawn = [generated(engine, tokens[:100], draw, neighbours) for draw in (GREEDY, SAMPLED) for neighbours in (0, 7)]
    if drawn[0] != drawn[1] or drawn[2] != drawn[3]:
        return "tokens differ beside seven sessions"
    return f"the same bits: {len(tokens)} tokens, {len(cuts)} cuts, alone and beside seven"


def _random_cut(most: int, seed: int) -> Iterator[int]:
    choice = random.Random(seed)
    while True:
        yield choice.randint(1, most)


def fed(engine: GraphEngine, tokens: list[int], cuts: Iterable[int], beside: int = 0) -> torch.Tensor:
    """Logits [tokens, vocabulary] of a history, fed in such parts, while so many others have a row in each forward."""
    pool = engine.new_pool(1 + beside)
    slab, *others = (pool.acquire() for _ in range(1 + beside))
    parts, at = [], 0
    for step, length in enumerate(cuts):
        if at >= len(tokens):
            break
        mine = tuple(Row(slab, at + n, token, GREEDY) for n, token in enumerate(tokens[at : at + length]))
        theirs = tuple(Row(other, step, tokens[step % len(tokens)], GREEDY) for other in others)
        logits = engine.logits(RowBatch(theirs + mine))
        parts.append(logits[len(theirs) :].cpu())
        at += len(mine)
    return torch.cat(parts)


def generated(engine: GraphEngine, prompt: list[int], draw: Draw, beside: int) -> list[int]:
    """Sixteen tokens after a prompt, while so many others generate."""
    pool = engine.new_pool(1 + beside)
    slabs = [pool.acquire() for _ in range(1 + beside)]
    for slab in slabs:
        read(engine, slab, prompt)
    tokens, position, last = [], len(prompt), prompt[-1]
    for _ in range(16):
        rows = tuple(Row(slab, position, last, draw) for slab in slabs)
        last = engine.forward(RowBatch(rows))[0].token_id
        tokens.append(last)
        position += 1
    return tokens


def read(engine: GraphEngine, slab: Slab, tokens: list[int]) -> None:
    """Brings tokens into an empty slab."""
    tile = engine.facts.row_tile
    for at in range(0, len(tokens), tile):
        rows = (Row(slab, at + n, token) for n, token in enumerate(tokens[at : at + tile]))
        engine.forward(RowBatch(tuple(rows)))


# What is fast.


def speed(on: Bench, report: Report) -> None:
    """Steps of one, eight and 64 sessions, a prompt, and how near a step is to what the memory gives."""
    bandwidth = copy_bandwidth(on)
    report.add("memory: read and written by a copy", bandwidth)
    steps: dict[tuple[str, int], Figure] = {}
    for determinism in ("strict", "fast"):
        engine = on.engine(determinism=determinism)
        for sessions in SESSIONS:
            found = decode(on, engine, sessions)
            steps[determinism, sessions] = found
            report.add(f"{determinism}: a step of {sessions} sessions", found)
        report.add(f"{determinism}: a prompt of {PROMPT}", prompt(on, engine))
        if determinism == "strict":
            read_bytes = engine.facts.weights_bytes + (PROMPT + on.generated // 2) * engine.facts.slab.token_bytes
            floor = figure("ms", [read_bytes / bandwidth.median / 1e6])
            report.add("floor of a step of 1 session", floor)
            report.add("a step of 1 session over its floor (aim 1.15)", over(steps["strict", 1], floor))
        del engine
    most = SESSIONS[-1]
    gain = most * steps["strict", 1].median / steps["strict", most].median
    report.add(f"tokens a second of {most} sessions over 1 (aim 25)", figure("x", [gain]))
    report.add("strict over fast, 1 session (aim 1.10)", over(steps["strict", 1], steps["fast", 1]))


def copy_bandwidth(on: Bench) -> Figure:
    """GB a second that a copy reads and writes."""
    source = torch.ones(_COPIED_BYTES // 4, device=on.device)
    target = torch.empty_like(source)
    target.copy_(source)
    return figure("GB/s", [2 * _COPIED_BYTES / 1e9 / timed(on, partial(target.copy_, source)) for _ in range(9)])


def timed(on: Bench, work: Callable[[], object]) -> float:
    """Seconds until the device has done it."""
    on.wait()
    began = time.perf_counter()
    work()
    on.wait()
    return time.perf_counter() - began


def decode(on: Bench, engine: GraphEngine, sessions: int) -> Figure:
    """Milliseconds of a step in which each of so many sessions, behind a prompt, has a token drawn."""
    pool = engine.new_pool(sessions)
    slabs = [pool.acquire() for _ in range(sessions)]
    for slab in slabs:
        read(engine, slab, [7] * PROMPT)

    def step(position: int) -> None:
        engine.forward(RowBatch(tuple(Row(slab, position, 7, GREEDY) for slab in slabs)))

    return figure("ms", [1000 * timed(on, partial(step, PROMPT + n)) for n in range(on.generated)])


def prompt(on: Bench, engine: GraphEngine) -> Figure:
    """Tokens a second of a prompt."""
    found = []
    for _ in range(5):
        slab = engine.new_pool(1).acquire()
        found.append(PROMPT / timed(on, partial(read, engine, slab, [7] * PROMPT)))
    return figure("tokens/s", found)


def rows_of_linears(on: Bench, report: Report) -> None:
    """What a layer's linears take by rows: which number of rows a step should have on this card."""
    dtype = torch.bfloat16 if on.device.type == "cuda" else torch.float32
    # Several of each, so that a cache does not hold them.
    copies = 16 if on.device.type == "cuda" else 1
    shapes = [shape for shape in _LINEARS_OF_A_LAYER for _ in range(copies)]
    many = [nn.Linear(inputs, outputs, bias=False).to(on.device, dtype) for inputs, outputs in shapes]

    @torch.inference_mode()
    def run(rows: int) -> None:
        for part in many:
            part(torch.ones(rows, part.in_features, dtype=dtype, device=on.device))

    for rows in _ROWS_TRIED:
        run(rows)
        report.add(
            f"{len(many)} linears on {rows} rows",
            figure("ms", [1000 * timed(on, partial(run, rows)) for _ in range(9)]),
        )


# What others do.


@torch.inference_mode()
def transformers_static(on: Bench, report: Report) -> None:
    """A step of transformers' own model with a static cache, as it is and compiled."""
    dtype = torch.bfloat16 if on.device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(on.model, dtype=dtype).to(on.device).eval()
    for name in ("eager", "compiled") if on.device.type == "cuda" else ("eager",):
        run = torch.compile(model, mode="reduce-overhead", fullgraph=True) if name == "compiled" else model
        cache = StaticCache(config=model.config, max_cache_len=2 * PROMPT)
        model(torch.full((1, PROMPT), 7, device=on.device), cache=cache)

        def step(position: int, run: Any = run, cache: StaticCache = cache) -> None:
            token = torch.full((1, 1), 7, device=on.device)
            at = torch.tensor([[position]], device=on.device)
            int(run(token, cache=cache, position_ids=at).logits[0, -1].argmax())

        for position in range(3):
            step(PROMPT + position)
        found = [1000 * timed(on, partial(step, PROMPT + 3 + n)) for n in range(on.generated)]
        report.add(f"transformers, static cache, {name}: a step of 1", figure("ms", found))


def vllm(on: Bench, report: Report) -> None:
    """vLLM, where it is installed."""
    if not find_spec("vllm"):
        report.say("vllm", "not installed")
        return
    from vllm import LLM, SamplingParams

    served: Any = LLM(on.model, dtype="bfloat16", gpu_memory_utilization=0.4, max_model_len=2 * WINDOW)
    many = SamplingParams(temperature=0.0, max_tokens=on.generated, ignore_eos=True)
    for sessions in SESSIONS:
        asked = [{"prompt_token_ids": [7] * PROMPT}] * sessions
        served.generate(asked, many, use_tqdm=False)
        found = [
            1000 * timed(on, partial(served.generate, asked, many, use_tqdm=False)) / on.generated for _ in range(3)
        ]
        report.add(f"vllm: a step of {sessions} sessions, prompts' share included", figure("ms", found))


# Where the time goes.


def profile(on: Bench, report: Report) -> None:
    """The kernels of one step, those that take longest first."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    engine = on.engine()
    slab = engine.new_pool(1).acquire()
    read(engine, slab, [7] * PROMPT)
    is_cuda = on.device.type == "cuda"
    with profiled(activities=[ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU]) as taken:
        engine.forward(RowBatch((Row(slab, PROMPT, 7, GREEDY),)))
        on.wait()
    spent = "self_device_time_total" if is_cuda else "self_cpu_time_total"
    kernels = sorted(taken.key_averages(), key=lambda one: -getattr(one, spent))
    report.say("profile: kernels in a step", str(sum(one.count for one in kernels)))
    for one in kernels[:_KERNELS_SHOWN]:
        report.say(f"profile: {one.key[:40]}", f"{getattr(one, spent):.0f} us in {one.count} calls")


_PARTS: Mapping[str, Callable[[Bench, Report], None]] = {
    "exactness": exactness,
    "speed": speed,
    "rows of linears": rows_of_linears,
    "profile": profile,
    "transformers": transformers_static,
    "vllm": vllm,
}

if __name__ == "__main__":
    sys.exit(main())
