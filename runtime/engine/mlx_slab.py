"""Slabs of MLX arrays. They grow by whole buckets as tokens arrive, and are written in place.

An array that was evaluated may be read on any thread; nothing that is still to be evaluated leaves the thread that made it.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np
import torch
from torch import Tensor

from runtime.slab import Slab, SlabPool, SlabSpec


class Run(NamedTuple):
    """`count` rows from `row` on go into the slots from `slot` on."""

    slot: int
    row: int
    count: int


class MlxSlab(Slab):
    """Keys and values of each layer, [G, slots so far, D]."""

    def __init__(self, spec: SlabSpec) -> None:
        super().__init__(spec)
        self._keys: list[mx.array] = []
        self._values: list[mx.array] = []

    def reserve(self, slots: int) -> None:
        """Has at least so many slots from now on; new ones are zeros, for a masked slot is multiplied by 0."""
        spec = self.spec
        missing = slots - (self._keys[0].shape[1] if self._keys else 0)
        if missing <= 0:
            return
        more = mx.zeros((spec.kv_heads, missing, spec.head_dim), as_mlx(spec.dtype))
        for arrays in (self._keys, self._values):
            arrays[:] = [mx.concatenate((array, more), axis=1) for array in arrays] or [more] * spec.layers
        mx.eval(self._keys, self._values)

    def write(self, layer: int, runs: tuple[Run, ...], end: int, keys: mx.array, values: mx.array) -> None:
        """Puts `keys` and `values` [G, N, D] of consecutive positions up to `end` (exclusive) into the slots of `runs`."""
        for arrays, rows in ((self._keys, keys), (self._values, values)):
            # Assigning changes the array that is named, and another slab may name the same one.
            arrays[layer] = apart = alias(arrays[layer])
            for slot, row, count in runs:
                apart[:, slot : slot + count] = rows[:, row : row + count]
        self.advance(layer, end)

    def held(self, layer: int, extent: int) -> tuple[mx.array, mx.array]:
        """Keys and values [G, extent, D] of a layer's first slots."""
        return self._keys[layer][:, :extent], self._values[layer][:, :extent]

    def arrays(self) -> list[mx.array]:
        """All that a forward has to evaluate."""
        return [*self._keys, *self._values]

    def copy_from(self, other: Slab) -> None:
        """Shares the arrays of `other` until either is written."""
        assert isinstance(other, MlxSlab)
        self.clear()
        self._keys, self._values = ([alias(array) for array in arrays] for arrays in (other._keys, other._values))
        self._frontiers = [other.frontier] * self.spec.layers

    def contents(self) -> tuple[Tensor, Tensor]:
        spec = self.spec
        if not self._keys:
            nothing = torch.empty(spec.layers, spec.kv_heads, 0, spec.head_dim, dtype=spec.dtype)
            return nothing, nothing
        keys, values = (
            torch.stack([to_torch(array)[:, : self.used] for array in arrays]) for arrays in (self._keys, self._values)
        )
        return keys, values

    def put(self, keys: Tensor, values: Tensor) -> None:
        count = keys.shape[2]
        if count == 0:
            return
        # The last slot that is used says how many there have to be.
        extent = self.spec.extent(count - 1)
        self._keys, self._values = (
            [to_mlx(torch.nn.functional.pad(layer, (0, 0, 0, extent - count))) for layer in given]
            for given in (keys, values)
        )

    def blank(self) -> None:
        keys, values = self.contents()
        missing = (0, 0, 0, self.spec.slots - min(keys.shape[2], self.spec.sink))
        sinks = slice(self.spec.sink)
        self.put(
            torch.nn.functional.pad(keys[:, :, sinks], missing), torch.nn.functional.pad(values[:, :, sinks], missing)
        )


def mlx_pool(spec: SlabSpec, count: int) -> SlabPool:
    """`count` slabs, each of arrays of its own."""
    return SlabPool(spec, (MlxSlab(spec) for _ in range(count)))


def as_mlx(dtype: torch.dtype) -> mx.Dtype:
    """MLX's name for a type."""
    found = getattr(mx, str(dtype).removeprefix("torch."))
    assert isinstance(found, mx.Dtype)
    return found


def alias(array: mx.array) -> mx.array:
    """Another name of the same array: to assign to one leaves the other as it is."""
    return array.astype(array.dtype)


def to_torch(array: mx.array) -> Tensor:
    """A copy of an evaluated array. NumPy has no bfloat16, so its bits go over as whole numbers."""
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
