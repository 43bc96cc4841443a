"""The floor: a model's linears alone, reading their weights once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from bench.figures import Figure, figure, repeats
from bench.peers.speeds import PREFILL, decoding
from runtime.models import find_model

BUDGET_S = 8
PREFILL_ROWS = 256


def tokens_a_second(linears: Sequence[nn.Linear], rows: int) -> float:
    """What the linears do with so many rows at once."""
    inputs = {
        linear.in_features: torch.randn(rows, linear.in_features, dtype=linear.weight.dtype) for linear in linears
    }
    with torch.inference_mode():
        began = time.perf_counter()
        for linear in linears:
            linear(inputs[linear.in_features])
        return rows / (time.perf_counter() - began)


def floors(model: str, dtype: torch.dtype, streams: Sequence[int]) -> dict[str, Figure]:
    """Tokens a second that no engine on torch's linears exceeds, by what is done."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(find_model(model), dtype=dtype)
    everything = [module for module in loaded.modules() if isinstance(module, nn.Linear)]
    # Only the last token of a prompt needs the head.
    layers = [module for module in loaded.get_decoder().modules() if isinstance(module, nn.Linear)]

    def measured(linears: Sequence[nn.Linear], rows: int) -> Figure:
        tokens_a_second(linears, rows)
        return figure("tokens/s", [tokens_a_second(linears, rows) for _ in repeats(BUDGET_S)])

    return {PREFILL: measured(layers, PREFILL_ROWS)} | {
        decoding(count): measured(everything, count) for count in streams
    }
