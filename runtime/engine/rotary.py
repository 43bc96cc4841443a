"""Rotary angles that stay exact however long a session lives (RoPE, arXiv 2104.09864)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from runtime.checks import is_number
from runtime.engine.exact import row_by_row
from runtime.errors import ModelUnavailable

# Types whose frequencies do not depend on the length of the input.
STATIC_ROPE_TYPES = ("default", "linear", "llama3", "yarn")

# Multimodal models have positions [3, batch, rows].
_DIMENSIONS_WITH_PLACES = 3


class ExactRotary(nn.Module):
    """Replaces a rotary embedding of transformers: the same frequencies, with angles in float64.

    In float32 the angle at position ten million is off by half a radian.
    """

    frequencies: Tensor
    scaling: float

    def __init__(self, original: nn.Module, kind: str = "", *, has_half_angles: bool = False) -> None:
        """The embedding of one `kind` of layer, if the original has several.

        Raises ModelUnavailable if its frequencies change with the input's length or are not finite and positive.
        """
        super().__init__()
        prefix = f"{kind}_" if kind else ""
        rope_type: Any = getattr(original, "rope_type", None)
        if kind:
            rope_type = rope_type[kind]
        if rope_type not in STATIC_ROPE_TYPES:
            raise ModelUnavailable(
                f"rotary embedding of type {rope_type!r} is not supported: use a model with one of {STATIC_ROPE_TYPES}"
            )
        frequencies = original.get_buffer(f"{prefix}inv_freq")
        self.register_buffer("frequencies", frequencies.double(), persistent=False)
        self._columns = len(frequencies) * (1 if has_half_angles else 2)
        self.scaling = getattr(original, f"{prefix}attention_scaling", 1.0)
        is_scaled = is_number(self.scaling) and math.isfinite(self.scaling)
        if not is_scaled or not (self.frequencies.isfinite() & (self.frequencies > 0)).all():
            raise ModelUnavailable(
                "rotary embedding: the configuration's rope_parameters make angles that are not finite"
            )

    def forward(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [..., D] of the angles at `position_ids` [...], in the type of `hidden`.

        If the layers take each angle once for both halves of a head, [..., D / 2].
        """
        if position_ids.dim() == _DIMENSIONS_WITH_PLACES:
            # A token of text has the same position in time, height and width.
            position_ids = position_ids[0]
        cosines, sines = (part[..., : self._columns] * self.scaling for part in self.turn(position_ids))
        return cosines.to(hidden.dtype), sines.to(hidden.dtype)

    def turn(self, distance: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [..., D] in float64 that turn a vector by `distance` [...] positions."""
        angles = distance.unsqueeze(-1).double() * self.frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return row_by_row(torch.cos, angles), row_by_row(torch.sin, angles)


class KnownRotary(nn.Module):
    """Stands for a rotary embedding of transformers whose frequencies are known, so that none has to be made."""

    rope_type = "default"

    def __init__(self, frequencies: Tensor, scaling: float) -> None:
        super().__init__()
        self.register_buffer("inv_freq", frequencies, persistent=False)
        self.attention_scaling = scaling


class RotaryByLayer(nn.Module):
    """The rotary embeddings of a model that has a different one for each kind of layer."""

    def __init__(self, original: nn.Module, kinds: Iterable[str]) -> None:
        """Raises ModelUnavailable as ExactRotary does."""
        super().__init__()
        self.by_kind = {kind: ExactRotary(original, kind) for kind in kinds}
        self.embeddings = nn.ModuleList(self.by_kind.values())

    def forward(self, hidden: Tensor, position_ids: Tensor, layer_type: str) -> tuple[Tensor, Tensor]:
        turn: tuple[Tensor, Tensor] = self.by_kind[layer_type](hidden, position_ids)
        return turn


def rotate(vectors: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """`vectors` [..., D] turned by angles given as `cosines` and `sines` [..., R], of which the first R columns turn."""
    turned, still = vectors.tensor_split([cosines.shape[-1]], dim=-1)
    low, high = turned.chunk(2, dim=-1)
    turned = turned * cosines + torch.cat((-high, low), dim=-1) * sines
    return torch.cat((turned, still), dim=-1) if still.shape[-1] else turned
