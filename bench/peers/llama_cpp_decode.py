"""llama.cpp through `llama-cpp-python`, greedy: `python -m bench.peers.llama_cpp_decode DIRECTORY THREADS WEIGHTS`.

In the place of a directory, for which a file of these weights is made, it may be given a GGUF file and no weights.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from bench.figures import figure
from bench.peers.gguf_file import gguf_file
from bench.peers.speeds import (
    GENERATED_TOKENS,
    LOAD,
    MEMORY,
    PREFILL_TOKENS,
    PROMPT_TOKENS,
    answer,
    measure,
    prompt,
    resident_mib,
)

MOST_STREAMS = 8


class Context:
    """A model with room for `MOST_STREAMS` sequences side by side."""

    def __init__(self, path: Path, threads: int) -> None:
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._vocabulary: int = llama_cpp.llama_vocab_n_tokens(vocabulary)
        terms = llama_cpp.llama_context_default_params()
        terms.n_ctx = MOST_STREAMS * 2 * PREFILL_TOKENS
        terms.n_batch = terms.n_ubatch = PREFILL_TOKENS
        terms.n_seq_max = MOST_STREAMS
        terms.n_threads = terms.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, terms)
        self._batch: Any = llama_cpp.llama_batch_init(PREFILL_TOKENS, 0, 1)

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def draw(self, start: int, tokens: dict[int, list[int]]) -> dict[int, list[int]]:
        """Reads the next tokens of some sequences, all from position `start` on, and gives the one that follows each."""
        batch = self._batch
        batch.n_tokens = 0
        last: dict[int, int] = {}
        for sequence, some in tokens.items():
            for offset, token in enumerate(some):
                index = batch.n_tokens
                batch.token[index], batch.pos[index] = token, start + offset
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
                batch.logits[index] = offset == len(some) - 1
                batch.n_tokens += 1
            last[sequence] = batch.n_tokens - 1
        if llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError("llama.cpp could not decode")
        return {sequence: [self._likeliest(index)] for sequence, index in last.items()}

    def _likeliest(self, index: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, index)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocabulary,)).argmax())


def main(path: Path, threads: int) -> None:
    before = resident_mib()
    began = time.perf_counter()
    context = Context(path, threads)
    load = time.perf_counter() - began
    context.draw(0, {0: prompt(0)})
    memory = resident_mib() - before

    def prefill() -> float:
        context.clear()
        began = time.perf_counter()
        context.draw(0, {0: prompt(0, PREFILL_TOKENS)})
        return PREFILL_TOKENS / (time.perf_counter() - began)

    def decode(streams: int) -> float:
        context.clear()
        drawn = context.draw(0, {stream: prompt(stream) for stream in range(streams)})
        began = time.perf_counter()
        for position in range(PROMPT_TOKENS, PROMPT_TOKENS + GENERATED_TOKENS):
            drawn = context.draw(position, drawn)
        return streams * GENERATED_TOKENS / (time.perf_counter() - began)

    speeds = measure(prefill, decode, (1, 4, MOST_STREAMS))
    answer(speeds | {LOAD: figure("s", [load]), MEMORY: figure("MiB", [memory])})


if __name__ == "__main__":
    given, threads, *weights = sys.argv[1:]
    main(gguf_file(Path(given), *weights) if weights else Path(given), int(threads))
