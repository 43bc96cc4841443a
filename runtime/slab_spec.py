"""The shape of a slab: what it holds, where in it a token lies, and how many bytes it can come to.

The first `sink` slots hold the first tokens for ever; the others are a ring, so that a position's slot is a function of
the position alone. What lies in a slot, seen from a query at position q, follows from q too, and the mask needs no
record of what was written when.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# Attention covers whole buckets of slots, so that a long window costs nothing while the history is short.
BUCKET_SLOTS = 256
# A state is kept before each so many positions: fewer cost memory, more cost a lone row the work of a longer chunk.
CHUNK = 16
# Behind the whole numbers of an int8 row comes what they count, in float32.
SCALE_BYTES = 4
# So many slots are whole lines of 64 bytes, whatever the head dimension.
_LINE_SLOTS = 32
_ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
_STATE_BYTES = _ITEM_BYTES["float32"]


@dataclass(frozen=True, slots=True)
class RecurrentSpec:
    """What the recurrent `layers` keep. An input has `columns` values; a token reads the inputs of `reach` tokens before it.

    `state` is the shape, in float32, of what a layer remembers of all tokens before a chunk; empty for a layer without one.
    """

    layers: int
    columns: int
    reach: int
    state: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SlabSpec:
    """The shape of every slab of one engine; `row_tile` is the most rows that one forward brings, `bucket` counts slots.

    `layers` are those that attend. `dtype` names the type that slots hold.
    """

    layers: int
    kv_heads: int
    head_dim: int
    sink: int
    window: int
    row_tile: int
    dtype: str
    bucket: int = BUCKET_SLOTS
    recurrent: RecurrentSpec | None = None

    @property
    def inputs(self) -> int:
        """How many inputs a recurrent layer keeps: a tile to take back, a tile to read, and the start of a chunk."""
        assert self.recurrent is not None
        needed = 2 * self.row_tile + CHUNK + self.recurrent.reach
        return -(-needed // _LINE_SLOTS) * _LINE_SLOTS

    @property
    def states(self) -> int:
        """How many states a recurrent layer keeps: one before each chunk that a tile can touch, to take a tile back."""
        return -(-self.row_tile // CHUNK) + 1

    @property
    def kept_bytes(self) -> int:
        """Bytes that recurrent layers keep. They do not grow with the session."""
        if self.recurrent is None:
            return 0
        state = math.prod(self.recurrent.state) * _STATE_BYTES if self.recurrent.state else 0
        return self.recurrent.layers * (self.inputs * self.recurrent.columns * self.item_bytes + self.states * state)

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
    def item_bytes(self) -> int:
        """Bytes of one value that a slot holds."""
        return _ITEM_BYTES[self.dtype]

    @property
    def width(self) -> int:
        """Values that a slot holds of a head's keys."""
        return self.head_dim + (SCALE_BYTES if self.dtype == "int8" else 0)

    @property
    def token_bytes(self) -> int:
        """Bytes that one token holds: keys and values of all layers that attend."""
        return 2 * self.layers * self.kv_heads * self.width * self.item_bytes

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
        return written - self.ring <= oldest and written - self.inputs <= first and has_state

    def lasting_sinks(self, window: int | None) -> slice:
        """The slots of the first tokens that a query past the window sees in a layer with a `window` of its own, or without."""
        return slice(0 if window is None else min(self.sink, max(0, self.visible - window)), self.sink)
