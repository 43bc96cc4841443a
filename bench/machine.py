"""The machine and the versions that figures belong to."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

VERSIONS = ("perennial", "torch", "transformers", "trio")


def describe_machine() -> str:
    """Processor, cores, memory and vector instructions, in one line."""
    cores = psutil.cpu_count(logical=False)
    memory = psutil.virtual_memory().total / 2**30
    isa = torch.backends.cpu.get_cpu_capability()
    return f"{_processor()}, {cores} cores, {memory:.0f} GiB, {isa}, {platform.system()} {platform.machine()}"


def our_versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in VERSIONS}}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
