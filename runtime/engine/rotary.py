"""Rotary angles that stay exact however long a session lives (RoPE, arXiv 2104.09864)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from runtime.checks import is_number
from runtime.engine.exact import row_by_row
from runtime.errors import ModelUnavailable

# Types whose frequencies do not depend on the length of the input.
STATIC_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class ExactRotary(nn.Module):
    """Takes the place of a transformers rotary embedding: the same frequencies, angles in float64.

    In float32 the angle at position ten million is off by half a radian.
    """

    frequencies: Tensor

    def __init__(self, original: nn.Module) -> None:
        """Raises ModelUnavailable where the frequencies change with the input's length, or are no numbers."""
        super().__init__()
        rope_type = getattr(original, "rope_type", None)
        if rope_type not in STATIC_ROPE_TYPES:
            raise ModelUnavailable(
                f"rotary embedding of type {rope_type!r} is not supported: use a model with one of {STATIC_ROPE_TYPES}"
            )
        frequencies = original.get_buffer("inv_freq")
        self.register_buffer("frequencies", frequencies.double(), persistent=False)
        self._scaling = getattr(original, "attention_scaling", 1.0)
        is_scaled = is_number(self._scaling) and math.isfinite(self._scaling)
        if not is_scaled or not (self.frequencies.isfinite() & (self.frequencies > 0)).all():
            raise ModelUnavailable(
                "rotary embedding: the configuration's rope_parameters make angles that are no numbers"
            )

    def forward(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [..., D] of the angles at `position_ids` [...], in the type of `hidden`."""
        cosines, sines = self.turn(position_ids)
        return (cosines * self._scaling).to(hidden.dtype), (sines * self._scaling).to(hidden.dtype)

    def turn(self, distance: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [..., D] in float64 that turn a vector by `distance` [...] positions."""
        angles = distance.unsqueeze(-1).double() * self.frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return row_by_row(torch.cos, angles), row_by_row(torch.sin, angles)


def rotate(vectors: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """`vectors` [..., D] turned by angles given as `cosines` and `sines` [..., D]."""
    low, high = vectors.chunk(2, dim=-1)
    return vectors * cosines + torch.cat((-high, low), dim=-1) * sines
