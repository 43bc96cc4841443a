"""A load of a GGUF file by our engine, in a process that has done nothing else: `python -m bench.peers.gguf_load FILE`.

What its probes find is to be known already.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

# What is imported on the way is no part of a load.
import runtime.engine.openvino_engine
import runtime.engine.torch_engine
import runtime.gguf_model  # noqa: F401
from bench.figures import figure
from bench.peers.speeds import LOAD, MEMORY, answer, prompt, resident_mib
from runtime.engine import load_engine
from runtime.events import Sampling
from runtime.rows import Row, RowBatch
from runtime.sampling import Draw
from runtime.settings import Settings


def main(path: str) -> None:
    settings = Settings(model=path, window=1020)
    before = resident_mib()
    began = time.perf_counter()
    engine = load_engine(settings, Path(path))
    seconds = time.perf_counter() - began
    slab = engine.new_pool(1).acquire()
    engine.forward(RowBatch(tuple(Row(slab, at, token, Draw(Sampling())) for at, token in enumerate(prompt(0)))))
    answer({LOAD: figure("s", [seconds]), MEMORY: figure("MiB", [resident_mib() - before])})


if __name__ == "__main__":
    main(sys.argv[1])
