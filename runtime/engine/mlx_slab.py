"""Slabs of MLX arrays. They grow by whole buckets as tokens arrive, and are written in place.

An evaluated array may be read on any thread; an unevaluated one must not leave the thread that made it.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np
import torch
from torch import Tensor

from runtime.dtypes import dtype_named
from runtime.slab import Slab, SlabPool
from runtime.slab_spec import SlabSpec


class Run(NamedTuple):
    """The rows from `first` to `last` (exclusive) go into the slots from `slot` on."""

    slot: int
    first: int
    last: int


class MlxSlab(Slab):
    """Keys and values of each layer, [G, slots so far, D]."""

    def __init__(self, spec: SlabSpec) -> None:
        super().__init__(spec)
        # The keys of every layer, then the values of every layer.
        self._arrays: list[mx.array] = []

    def reserve(self, slots: int) -> None:
        """Grows to at least `slots` slots. New ones are zeros, because a masked slot is multiplied by 0."""
        spec = self.spec
        missing = slots - (self._arrays[0].shape[1] if self._arrays else 0)
        if missing <= 0:
            return
        more = mx.zeros((spec.kv_heads, missing, spec.head_dim), as_mlx(spec.dtype))
        grown = [mx.concatenate([array, more], axis=1) for array in self._arrays]
        self._arrays = grown or [alias(more) for _ in range(2 * spec.layers)]
        mx.eval(self._arrays)

    def write(self, layer: int, runs: tuple[Run, ...], end: int, keys: mx.array, values: mx.array) -> None:
        """Puts `keys` and `values` [G, N, D] of consecutive positions up to `end` (exclusive) into the slots of `runs`."""
        for index, rows in ((layer, keys), (self.spec.layers + layer, values)):
            # Assignment changes the array under this name alone, in case another slab shares it.
            self._arrays[index] = mine = alias(self._arrays[index])
            for slot, first, last in runs:
                mine[:, slot : slot + last - first] = rows[:, first:last]
        self.advance(layer, end)

    def seen(self, layer: int, extent: int) -> tuple[mx.array, mx.array]:
        """Keys and values [G, extent, D] of a layer's first slots."""
        return self._arrays[layer][:, :extent], self._arrays[self.spec.layers + layer][:, :extent]

    def arrays(self) -> list[mx.array]:
        """All arrays that a forward must evaluate."""
        return self._arrays

    def copy_from(self, other: Slab) -> None:
        """Shares the arrays of `other` until either is written."""
        assert isinstance(other, MlxSlab)
        self.clear()
        self._arrays = [alias(array) for array in other.arrays()]
        self.resume(other.frontier, other.written)

    def held(self, layer: int) -> tuple[Tensor, Tensor]:
        spec = self.spec
        if not self._arrays:  # There are no arrays before the first token.
            nothing = torch.empty(spec.kv_heads, 0, spec.head_dim, dtype=dtype_named(spec.dtype))
            return nothing, nothing
        keys, values = (to_torch(array)[:, : self.used] for array in self.seen(layer, self.used))
        return keys, values

    def put(self, layer: int, keys: Tensor, values: Tensor) -> None:
        count = keys.shape[1]
        if not count:
            return
        # As many as a forward that ended there would have reserved.
        slots = self.spec.extent(count - 1)
        if not self._arrays or self._arrays[0].shape[1] != slots:
            self._arrays = []
            self.reserve(slots)
        for index, given in ((layer, keys), (self.spec.layers + layer, values)):
            self._arrays[index] = to_mlx(torch.nn.functional.pad(given, (0, 0, 0, slots - count)))

    def zero(self, first: int, last: int) -> None:
        self.reserve(last)
        self._arrays = [alias(array) for array in self._arrays]
        for array in self._arrays:
            array[:, first:last] = 0
        mx.eval(self._arrays)


def mlx_pool(spec: SlabSpec, count: int) -> SlabPool:
    """`count` slabs, each of arrays of its own."""
    return SlabPool(spec, (MlxSlab(spec) for _ in range(count)))


def as_mlx(name: str) -> mx.Dtype:
    """MLX's type of this name, such as float32."""
    found = getattr(mx, name)
    assert isinstance(found, mx.Dtype)
    return found


def alias(array: mx.array) -> mx.array:
    """Another name for the same array; assigning into one leaves the other unchanged."""
    return array.astype(array.dtype)


def to_torch(array: mx.array) -> Tensor:
    """A copy of an evaluated array. NumPy has no bfloat16, so those bits are passed as whole numbers."""
    if array.dtype == mx.bfloat16:
        return torch.from_numpy(np.array(array.view(mx.uint16))).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def to_mlx(tensor: Tensor) -> mx.array:
    """A copy, evaluated."""
    if tensor.dtype == torch.bfloat16:
        array = mx.array(tensor.contiguous().view(torch.uint16).numpy()).view(mx.bfloat16)
        mx.eval(array)
        return array
    return mx.array(tensor.numpy())
