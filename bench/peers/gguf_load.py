"""A load of a GGUF file by our engine, in a process that has done nothing else: `python -m bench.peers.gguf_load FILE HOW`.

It is the `first` one, which keeps compiled graphs for those after it, or `again` one of those. What its probes find is to be
known already.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

# What is imported on the way is no part of a load.
import runtime.engine.openvino_engine
import runtime.engine.torch_engine
import runtime.gguf_model  # noqa: F401
from bench.figures import figure
from bench.peers.speeds import FIRST_LOAD, LOAD, MEMORY, ON_DISK, answer, prompt, resident_mib
from runtime.caches import cache_folder
from runtime.engine import load_engine
from runtime.events import Sampling
from runtime.rows import Row, RowBatch
from runtime.sampling import Draw
from runtime.settings import Settings


@contextmanager
def fresh_cache() -> Iterator[Path]:
    """A folder that is the cache in the block, in which nothing is known but what probes have found."""
    before = cache_folder()
    with TemporaryDirectory(dir=before) as folder:
        fresh = Path(folder) / "perennial"
        fresh.mkdir()
        if before:
            shutil.copy(before / "findings.json", fresh)
        os.environ["XDG_CACHE_HOME"] = folder
        yield fresh


def load(path: str) -> tuple[float, float]:
    """Seconds, and MiB of memory after a first forward."""
    settings = Settings(model=path, window=1020)
    before = resident_mib()
    began = time.perf_counter()
    engine = load_engine(settings, Path(path))
    seconds = time.perf_counter() - began
    slab = engine.new_pool(1).acquire()
    engine.forward(RowBatch(tuple(Row(slab, at, token, Draw(Sampling())) for at, token in enumerate(prompt(0)))))
    return seconds, resident_mib() - before


def main(path: str, how: str) -> None:
    if how == "again":
        seconds, memory = load(path)
        answer({LOAD: figure("s", [seconds]), MEMORY: figure("MiB", [memory])})
        return
    with fresh_cache() as cache:
        seconds, _ = load(path)
        kept = sum(file.stat().st_size for file in cache.glob("graphs/*/*"))
    answer({FIRST_LOAD: figure("s", [seconds]), ON_DISK: figure("MiB", [kept / 2**20])})


if __name__ == "__main__":
    main(*sys.argv[1:])
