"""The slab: one session's keys and values, of fixed size, written in place.

Letters for shapes, here and in the engine: L layers, B slabs, G kv heads, Q query heads a kv head, S slots, D head
dimension, N rows.

The first `sink` slots hold the first tokens for ever; the others are a ring, so that a position's slot is a function of
the position alone. What lies in a slot, seen from a query at position q, follows from q too, and the mask needs no
record of what was written when.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.errors import CapacityExhausted

# Attention covers whole buckets of slots, so that a long window costs nothing while the history is short.
BUCKET_SLOTS = 256


@dataclass(frozen=True, slots=True)
class SlabSpec:
    """The shape of every slab of one engine; `row_tile` is the most rows that one forward brings."""

    layers: int
    kv_heads: int
    head_dim: int
    sink: int
    window: int
    row_tile: int
    dtype: torch.dtype
    device: torch.device

    @property
    def ring(self) -> int:
        # Room for a whole tile besides the window: its first row still needs the window - 1 tokens before it.
        return self.window + self.row_tile

    @property
    def slots(self) -> int:
        return self.sink + self.ring

    @property
    def visible(self) -> int:
        """The most tokens that one token attends to."""
        return self.sink + self.window

    @property
    def token_bytes(self) -> int:
        """Bytes that one token holds: keys and values of all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def ceiling_bytes(self) -> int:
        """Bytes that one slab can ever hold."""
        return self.slots * self.token_bytes

    def slot(self, position: int) -> int:
        """Where the token at `position` lies."""
        return position if position < self.sink else self.sink + (position - self.sink) % self.ring

    def extent(self, position: int) -> int:
        """How many of the first slots a query at `position` attends over: a function of the position alone."""
        needed = min(position + 1, self.slots)
        return min(-(-needed // BUCKET_SLOTS) * BUCKET_SLOTS, self.slots)

    def visible_slots(self, positions: Tensor, extent: int) -> Tensor:
        """Whether the query at each of `positions` [N] attends to each of the first `extent` slots, bool [N, extent]."""
        query = positions.unsqueeze(1)  # [N, 1]
        slot = torch.arange(extent, device=positions.device).unsqueeze(0)  # [1, extent]
        is_sink = slot < self.sink
        age = torch.where(is_sink, query - slot, (query - slot) % self.ring)
        held = query - age
        in_window = (age < self.window) & (held >= self.sink)
        return torch.where(is_sink, age >= 0, in_window)


@dataclass(frozen=True, slots=True, eq=False)
class SlabStore:
    """The memory of slabs that lie side by side: keys and values [L, B, G, S, D]."""

    keys: Tensor
    values: Tensor

    def stacked(self, layer: int, slabs: slice, extent: int) -> tuple[Tensor, Tensor]:
        """Keys and values [slabs * G, extent, D] of one layer, where they lie."""
        keys, values = (store[layer, slabs].flatten(0, 1)[:, :extent] for store in (self.keys, self.values))
        return keys, values


class Slab:
    """Keys and values [L, G, S, D] of one session. Positions are written in order; a rewritten one keeps its slot."""

    def __init__(self, spec: SlabSpec, store: SlabStore, index: int) -> None:
        self.spec = spec
        self.store = store
        self.index = index
        self.keys = store.keys[:, index]
        self.values = store.values[:, index]
        self._frontiers = [0] * spec.layers

    @property
    def frontiers(self) -> tuple[int, ...]:
        """For each layer, one more than the last position written there."""
        return tuple(self._frontiers)

    @property
    def frontier(self) -> int:
        """One more than the last position that every layer holds."""
        return min(self._frontiers)

    @property
    def live_length(self) -> int:
        """Tokens held that a later token may attend to, in the layer that has the fewest."""
        return min(self.frontier, self.spec.visible)

    @property
    def live_bytes(self) -> int:
        return self.live_length * self.spec.token_bytes

    def write(self, layer: int, slots: Tensor, end: int, keys: Tensor, values: Tensor) -> None:
        """Puts `keys` and `values` [G, N, D] of consecutive positions up to `end` (exclusive) into `slots` [N]."""
        self.keys[layer].index_copy_(1, slots, keys)
        self.values[layer].index_copy_(1, slots, values)
        self._frontiers[layer] = max(self._frontiers[layer], end)

    def copy_from(self, other: Slab) -> None:
        """Holds from now on what `other`, of the same shape, holds."""
        used = min(other.frontier, self.spec.slots)
        self.fill(other.keys[:, :, :used], other.values[:, :, :used], other.frontier)

    def fill(self, keys: Tensor, values: Tensor, frontier: int) -> None:
        """Holds `keys` and `values` [L, G, slots, D], the first slots of a slab whose next position is `frontier`.

        Raises ValueError, and is empty then, where they are of another shape or type than this slab.
        """
        used = min(frontier, self.spec.slots)
        self.clear()
        for store, given in ((self.keys, keys), (self.values, values)):
            held = store[:, :, :used]
            if given.shape != held.shape or given.dtype != held.dtype:
                raise ValueError(f"keys and values are {given.dtype} {tuple(given.shape)}, not {tuple(held.shape)}")
            held.copy_(given)
        self._frontiers = [frontier] * self.spec.layers

    def retract(self, frontier: int) -> None:
        """Forgets what was written from `frontier` on, at most a tile less one of rows: the window is whole still."""
        assert self.frontier - self.spec.row_tile < frontier
        self._frontiers = [min(frontier, each) for each in self._frontiers]

    def skip(self, frontier: int) -> None:
        """Goes on at `frontier`: of what lies before it only the sinks are there, and the rest is seen as zeros."""
        for store in (self.keys, self.values):
            store[:, :, self.spec.sink :].zero_()
        self._frontiers = [max(frontier, each) for each in self._frontiers]

    def clear(self) -> None:
        """Forgets every token. The bytes stay; no later query sees them."""
        self._frontiers = [0] * self.spec.layers


class SlabPool:
    """`count` slabs, allocated once. Pages of memory are touched only as tokens arrive."""

    def __init__(self, spec: SlabSpec, count: int) -> None:
        self.spec = spec
        self.total = count
        shape = (spec.layers, count, spec.kv_heads, spec.slots, spec.head_dim)
        store = SlabStore(_lazy_zeros(shape, spec), _lazy_zeros(shape, spec))
        self._free = [Slab(spec, store, index) for index in reversed(range(count))]

    @property
    def in_use(self) -> int:
        return self.total - len(self._free)

    def acquire(self) -> Slab:
        """An empty slab. Raises CapacityExhausted, and changes nothing, when none is free."""
        if not self._free:
            raise CapacityExhausted(f"all {self.total} slabs are in use: close a session or try again later")
        slab = self._free.pop()
        slab.clear()
        return slab

    def release(self, slab: Slab) -> None:
        assert slab not in self._free
        self._free.append(slab)


def _lazy_zeros(shape: tuple[int, ...], spec: SlabSpec) -> Tensor:
    """Zeros whose pages the system provides on first touch. A masked slot is multiplied by 0, so it must be finite."""
    if spec.device.type != "cpu":
        return torch.zeros(shape, dtype=spec.dtype, device=spec.device)
    count = torch.Size(shape).numel()
    pages = mmap.mmap(-1, max(1, count * spec.dtype.itemsize), flags=mmap.MAP_PRIVATE)
    return torch.frombuffer(pages, dtype=spec.dtype, count=count).view(shape)
