"""The slab: one session's keys and values, and what its recurrent layers keep, of fixed size, written in place.

Letters for shapes, here and in the engines: L layers, B slabs, G kv heads, Q query heads a kv head, S slots, D head
dimension, W what a slot holds of a head, N rows. W is D; where slabs are int8 it is D whole numbers and their scale's bytes.

A recurrent layer keeps two rings: its inputs for the last tokens, and the state before each of the last chunks of
positions. A row's output follows from the state before its chunk and the inputs inside it, so a position that is
written anew, as after a proposal that failed, needs nothing to be undone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from runtime.dtypes import dtype_named, name_of
from runtime.errors import CapacityExhausted
from runtime.slab_spec import SlabSpec

_LARGEST_INT8 = 127


def visible_slots(spec: SlabSpec, positions: Tensor, extent: int, window: int | None = None) -> Tensor:
    """Whether the query at each of `positions` [N] attends to each of the first `extent` slots, bool [N, extent].

    A layer with a `window` of its own sees of them what is nearer than that. A sink is as far away as the model is told.
    """
    query = positions.unsqueeze(1)  # [N, 1]
    slot = torch.arange(extent, device=positions.device).unsqueeze(0)  # [1, extent]
    is_sink = slot < spec.sink
    age = torch.where(is_sink, query - slot, (query - slot) % spec.ring)
    held = query - age
    in_window = (age < spec.window) & (held >= spec.sink)
    seen = torch.where(is_sink, age >= 0, in_window)
    if window is None:
        return seen
    distance = torch.where(is_sink, query.clamp(max=spec.visible - 1) - slot, age)
    return seen & (distance < window)


def as_held(rows: Tensor, dtype: str) -> Tensor:
    """Rows [..., D] as slabs of this type hold them, [..., W]; int8 rounds them to 127ths of their largest value."""
    if dtype != "int8":
        return rows.to(dtype_named(dtype))
    rows = rows.float()
    largest = rows.abs().amax(dim=-1, keepdim=True)
    shrunk = torch.where(largest > 0, _LARGEST_INT8 / largest, 0)
    return torch.cat(((rows * shrunk).round().to(torch.int8), (largest / _LARGEST_INT8).view(torch.int8)), dim=-1)


class Slab(ABC):
    """What one session's layers hold. Positions are written in order; a rewritten one keeps its slot.

    An engine's own kind of slab holds them, in arrays of its backend.
    """

    def __init__(self, spec: SlabSpec, *, is_wiped: bool = True) -> None:
        """If it `is_wiped`, what was written is set to zero before the next session writes.

        Attention that multiplies a slot that a query does not see by 0 needs that: what an earlier session left there would
        reach the next one's logits if it were no number.
        """
        self.spec = spec
        self._is_wiped = is_wiped
        self._layers = spec.layers + (spec.recurrent.layers if spec.recurrent else 0)
        self._frontiers = [0] * self._layers
        self._written = 0
        self._leases = 0

    @property
    def leases(self) -> int:
        """How often the slab was lent or given back. A reader that finds the same number at its end had the slab all the time."""
        return self._leases

    def change_hands(self) -> None:
        """Counts that the slab was lent or given back."""
        self._leases += 1

    @property
    def frontiers(self) -> tuple[int, ...]:
        """For each layer, those that attend first, one more than the last position written there."""
        return tuple(self._frontiers)

    @property
    def frontier(self) -> int:
        """One more than the last position that every layer holds."""
        return min(self._frontiers)

    @property
    def written(self) -> int:
        """One more than the last position that was ever written since the slab was empty: older ones may be written over."""
        return self._written

    def is_whole(self, frontier: int) -> bool:
        """Whether the slab still holds everything that a token at `frontier` needs."""
        return self.spec.is_whole(self._written, frontier)

    @property
    def live_length(self) -> int:
        """Tokens held that a later token may attend to, in the layer that has the fewest."""
        return min(self.frontier, self.spec.visible)

    @property
    def live_bytes(self) -> int:
        return self.live_length * self.spec.token_bytes + (self.spec.kept_bytes if self.live_length else 0)

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
            if given.shape != shape or name_of(given.dtype) != spec.dtype:
                raise ValueError(
                    f"keys and values are {name_of(given.dtype)} {tuple(given.shape)}, not {spec.dtype} {shape}"
                )
        for layer in range(spec.layers):
            self.put(layer, keys[layer], values[layer])
        self.advance_all(frontier)

    def copy_from(self, other: Slab) -> None:
        """Holds from now on what `other`, of the same shape, holds."""
        self.clear()
        for layer in range(self.spec.layers):
            self.put(layer, *other.held(layer))
        for mine, theirs in zip(self.recurrent_tensors(), other.recurrent_tensors(), strict=True):
            mine.copy_(theirs)
        self.resume(other.frontier, other.written)

    def retract(self, frontier: int) -> None:
        """Forgets what was written from `frontier` on. What is left must be whole (`is_whole`)."""
        assert self.is_whole(frontier)
        self._frontiers = [min(frontier, each) for each in self._frontiers]

    def skip(self, frontier: int) -> None:
        """Moves the frontier to `frontier`: of the positions before it only the sinks are held, and the others read as zeros."""
        self.zero(self.spec.sink, self.spec.slots)
        for one in self.recurrent_tensors():
            one.zero_()
        self.advance_all(frontier)

    def keep(self, length: int) -> None:
        """Keeps of an earlier session the first `length` positions, which must be whole, for one that begins alike."""
        self._wipe(length)
        self.retract(length)

    def clear(self) -> None:
        """Forgets every token."""
        self._wipe(0)
        self._frontiers = [0] * self._layers
        self._written = 0

    def _wipe(self, position: int) -> None:
        """Zeros what was written from `position` on, unless attention reads none of it."""
        spec = self.spec
        if not self._is_wiped or position >= self._written:
            return
        if self._written - position >= spec.ring:
            self.zero(min(position, spec.sink), spec.slots)
            return
        first, last = spec.slot(position), spec.slot(self._written - 1) + 1
        if first < last:
            self.zero(first, last)
        else:
            self.zero(first, spec.slots)
            self.zero(spec.sink, last)

    def advance(self, layer: int, end: int) -> None:
        """Marks the positions up to `end` (exclusive) as held by a layer."""
        self._frontiers[layer] = max(self._frontiers[layer], end)
        self._written = max(self._written, end)

    def advance_all(self, end: int) -> None:
        """Marks the positions up to `end` (exclusive) as held by every layer."""
        for layer in range(self._layers):
            self.advance(layer, end)

    def resume(self, frontier: int, written: int) -> None:
        """Sets the marks of an empty slab that was filled from another one, which was once `written` further than `frontier`."""
        self.advance_all(frontier)
        self._written = max(frontier, written)

    def recurrent_tensors(self) -> tuple[Tensor, ...]:
        """The tensors that recurrent layers keep, always in the same order, to be read or written in place."""
        return ()

    @abstractmethod
    def held(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [G, used, W] of a layer's slots that are used."""

    @abstractmethod
    def put(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Writes keys and values [G, slots, W] into a layer's first slots."""

    @abstractmethod
    def zero(self, first: int, last: int) -> None:
        """Sets the slots from `first` to `last` (exclusive) to zero."""


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
        is_only_one = len(self._free) == 1
        # Of those that have as much, the one that gives up least.
        best = max(
            (slab for slab, length in lengths.items() if is_only_one or length > len(self._free[slab]) - length),
            key=lambda slab: (lengths[slab], -len(self._free[slab])),
            default=None,
        )
        if best is None or not lengths[best]:
            # What was read longest ago is least likely to be asked for again.
            best = next((slab for slab, read in self._free.items() if not read), next(iter(self._free)))
        del self._free[best]
        best.change_hands()
        if length := lengths.get(best, 0):
            best.keep(length)
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

    def close(self) -> None:
        """Lets go of the slabs that are free, and of their memory, where no engine keeps it for the next pool."""
        self.total = self.in_use
        self._free.clear()

    def _useful(self, slab: Slab, read: array[int], history: array[int] | None) -> int:
        """How many tokens from the history's start a slab has read and still holds whole."""
        length = common_length(read, history or array("I"))
        return length if slab.is_whole(length) else 0


def common_length(one: array[int], other: array[int]) -> int:
    """How many tokens two histories begin with alike."""
    most = min(len(one), len(other))
    differ = np.flatnonzero(np.asarray(one[:most]) != np.asarray(other[:most]))
    return int(differ[0]) if len(differ) else most
