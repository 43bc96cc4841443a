"""Quantised matrices of GGUF files as whole numbers with scales, without rounding any value again.

A weight is `step * scale + offset`, the scale and the offset being those of its group. Steps lie around zero where the file
counts them from zero up, so that the rows that are multiplied with them lose less when they are rounded to 8 bits.
Layouts: ggml-quants.c of llama.cpp, and quants.py of the gguf package, with whose results tests compare each kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from runtime.gguf_file import StoredTensor

# Twice the value of each code of a sign, two bits of exponent and one of mantissa (OCP's microscaling formats, E2M1).
_FP4 = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=torch.int8)
# Steps, scales, offsets, and the number of bits that a step needs.
_Parts = tuple[Tensor, Tensor, Tensor | None, int]


@dataclass(frozen=True, slots=True)
class Blocks:
    """A matrix in groups of its rows: `steps` [outputs, groups, group] int8 that need `bits`, a scale [outputs, groups, 1]
    in float16 or float32 for each group, and where the kind has one an offset [outputs, groups] float32."""

    steps: Tensor
    scales: Tensor
    offsets: Tensor | None
    bits: int

    @property
    def group(self) -> int:
        return self.steps.shape[2]

    @property
    def nbytes(self) -> int:
        offsets = 0 if self.offsets is None else self.offsets.nbytes
        return self.steps.numel() * self.bits // 8 + self.scales.nbytes + offsets

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weights [outputs, inputs] in this type."""
        weights = self.steps.to(dtype) * self.scales.to(dtype)
        if self.offsets is not None:
            weights += self.offsets.to(dtype).unsqueeze(2)
        return weights.flatten(1)


def unpack(stored: StoredTensor) -> Blocks | None:
    """The matrix as Blocks, exactly; None for a kind that Blocks cannot hold."""
    make = _KINDS.get(stored.kind)
    if make is None:
        return None
    outputs, inputs = stored.shape
    values, _ = GGML_QUANT_SIZES[stored.kind]
    # A copy, so that the file can be unmapped.
    raw = torch.from_numpy(np.array(stored.read())).view(outputs * inputs // values, -1)
    steps, scales, offsets, bits = make(raw)
    groups = inputs // steps.shape[-1]
    return Blocks(
        steps.view(outputs, groups, -1),
        scales.reshape(outputs, groups, 1),
        None if offsets is None else offsets.reshape(outputs, groups),
        bits,
    )


def _q8_0(raw: Tensor) -> _Parts:
    return raw[:, 2:].contiguous().view(torch.int8), _half(raw, 0), None, 8


def _q4_0(raw: Tensor) -> _Parts:
    return _nibbles(raw[:, 2:], 16) - 8, _half(raw, 0), None, 4


def _q4_1(raw: Tensor) -> _Parts:
    scales = _half(raw, 0)
    return _nibbles(raw[:, 4:], 16) - 8, scales, _half(raw, 2).float() + 8 * scales.float(), 4


def _q5_0(raw: Tensor) -> _Parts:
    return _nibbles(raw[:, 6:], 16) + 16 * _fifth_bits(raw[:, 2:6]) - 16, _half(raw, 0), None, 8


def _q5_1(raw: Tensor) -> _Parts:
    scales = _half(raw, 0)
    steps = _nibbles(raw[:, 8:], 16) + 16 * _fifth_bits(raw[:, 4:8]) - 16
    return steps, scales, _half(raw, 2).float() + 16 * scales.float(), 8


def _q4_k(raw: Tensor) -> _Parts:
    scales, least = _scales_and_least(raw)
    return _nibbles(raw[:, 16:], 32).view(-1, 32) - 8, scales, 8 * scales - least, 4


def _q5_k(raw: Tensor) -> _Parts:
    scales, least = _scales_and_least(raw)
    high = _shift(raw[:, 16:48], range(8), 32) & 1
    steps = _nibbles(raw[:, 48:], 32) + 16 * high.to(torch.int8) - 16
    return steps.view(-1, 32), scales, 16 * scales - least, 8


def _q6_k(raw: Tensor) -> _Parts:
    low = _nibbles(raw[:, :128], 64)
    high = (_shift(raw[:, 128:192], (0, 2, 4, 6), 32) & 3).to(torch.int8)
    scales = _half(raw, 208).float() * raw[:, 192:208].contiguous().view(torch.int8)
    return (low + 16 * high - 32).view(-1, 16), scales, None, 8


def _mxfp4(raw: Tensor) -> _Parts:
    """Its numbers of 4 bits, doubled, are whole numbers from -12 to 12; so its scales, powers of 2, are halved here."""
    exponents = raw[:, :1].int()
    # The two smallest scales are subnormal in float32.
    scales = torch.where(exponents < 2, 0x200000 << exponents, (exponents - 1) << 23).view(torch.float32)
    return _FP4[_nibbles(raw[:, 1:], 16).int()], scales, None, 8


_KINDS: Mapping[Kind, Callable[[Tensor], _Parts]] = {
    Kind.Q8_0: _q8_0,
    Kind.Q4_0: _q4_0,
    Kind.Q4_1: _q4_1,
    Kind.Q5_0: _q5_0,
    Kind.Q5_1: _q5_1,
    Kind.Q4_K: _q4_k,
    Kind.Q5_K: _q5_k,
    Kind.Q6_K: _q6_k,
    Kind.MXFP4: _mxfp4,
}


def _half(raw: Tensor, at: int) -> Tensor:
    """The half-precision number at byte `at` of each block, [blocks, 1]."""
    return raw[:, at : at + 2].contiguous().view(torch.float16)


def _shift(raw: Tensor, shifts: range | tuple[int, ...], width: int) -> Tensor:
    """Bytes [blocks, n] in runs of `width`, each run shifted right by each of `shifts` in turn, [blocks, n * shifts]."""
    by = torch.tensor(shifts, dtype=torch.uint8).view(1, 1, -1, 1)
    shifted: Tensor = raw.unflatten(1, (-1, 1, width)) >> by
    return shifted.flatten(1)


def _nibbles(raw: Tensor, width: int) -> Tensor:
    """Numbers of four bits as int8 from 0 to 15: for each run of `width` bytes first the low halves, then the high ones."""
    runs = raw.unflatten(1, (-1, width))
    return torch.stack((runs & 15, runs >> 4), dim=2).flatten(1).view(torch.int8)


def _fifth_bits(raw: Tensor) -> Tensor:
    """The bits of four bytes, the lowest first, [blocks, 32] int8."""
    bits: Tensor = (raw.unsqueeze(2) >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.flatten(1).view(torch.int8)


def _scales_and_least(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima [blocks, 8] of the groups of Q4_K and Q5_K: numbers of 6 bits times the block's own scales."""
    low, middle, high = raw[:, 4:8], raw[:, 8:12], raw[:, 12:16]
    scales = torch.cat((low & 63, (high & 15) | (low >> 6 << 4)), dim=1)
    least = torch.cat((middle & 63, (high >> 4) | (middle >> 6 << 4)), dim=1)
    return _half(raw, 0).float() * scales, _half(raw, 2).float() * least
