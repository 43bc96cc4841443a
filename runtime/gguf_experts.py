"""The experts of a layer in a GGUF file, where gate and up projections are two tensors, while transformers has one.

This reverses what llama.cpp's converter (conversion/gpt_oss.py) does for gpt-oss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.gguf_file import StoredTensor

# Marks the names of experts' parameters.
EXPERTS = ".mlp.experts."
_BIAS = "_bias"


@dataclass(frozen=True, slots=True)
class StoredExperts:
    """Weights [experts, inputs, outputs], or biases [experts, outputs], whose outputs come from each of `parts` in turn.

    The file has each [experts, outputs, inputs], or [experts, outputs].
    """

    parts: tuple[StoredTensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        experts, outputs, *inputs = self.parts[0].shape
        return (experts, *inputs, outputs * len(self.parts))

    def dense(self) -> Tensor:
        """The whole tensor in float32."""
        whole = torch.stack([part.dense() for part in self.parts], dim=2).flatten(1, 2)
        return whole.transpose(1, -1).contiguous() if whole.dim() > 2 else whole


def parts_of(name: str) -> tuple[str, ...]:
    """The names, in llama.cpp's converter, of the parts of the parameter with this name."""
    if name.endswith(".sinks"):
        return (f"{name}.weight",)
    if EXPERTS not in name:
        return (name,)
    kind = "bias" if name.endswith(_BIAS) else "weight"
    plain = name.removesuffix(_BIAS)
    each = [plain.replace("gate_up", one) for one in ("gate", "up")] if plain.endswith("gate_up_proj") else [plain]
    return tuple(f"{one}.{kind}" for one in each)
