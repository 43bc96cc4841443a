"""`transformers`' own `generate`, eager, greedy: `python -m bench.peers.transformers_generate DIRECTORY THREADS DTYPE`."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, StoppingCriteria

from bench.peers.speeds import GENERATED_TOKENS, PREFILL_TOKENS, answer, measure, prompt


class Stamps(StoppingCriteria):
    """Never stops; notes when each token had been drawn."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.seconds.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def main(directory: str, threads: int, dtype: str) -> None:
    torch.set_num_threads(threads)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))

    def generate(prompts: list[list[int]], count: int) -> list[float]:
        stamps = Stamps()
        ids = torch.tensor(prompts)
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=[stamps],
        )
        return stamps.seconds

    def prefill() -> float:
        began = time.perf_counter()
        (first,) = generate([prompt(0, PREFILL_TOKENS)], 1)
        return PREFILL_TOKENS / (first - began)

    def decode(streams: int) -> float:
        seconds = generate([prompt(stream) for stream in range(streams)], GENERATED_TOKENS + 1)
        return streams * GENERATED_TOKENS / (seconds[-1] - seconds[0])

    with torch.inference_mode():
        answer(measure(prefill, decode, (1, 4, 8)))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
