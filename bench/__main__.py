"""`perennial bench SCENARIO`: runs a scenario, prints its figures, and writes them to `bench/results/`."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import psutil
import torch
import trio

from bench import door, flatness, speed
from bench.models import QWEN3_06B, bench_model
from runtime.settings import Settings

RESULTS = Path(__file__).parent / "results"
SCENARIOS = {"flatness": flatness.run, "door": door.run, "speed": speed.run}


def main(arguments: Sequence[str] | None = None) -> None:
    """Settings of the servers come from the environment, as everywhere."""
    parser = argparse.ArgumentParser(prog="perennial bench", description=__doc__)
    parser.add_argument("scenario", choices=SCENARIOS)
    parser.add_argument("--model", choices=("seedling", QWEN3_06B), default="seedling")
    parser.add_argument("--name", help="name of the result's file (default: the scenario's)")
    asked = parser.parse_args(arguments)
    settings = Settings.from_environment(os.environ, {"model": bench_model(asked.model)})
    figures = trio.run(partial(SCENARIOS[asked.scenario], settings))
    machine = {"cpus": psutil.cpu_count(), "machine": platform.machine(), "torch": torch.__version__}
    result = {
        "scenario": asked.scenario,
        "model": asked.model,
        "window": settings.window,
        "machine": machine,
        **figures,
    }
    print(json.dumps(result, indent=1))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{asked.name or asked.scenario}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
