"""The slab: one session's keys and values, and what its recurrent layers keep, of fixed size, written in place.

Letters for shapes, here and in the engines: L layers, B slabs, G kv heads, Q query heads a kv head, S slots, D head
dimension, W what a slot holds of a head, N rows. W is D; where slabs are int8 it is D whole numbers and their scale's bytes.

The first `sink` slots hold the first tokens for ever; the others are a ring, so that a position's slot is a function of
the position alone. What lies in a slot, seen from a query at position q, follows from q too, and the mask needs no
record of what was written when.

A recurrent layer keeps two rings of the same nature: what it was given for each of the last tokens, and the state before
each of the last chunks of positions. A row's output follows from the state before its chunk and what was given inside it,
so a position that is written anew, as after a proposal that failed, needs nothing to be undone.
"""

from __future__ import annotations

import math
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
# A state is kept before each so many positions: fewer cost memory, more cost a lone row the work of a longer chunk.
CHUNK = 16


@dataclass(frozen=True, slots=True)
class RecurrentSpec:
    """What each of some recurrent `layers` keeps: for a token `columns` that it is given, of which it reads `reach` back.

    `state` is the shape of what it remembers of all tokens before a chunk, in float32; none where it reads tokens alone.
    """

    layers: int
    columns: int
    reach: int
    state: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SlabSpec:
    """The shape of every slab of one engine; `row_tile` is the most rows that one forward brings, `bucket` counts slots.

    `layers` are those that attend.
    """

    layers: int
    kv_heads: int
    head_dim: int
    sink: int
    window: int
    row_tile: int
    dtype: torch.dtype
    device: torch.device
    bucket: int = BUCKET_SLOTS
    recurrent: RecurrentSpec | None = None

    @property
    def given(self) -> int:
        """Tokens whose input a recurrent layer keeps: a tile is taken back, another is read, and a chunk begins before both."""
        assert self.recurrent is not None
        needed = 2 * self.row_tile + CHUNK + self.recurrent.reach
        return -(-needed // _LINE_SLOTS) * _LINE_SLOTS

    @property
    def states(self) -> int:
        """Chunks before which a recurrent layer keeps its state: those that a tile touches which is taken back."""
        return -(-self.row_tile // CHUNK) + 1

    @property
    def kept_bytes(self) -> int:
        """Bytes that recurrent layers keep, however long the session."""
        if self.recurrent is None:
            return 0
        state = math.prod(self.recurrent.state) * torch.float32.itemsize if self.recurrent.state else 0
        return self.recurrent.layers * (self.given * self.recurrent.columns * self.dtype.itemsize + self.states * state)

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
        """Bytes that one token holds: keys and values of all layers that attend."""
        return 2 * self.layers * self.kv_heads * self.width * self.dtype.itemsize

    @property
    def ceiling_bytes(self) -> int:
        """Bytes that one slab can ever hold."""
        return self.slots * self.token_bytes + self.kept_bytes

    def slot(self, position: int) -> int:
        """Where the token at `position` lies."""
        return position if position < self.sink else self.sink + (position - self.sink) % self.ring

    def extent(self, position: int) -> int:
        """How many of the first slots a query at `position` attends over: a function of the position alone."""
        needed = min(position + 1, self.slots)
        return min(-(-needed // self.bucket) * self.bucket, self.slots)

    def is_whole(self, written: int, frontier: int) -> bool:
        """Whether a slab that was written up to `written` still holds all that a token at `frontier` needs."""
        oldest = max(self.sink, frontier - self.window + 1)
        if frontier >= written:
            return True
        if self.recurrent is None or not frontier:
            return written - self.ring <= oldest
        chunk = frontier // CHUNK
        first = max(0, chunk * CHUNK - self.recurrent.reach)
        # Before the first chunk there is no state to be kept.
        has_state = not chunk or written // CHUNK - chunk < self.states
        return written - self.ring <= oldest and written - self.given <= first and has_state

    def visible_slots(self, positions: Tensor, extent: int, window: int | None = None) -> Tensor:
        """Whether the query at each of `positions` [N] attends to each of the first `extent` slots, bool [N, extent].

        A layer with a `window` of its own sees of them what is nearer than that. A sink is as far away as the model is told.
        """
        query = positions.unsqueeze(1)  # [N, 1]
        slot = torch.arange(extent, device=positions.device).unsqueeze(0)  # [1, extent]
        is_sink = slot < self.sink
        age = torch.where(is_sink, query - slot, (query - slot) % self.ring)
        held = query - age
        in_window = (age < self.window) & (held >= self.sink)
        seen = torch.where(is_sink, age >= 0, in_window)
        if window is None:
            return seen
        distance = torch.where(is_sink, query.clamp(max=self.visible - 1) - slot, age)
        return seen & (distance < window)

    def lasting_sinks(self, window: int | None) -> slice:
        """The slots of the first tokens that a query past the window sees in a layer with a `window` of its own, or without."""
        return slice(0 if window is None else min(self.sink, max(0, self.visible - window)), self.sink)


def as_held(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows [..., D] as slabs of this type hold them, [..., W]; int8 rounds them to 127ths of their largest value."""
    if dtype != torch.int8:
        return rows.to(dtype)
    rows = rows.float()
    largest = rows.abs().amax(dim=-1, keepdim=True)
    shrunk = torch.where(largest > 0, _LARGEST_INT8 / largest, 0)
    return torch.cat(((rows * shrunk).round().to(dtype), (largest / _LARGEST_INT8).view(dtype)), dim=-1)


class Slab(ABC):
    """What one session's layers hold. Positions are written in order; a rewritten one keeps its slot.

    An engine's own kind of slab holds them, in arrays of its backend.
    """

    def __init__(self, spec: SlabSpec) -> None:
        self.spec = spec
        self._layers = spec.layers + (spec.recurrent.layers if spec.recurrent else 0)
        self._frontiers = [0] * self._layers
        self._written = 0
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
        """Whether all is held still that a token at `frontier` attends to or goes on from."""
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
            if given.shape != shape or given.dtype != spec.dtype:
                raise ValueError(f"keys and values are {given.dtype} {tuple(given.shape)}, not {spec.dtype} {shape}")
        for layer in range(spec.layers):
            self.put(layer, keys[layer], values[layer])
        self.advance_all(frontier)

    def copy_from(self, other: Slab) -> None:
        """Holds from now on what `other`, of the same shape, holds."""
        self.clear()
        for layer in range(self.spec.layers):
            self.put(layer, *other.held(layer))
        for mine, theirs in zip(self.kept(), other.kept(), strict=True):
            mine.copy_(theirs)
        self.resume(other.frontier, other.written)

    def retract(self, frontier: int) -> None:
        """Forgets what was written from `frontier` on. What is left must be whole (`is_whole`)."""
        assert self.is_whole(frontier)
        self._frontiers = [min(frontier, each) for each in self._frontiers]

    def skip(self, frontier: int) -> None:
        """Goes on at `frontier`: of what lies before it only the sinks are there, and the rest is seen as zeros."""
        self.blank()
        for one in self.kept():
            one.zero_()
        self.advance_all(frontier)

    def clear(self) -> None:
        """Forgets every token. The bytes stay; no later query sees them."""
        self._frontiers = [0] * self._layers
        self._written = 0

    def advance(self, layer: int, end: int) -> None:
        """Says that a layer holds the positions up to `end` (exclusive)."""
        self._frontiers[layer] = max(self._frontiers[layer], end)
        self._written = max(self._written, end)

    def advance_all(self, end: int) -> None:
        """Says that every layer holds the positions up to `end` (exclusive)."""
        for layer in range(self._layers):
            self.advance(layer, end)

    def resume(self, frontier: int, written: int) -> None:
        """Says that an empty slab was filled with what another holds, which was `written` up to there and went back."""
        self.advance_all(frontier)
        self._written = max(frontier, written)

    def kept(self) -> tuple[Tensor, ...]:
        """What recurrent layers keep, in one order, to be read or written in place."""
        return ()

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
        return length if slab.is_whole(length) else 0


def common_length(one: array[int], other: array[int]) -> int:
    """How many tokens two histories begin with alike."""
    most = min(len(one), len(other))
    differ = np.flatnonzero(np.asarray(one[:most]) != np.asarray(other[:most]))
    return int(differ[0]) if len(differ) else most
