"""Slabs of torch tensors, those of a pool side by side. Pages of memory are touched only as tokens arrive."""

from __future__ import annotations

import mmap
import weakref
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from runtime.dtypes import dtype_named
from runtime.errors import CapacityExhausted
from runtime.slab import Slab, SlabPool
from runtime.slab_spec import SlabSpec

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, eq=False)
class SlabStore:
    """The memory of slabs that lie side by side: keys and values [L, B, G, S, W].

    For recurrent layers: `inputs` [layers, B, tokens, columns], and their `states` [layers, B, chunks, *shape].
    """

    keys: Tensor
    values: Tensor
    inputs: Tensor | None = None
    states: Tensor | None = None

    def stacked(self, layer: int, slabs: slice, extent: int) -> tuple[Tensor, Tensor]:
        """Keys and values [slabs, G, extent, W] of one layer, where they lie."""
        return self.keys[layer, slabs, :, :extent], self.values[layer, slabs, :, :extent]


class TorchSlab(Slab):
    """The slab of number `index` in a store: `keys` and `values` [L, G, S, W]."""

    def __init__(self, spec: SlabSpec, store: SlabStore, index: int, *, is_wiped: bool = True) -> None:
        super().__init__(spec, is_wiped=is_wiped)
        self.store = store
        self.index = index
        self.keys = store.keys[:, index]
        self.values = store.values[:, index]
        self._inputs = None if store.inputs is None else store.inputs[:, index]
        self._states = None if store.states is None else store.states[:, index]

    def write(self, layer: int, slots: Tensor, end: int, keys: Tensor, values: Tensor) -> None:
        """Puts `keys` and `values` [G, N, D] of consecutive positions up to `end` (exclusive) into `slots` [N]."""
        self.keys[layer].index_copy_(1, slots, keys)
        self.values[layer].index_copy_(1, slots, values)
        self.advance(layer, end)

    def write_inputs(self, layer: int, rows: Tensor, start: int) -> None:
        """Keeps a recurrent layer's inputs, `rows` [N, columns], for the positions from `start` on."""
        assert self._inputs is not None
        places = torch.arange(start, start + len(rows), device=rows.device) % self.spec.inputs
        self._inputs[layer].index_copy_(0, places, rows)
        self.advance(self.spec.layers + layer, start + len(rows))

    def read_inputs(self, layer: int, start: int, stop: int) -> Tensor:
        """A recurrent layer's inputs for positions from `start` to `stop` (exclusive), [N, columns]; zeros before position 0."""
        assert self._inputs is not None
        before = max(0, -start)
        places = torch.arange(start + before, stop, device=self._inputs.device) % self.spec.inputs
        return nn.functional.pad(self._inputs[layer].index_select(0, places), (0, 0, before, 0))

    def state(self, layer: int, chunk: int) -> Tensor:
        """A view of a recurrent layer's state before the chunk with this number, to read or write."""
        assert self._states is not None
        return self._states[layer, chunk % self.spec.states]

    def recurrent_tensors(self) -> tuple[Tensor, ...]:
        return tuple(layer for held in (self._inputs, self._states) if held is not None for layer in held)

    def held(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.keys[layer, :, : self.used], self.values[layer, :, : self.used]

    def put(self, layer: int, keys: Tensor, values: Tensor) -> None:
        for store, given in ((self.keys, keys), (self.values, values)):
            store[layer, :, : given.shape[1]].copy_(given)

    def zero(self, first: int, last: int) -> None:
        for store in (self.keys, self.values):
            store[:, :, first:last].zero_()


def as_torch(slab: Slab) -> TorchSlab:
    """The slab, which must be a TorchSlab."""
    assert isinstance(slab, TorchSlab)
    return slab


class SlabArena:
    """Makes pools of slabs from one store, which never moves. A slab that is collected becomes available again."""

    def __init__(self, spec: SlabSpec, count: int, device: torch.device = _CPU, *, are_wiped: bool = True) -> None:
        dtype = dtype_named(spec.dtype)
        shape = (spec.layers, count, spec.kv_heads, spec.slots, spec.width)
        inputs = states = None
        if recurrent := spec.recurrent:
            inputs = _lazy_zeros((recurrent.layers, count, spec.inputs, recurrent.columns), dtype, device)
            if recurrent.state:
                shape_of_all = (recurrent.layers, count, spec.states, *recurrent.state)
                states = _lazy_zeros(shape_of_all, torch.float32, device)
        keys, values = (_lazy_zeros(shape, dtype, device) for _ in range(2))
        self.spec, self.device = spec, device
        self._are_wiped = are_wiped
        self.store = SlabStore(keys, values, inputs, states)
        # Those that were used longest ago, or never, are handed out first.
        self._free = deque(range(count))

    @property
    def left(self) -> int:
        return len(self._free)

    def pool(self, count: int) -> SlabPool:
        """A pool of `count` slabs. Raises CapacityExhausted where fewer are left."""
        if count > self.left:
            raise CapacityExhausted(f"{self.left} slabs are left to make a pool of {count}: raise capacity")
        return SlabPool(self.spec, [self._slab(self._free.popleft()) for _ in range(count)])

    def _slab(self, index: int) -> TorchSlab:
        slab = TorchSlab(self.spec, self.store, index, is_wiped=self._are_wiped)
        weakref.finalize(slab, self._free.append, index)
        return slab


def torch_pool(spec: SlabSpec, count: int, device: torch.device = _CPU) -> SlabPool:
    """`count` slabs in a store of their own."""
    return SlabArena(spec, count, device).pool(count)


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros whose pages the system provides on first touch. A masked slot is multiplied by 0, so it must be finite."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    count = torch.Size(shape).numel()
    pages = mmap.mmap(-1, max(1, count * dtype.itemsize), flags=mmap.MAP_PRIVATE)
    return torch.frombuffer(pages, dtype=dtype, count=count).view(shape)
