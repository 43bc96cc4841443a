"""Floors: a model's linears alone in the torch engine's form, and what a step has to read over what the memory gives."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from bench.figures import Figure, figure, repeats
from bench.peers.speeds import GENERATED_TOKENS, PREFILL, PROMPT_TOKENS, decoding
from runtime.engine import EngineFacts
from runtime.engine.linears import replace_linears
from runtime.models import find_model

BUDGET_S = 8
PREFILL_ROWS = 256
_READ_BYTES = 2 * 2**30


def tokens_a_second(linears: Sequence[tuple[int, nn.Module]], rows: int, dtype: torch.dtype) -> float:
    """What linears, each beside its width, do with so many rows at once."""
    inputs = {width: torch.randn(rows, width, dtype=dtype) for width, _ in linears}
    with torch.inference_mode():
        began = time.perf_counter()
        for width, linear in linears:
            linear(inputs[width])
        return rows / (time.perf_counter() - began)


def memory_floor(facts: EngineFacts, model: str) -> Figure:
    """Tokens a second of a stream whose step reads all weights but the embedding, keys and values, at the memory's pace."""
    hidden = AutoConfig.from_pretrained(find_model(model)).hidden_size
    embedding = facts.vocabulary * hidden * facts.slab.item_bytes
    read = facts.weights_bytes - embedding + (PROMPT_TOKENS + GENERATED_TOKENS) * facts.slab.token_bytes
    # Larger than caches that neighbours share.
    memory = torch.ones(_READ_BYTES // 4)
    memory.sum()

    def paced() -> float:
        began = time.perf_counter()
        memory.sum()
        return float(_READ_BYTES / (time.perf_counter() - began) / read)

    return figure("tokens/s", [paced() for _ in range(9)])


def floors(model: str, dtype: torch.dtype, streams: Sequence[int]) -> dict[str, Figure]:
    """Tokens a second that no engine on these linears exceeds, by what is done: decode in our form, a prompt in torch's own."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(find_model(model), dtype=dtype)
    head = loaded.get_output_embeddings()
    widths = {name: part.in_features for name, part in loaded.named_modules() if isinstance(part, nn.Linear)}

    def measured(rows: int, is_head_needed: bool) -> Figure:
        parts = {name: loaded.get_submodule(name) for name in widths}
        linears = [(widths[name], part) for name, part in parts.items() if is_head_needed or part is not head]
        tokens_a_second(linears, rows, dtype)
        return figure("tokens/s", [tokens_a_second(linears, rows, dtype) for _ in repeats(BUDGET_S)])

    # Only the last token of a prompt needs the head.
    taken = {PREFILL: measured(PREFILL_ROWS, is_head_needed=False)}
    replace_linears(loaded, head, "none", dtype, torch.device("cpu"))
    return taken | {decoding(count): measured(count, is_head_needed=True) for count in streams}
