"""Slabs of torch tensors, those of a pool side by side. Pages of memory are touched only as tokens arrive."""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.slab import Slab, SlabPool, SlabSpec


@dataclass(frozen=True, slots=True, eq=False)
class SlabStore:
    """The memory of slabs that lie side by side: keys and values [L, B, G, S, W]."""

    keys: Tensor
    values: Tensor

    def stacked(self, layer: int, slabs: slice, extent: int) -> tuple[Tensor, Tensor]:
        """Keys and values [slabs, G, extent, W] of one layer, where they lie."""
        return self.keys[layer, slabs, :, :extent], self.values[layer, slabs, :, :extent]


class TorchSlab(Slab):
    """The slab of number `index` in a store: `keys` and `values` [L, G, S, W]."""

    def __init__(self, spec: SlabSpec, store: SlabStore, index: int) -> None:
        super().__init__(spec)
        self.store = store
        self.index = index
        self.keys = store.keys[:, index]
        self.values = store.values[:, index]

    def write(self, layer: int, slots: Tensor, end: int, keys: Tensor, values: Tensor) -> None:
        """Puts `keys` and `values` [G, N, D] of consecutive positions up to `end` (exclusive) into `slots` [N]."""
        self.keys[layer].index_copy_(1, slots, keys)
        self.values[layer].index_copy_(1, slots, values)
        self.advance(layer, end)

    def held(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.keys[layer, :, : self.used], self.values[layer, :, : self.used]

    def put(self, layer: int, keys: Tensor, values: Tensor) -> None:
        for store, given in ((self.keys, keys), (self.values, values)):
            store[layer, :, : given.shape[1]].copy_(given)

    def blank(self) -> None:
        for store in (self.keys, self.values):
            store[:, :, self.spec.sink :].zero_()


def as_torch(slab: Slab) -> TorchSlab:
    """The slab as what it must be: one of `torch_pool`."""
    assert isinstance(slab, TorchSlab)
    return slab


def torch_pool(spec: SlabSpec, count: int) -> SlabPool:
    """`count` slabs in one store."""
    shape = (spec.layers, count, spec.kv_heads, spec.slots, spec.width)
    store = SlabStore(_lazy_zeros(shape, spec), _lazy_zeros(shape, spec))
    return SlabPool(spec, (TorchSlab(spec, store, index) for index in range(count)))


def _lazy_zeros(shape: tuple[int, ...], spec: SlabSpec) -> Tensor:
    """Zeros whose pages the system provides on first touch. A masked slot is multiplied by 0, so it must be finite."""
    if spec.device.type != "cpu":
        return torch.zeros(shape, dtype=spec.dtype, device=spec.device)
    count = torch.Size(shape).numel()
    pages = mmap.mmap(-1, max(1, count * spec.dtype.itemsize), flags=mmap.MAP_PRIVATE)
    return torch.frombuffer(pages, dtype=spec.dtype, count=count).view(shape)
