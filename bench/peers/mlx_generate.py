"""`mlx-lm`, one stream, greedy: `python -m bench.peers.mlx_generate DIRECTORY`. MLX chooses its threads itself."""

from __future__ import annotations

import sys
import time

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.utils import load

from bench.peers.speeds import GENERATED_TOKENS, answer, measure, prompt

# On Linux's CPUs it reads so slowly that the common length would take minutes.
PREFILL_TOKENS = 64


def main(directory: str) -> None:
    model = load(directory)[0]

    def prefill() -> float:
        began = time.perf_counter()
        next(generate_step(mx.array(prompt(0, PREFILL_TOKENS)), model, max_tokens=1))
        return PREFILL_TOKENS / (time.perf_counter() - began)

    def decode(streams: int) -> float:
        assert streams == 1
        seconds = []
        for _ in generate_step(mx.array(prompt(0)), model, max_tokens=GENERATED_TOKENS + 1):
            seconds.append(time.perf_counter())
        return GENERATED_TOKENS / (seconds[-1] - seconds[0])

    answer(measure(prefill, decode, (1,), least=1))


if __name__ == "__main__":
    main(sys.argv[1])
