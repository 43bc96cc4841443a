"""What llama.cpp makes of a text: `python -m bench.peers.llama_cpp_quality DIRECTORY THREADS WEIGHTS TOKENS`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np

from bench.figures import figure
from bench.peers.gguf_file import gguf_file
from bench.peers.speeds import PERPLEXITY, answer


def main(directory: Path, threads: int, weights: str, tokens: list[int]) -> None:
    model = llama_cpp.Llama(
        str(gguf_file(directory, weights)),
        n_ctx=len(tokens),
        n_threads=threads,
        n_threads_batch=threads,
        logits_all=True,
        verbose=False,
    )
    model.eval(tokens)
    logits = model.scores[: len(tokens) - 1].astype(np.float64)
    # The largest is taken away first, so that nothing overflows.
    logits -= logits.max(axis=1, keepdims=True)
    drawn = logits[np.arange(len(tokens) - 1), tokens[1:]] - np.log(np.exp(logits).sum(axis=1))
    answer({PERPLEXITY: figure("", [float(np.exp(-drawn.mean()))])})


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], json.loads(Path(sys.argv[4]).read_text()))
