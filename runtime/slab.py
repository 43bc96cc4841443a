"""The slab: one session's keys and values, of fixed size, written in place.

Letters for shapes, here and in the engines: L layers, B slabs, G kv heads, Q query heads a kv head, S slots, D head
dimension, W what a slot holds of a head, N rows. W is D; where slabs are int8 it is D whole numbers and their scale's bytes.

The first `sink` slots hold the first tokens for ever; the others are a ring, so that a position's slot is a function of
the position alone. What lies in a slot, seen from a query at position q, follows from q too, and the mask needs no
record of what was written when.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from runtime.errors import CapacityExhausted

# Attention covers whole buckets of slots, so that a long window costs nothing while the history is short.
BUCKET_SLOTS = 256
# So many slots are whole lines of 64 bytes, whatever the head dimension.
_LINE_SLOTS = 32
# Behind the whole numbers of an int8 row comes what they count, in float32.
_SCALE_BYTES = torch.float32.itemsize
_LARGEST_INT8 = 127


@dataclass(frozen=True, slots=True)
class SlabSpec:
    """The shape of every slab of one engine; `row_tile` is the most rows that one forward brings, `bucket` counts slots."""

    layers: int
    kv_heads: int
    head_dim: int
    sink: int
    window: int
    row_tile: int
    dtype: torch.dtype
    device: torch.device
    bucket: int = BUCKET_SLOTS

    @property
    def ring(self) -> int:
        return self.slots - self.sink

    @property
    def slots(self) -> int:
        # Room for a whole tile besides the window: its first row still needs the window - 1 tokens before it. Each head's
        # slots begin at a whole line of memory, for kernels choose their order of sums by that too.
        needed = self.sink + self.window + self.row_tile
        return -(-needed // _LINE_SLOTS) * _LINE_SLOTS

    @property
    def visible(self) -> int:
        """The most tokens that one token attends to."""
        return self.sink + self.window

    @property
    def holds(self) -> str:
        """The name of the type that slots hold."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def width(self) -> int:
        """Values that a slot holds of a head's keys."""
        return self.head_dim + (_SCALE_BYTES if self.dtype == torch.int8 else 0)

    @property
    def token_bytes(self) -> int:
        """Bytes that one token holds: keys and values of all layers."""
        return 2 * self.layers * self.kv_heads * self.width * self.dtype.itemsize

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
        return min(-(-needed // self.bucket) * self.bucket, self.slots)

    def is_whole(self, written: int, frontier: int) -> bool:
        """Whether a slab that was written up to `written` still holds all that a token at `frontier` attends to."""
        oldest = max(self.sink, frontier - self.window + 1)
        return frontier >= written or written - self.ring <= oldest

    def visible_slots(self, positions: Tensor, extent: int) -> Tensor:
        """Whether the query at each of `positions` [N] attends to each of the first `extent` slots, bool [N, extent]."""
        query = positions.unsqueeze(1)  # [N, 1]
        slot = torch.arange(extent, device=positions.device).unsqueeze(0)  # [1, extent]
        is_sink = slot < self.sink
        age = torch.where(is_sink, query - slot, (query - slot) % self.ring)
        held = query - age
        in_window = (age < self.window) & (held >= self.sink)
        return torch.where(is_sink, age >= 0, in_window)


def as_held(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows [..., D] as slabs of this type hold them, [..., W]; int8 rounds them to 127ths of their largest value."""
    if dtype != torch.int8:
        return rows.to(dtype)
    rows = rows.float()
    largest = rows.abs().amax(dim=-1, keepdim=True)
    shrunk = torch.where(largest > 0, _LARGEST_INT8 / largest, 0)
    return torch.cat(((rows * shrunk).round().to(dtype), (largest / _LARGEST_INT8).view(dtype)), dim=-1)


class Slab(ABC):
    """Keys and values of one session. Positions are written in order; a rewritten one keeps its slot.

    An engine's own kind of slab holds them, in arrays of its backend.
    """

    def __init__(self, spec: SlabSpec) -> None:
        self.spec = spec
        self._frontiers = [0] * spec.layers
        self._leases = 0

    @property
    def leases(self) -> int:
        """How often it was lent and given back: who reads it over some time sees by this whether it was theirs throughout."""
        return self._leases

    def change_hands(self) -> None:
        """Is lent, or given back."""
        self._leases += 1

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

    @property
    def used(self) -> int:
        """Slots that hold something, from the first on."""
        return min(self.frontier, self.spec.slots)

    def fill(self, keys: Tensor, values: Tensor, frontier: int) -> None:
        """Holds `keys` and `values` [L, G, slots, W], the first slots of a slab whose next position is `frontier`.

        Raises ValueError, and is empty then, where they are of another shape or type than this slab.
        """
        self.clear()
        spec = self.spec
        shape = (spec.layers, spec.kv_heads, min(frontier, spec.slots), spec.width)
        for given in (keys, values):
            if given.shape != shape or given.dtype != spec.dtype:
                raise ValueError(f"keys and values are {given.dtype} {tuple(given.shape)}, not {spec.dtype} {shape}")
        for layer in range(spec.layers):
            self.put(layer, keys[layer], values[layer])
            self.advance(layer, frontier)

    def copy_from(self, other: Slab) -> None:
        """Holds from now on what `other`, of the same shape, holds."""
        self.clear()
        for layer in range(self.spec.layers):
            self.put(layer, *other.held(layer))
            self.advance(layer, other.frontier)

    def retract(self, frontier: int) -> None:
        """Forgets what was written from `frontier` on. The window that is left must be whole (`SlabSpec.is_whole`)."""
        assert self.spec.is_whole(self.frontier, frontier)
        self._frontiers = [min(frontier, each) for each in self._frontiers]

    def skip(self, frontier: int) -> None:
        """Goes on at `frontier`: of what lies before it only the sinks are there, and the rest is seen as zeros."""
        self.blank()
        for layer in range(self.spec.layers):
            self.advance(layer, frontier)

    def clear(self) -> None:
        """Forgets every token. The bytes stay; no later query sees them."""
        self._frontiers = [0] * self.spec.layers

    def advance(self, layer: int, end: int) -> None:
        """Says that a layer holds the positions up to `end` (exclusive)."""
        self._frontiers[layer] = max(self._frontiers[layer], end)

    @abstractmethod
    def held(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [G, used, W] of a layer's slots that are used."""

    @abstractmethod
    def put(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Writes keys and values [G, slots, W] into a layer's first slots."""

    @abstractmethod
    def blank(self) -> None:
        """Makes zeros of all slots but the sinks'."""


class SlabPool:
    """Slabs that are there from the start, lent to one session at a time. One that is free remembers what it has read."""

    def __init__(self, spec: SlabSpec, slabs: Iterable[Slab]) -> None:
        self.spec = spec
        # The one given back last stands last.
        self._free: dict[Slab, array[int]] = {slab: array("I") for slab in [*slabs][::-1]}
        self.total = len(self._free)

    @property
    def in_use(self) -> int:
        return self.total - len(self._free)

    def acquire(self, history: array[int] | None = None) -> Slab:
        """A slab that has read as much of the beginning of `history` as any that is free; without one an empty slab.

        No slab gives up more than it has of it, where there is another. Raises CapacityExhausted, and changes nothing,
        when none is free.
        """
        if not self._free:
            raise CapacityExhausted(f"all {self.total} slabs are in use: close a session or try again later")
        lengths = {slab: self._useful(slab, read, history) for slab, read in self._free.items() if history and read}
        best = max(lengths, key=lambda slab: lengths[slab], default=None)
        if best is None or (len(self._free) > 1 and lengths[best] <= len(self._free[best]) - lengths[best]):
            others = {slab: read for slab, read in self._free.items() if slab is not best}
            # What was read longest ago is least likely to be asked for again.
            best = next((slab for slab, read in others.items() if not read), next(iter(others)))
        del self._free[best]
        best.change_hands()
        if length := lengths.get(best, 0):
            best.retract(length)
        else:
            best.clear()
        return best

    def release(self, slab: Slab, read: array[int] | None = None) -> None:
        """Takes a slab back, which has read these tokens; without them it is emptied."""
        assert slab not in self._free
        slab.change_hands()
        if not read:
            slab.clear()
        self._free[slab] = read or array("I")

    def _useful(self, slab: Slab, read: array[int], history: array[int] | None) -> int:
        """How much of the history a slab has read and still holds whole."""
        length = common_length(read, history or array("I"))
        return length if self.spec.is_whole(slab.frontier, length) else 0


def common_length(one: array[int], other: array[int]) -> int:
    """How many tokens two histories begin with alike."""
    most = min(len(one), len(other))
    differ = np.flatnonzero(np.asarray(one[:most]) != np.asarray(other[:most]))
    return int(differ[0]) if len(differ) else most
