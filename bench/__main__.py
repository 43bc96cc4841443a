"""`perennial bench`: a scenario by its name, `all` of them, or the `report` of what was measured."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.util import find_spec

import trio

from bench import agents, doors, gguf, loop, marathon, moves, quality, recall, report, results, scheduling, speed
from bench.machine import describe_machine, our_versions
from bench.models import MODELS, QWEN3_06B, SMALL, SMOLLM2, bench_model
from bench.results import Record
from bench.scenario import Result, Setup
from runtime.engine.machine import level
from runtime.models import SEEDLING
from runtime.settings import Settings
from runtime.smollm2 import SMOLLM2 as SMOLLM2_FILE

SCENARIOS: Mapping[str, Callable[[Setup], Awaitable[Result]]] = {
    "speed": speed.run,
    "gguf": gguf.run,
    "recall": recall.run,
    "quality": quality.run,
    "scheduling": scheduling.run,
    "loop": loop.run,
    "marathon": marathon.run,
    "agents": agents.run,
    "moves": moves.run,
    "doors": doors.run,
}
ALL = (
    ("speed", QWEN3_06B),
    ("gguf", QWEN3_06B),
    ("gguf", SMOLLM2_FILE),
    ("recall", SMOLLM2_FILE),
    ("recall", SEEDLING),
    ("quality", SMOLLM2),
    ("scheduling", QWEN3_06B),
    ("loop", QWEN3_06B),
    ("agents", QWEN3_06B),
    ("moves", QWEN3_06B),
    ("marathon", SMALL),
    ("scheduling", SMALL),
    ("marathon", SEEDLING),
    ("loop", SEEDLING),
    ("doors", SEEDLING),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Settings of the servers come from the environment, as everywhere."""
    parser = argparse.ArgumentParser(prog="perennial bench", description=__doc__)
    parser.add_argument("what", choices=(*SCENARIOS, "all", "report"))
    parser.add_argument("--model", choices=MODELS, help="for one scenario (default: the first that `all` runs it on)")
    parser.add_argument(
        "--peers",
        default=sys.executable,
        metavar="PYTHON",
        help="interpreter that has the peers: transformers, llama-cpp-python with gguf, mlx-lm (default: this one)",
    )
    asked = parser.parse_args(arguments)
    if shutil.which(asked.peers) is None:
        parser.error(f"--peers {asked.peers} is no interpreter here")
    if asked.what in ("all", "report") and find_spec("matplotlib") is None:
        parser.error("the report's plots need matplotlib: pip install 'perennial[bench]'")
    match asked.what:
        case "all":
            _run_all(asked.peers)
        case "report":
            report.write()
        case scenario:
            models = dict(reversed(ALL))
            _run(scenario, asked.model or models[scenario], asked.peers)


def _run_all(peers: str) -> None:
    """Each in a process of its own: none finds the memory and the threads that another left."""
    failed = []
    for scenario, model in ALL:
        began = time.perf_counter()
        command = [sys.executable, "-m", "bench", scenario, "--model", model, "--peers", peers]
        if subprocess.run(command).returncode:
            failed.append(f"{scenario}-{model}")
        print(f"{scenario}-{model}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    report.write()
    if failed:
        sys.exit(f"perennial bench: failed: {', '.join(failed)}")


def _run(scenario: str, model: str, peers: str) -> None:
    settings = Settings.from_environment(os.environ, {"model": bench_model(model)})
    result = trio.run(partial(SCENARIOS[scenario], Setup(model, settings, peers)))
    date = datetime.now(UTC).isoformat(timespec="seconds")
    kind = level().name.lower()
    record = Record(scenario, model, kind, date, describe_machine(), our_versions(), result)
    results.write(record)
    for name, one in result.figures.items():
        spread = f"{report.number(one.min)} to {report.number(one.max)}"
        print(f"{record.name}: {name}: {report.number(one.median)} {one.unit} ({spread})")
    for remark in result.remarks:
        print(f"{record.name}: {remark}")


if __name__ == "__main__":
    main()
