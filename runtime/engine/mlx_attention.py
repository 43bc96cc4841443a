"""Attention of a row batch over slabs, in the place where mlx-lm's models call theirs.

The same as for torch, in MLX's operations: the sink and the window as of each query's own position, the distance to a sink
no longer than the longest inside the window. mlx-lm's rotating cache does not do that: there, how much a token sees depends
on how the history was cut into calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import mlx.core as mx
import torch
from torch import Tensor

from runtime.dtypes import dtype_named
from runtime.engine.mlx_slab import MlxSlab, Run, to_mlx
from runtime.engine.rotary import ExactRotary
from runtime.rows import Row, RowBatch, Stretch
from runtime.slab import visible_slots
from runtime.slab_spec import SlabSpec

Angles = tuple[mx.array, mx.array]  # cosines and sines [N, D]


@dataclass(frozen=True, slots=True)
class StretchPlan:
    """Where the keys and values of one stretch go, and what its queries see."""

    slab: MlxSlab
    rows: slice
    runs: tuple[Run, ...]
    end: int
    extent: int
    sink: int
    filler: int  # how often the last query is repeated to reach the fixed number of rows
    hidden: mx.array  # [N, extent]: 0 where a query sees a slot, else -inf; N counts the filler too
    sink_turn: Angles | None  # past the window: turns the queries to within the window's distance of the sinks


@dataclass(frozen=True, slots=True)
class ForwardPlan:
    """What every layer needs to know of a batch. The rotary embedding gets it as the `offset` of a cache."""

    stretches: tuple[StretchPlan, ...]
    turn: Angles
    filler: int  # rows appended to the batch's own


def plan_forward(batch: RowBatch, rows: int, rotary: ExactRotary) -> ForwardPlan:
    """The plan of a batch that is padded to `rows`, as the queries of each stretch are."""
    spec = batch.rows[0].slab.spec
    filler = rows - len(batch.rows)
    positions = torch.tensor([row.position for row in batch.rows])
    cosines, sines = rotary(
        torch.empty(0, dtype=dtype_named(spec.dtype)), torch.nn.functional.pad(positions, (0, filler))
    )
    return ForwardPlan(
        tuple(_plan_stretch(stretch, batch.rows, positions, rows, rotary, spec) for stretch in batch.stretches()),
        (to_mlx(cosines), to_mlx(sines)),
        filler,
    )


def _plan_stretch(
    stretch: Stretch, rows: tuple[Row, ...], positions: Tensor, size: int, rotary: ExactRotary, spec: SlabSpec
) -> StretchPlan:
    assert isinstance(stretch.slab, MlxSlab)
    count = stretch.stop - stretch.start
    filler = size - count
    at = positions[[*range(stretch.start, stretch.stop), *[stretch.stop - 1] * filler]]
    dtype = dtype_named(spec.dtype)
    hidden = torch.zeros(len(at), stretch.extent, dtype=dtype)
    hidden.masked_fill_(~visible_slots(spec, at, stretch.extent), float("-inf"))
    sink_turn = None
    if spec.sink and stretch.is_past_window:
        cosines, sines = rotary.turn((spec.visible - 1 - at).clamp(max=0))
        sink_turn = to_mlx(cosines.to(dtype)), to_mlx(sines.to(dtype))
    mine = rows[stretch.start : stretch.stop]
    return StretchPlan(
        slab=stretch.slab,
        rows=slice(stretch.start, stretch.stop),
        runs=_runs([spec.slot(row.position) for row in mine]),
        end=mine[-1].position + 1,
        extent=stretch.extent,
        sink=spec.sink,
        filler=filler,
        hidden=to_mlx(hidden),
        sink_turn=sink_turn,
    )


def _runs(slots: list[int]) -> tuple[Run, ...]:
    """The slots of consecutive rows as runs, cut where the ring wraps around."""
    begins = [row for row, slot in enumerate(slots) if row == 0 or slot != slots[row - 1] + 1]
    return tuple(Run(slots[row], row, end) for row, end in zip(begins, [*begins[1:], len(slots)], strict=True))


class PlannedRotary:
    """Replaces a model's rotary embedding: turns rows by the angles of the plan that it gets as `offset`."""

    def __call__(self, vectors: mx.array, offset: ForwardPlan) -> mx.array:
        return rotate(vectors, *offset.turn)


class SlabCache:
    """Plays the cache of one layer for mlx-lm."""

    def __init__(self, plan: ForwardPlan, layer: int) -> None:
        self.offset = plan
        self._layer = layer

    def make_mask(self, *_: Any, **__: Any) -> None:
        """None: every stretch has a mask of its own."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Writes `keys` and `values` [1, G, rows, D] into the slabs. `attend` ignores what it returns."""
        for stretch in self.offset.stretches:
            stretch.slab.write(
                self._layer, stretch.runs, stretch.end, keys[0, :, stretch.rows], values[0, :, stretch.rows]
            )
        return keys, values

    def attend(self, queries: mx.array, scale: float) -> mx.array:
        """The attention of `queries` [1, G*Q, rows, D], of the same shape; zeros for rows that only fill up the batch."""
        found = [self._attend(queries[0], stretch, scale) for stretch in self.offset.stretches]
        if self.offset.filler:
            found.append(mx.zeros((queries.shape[1], self.offset.filler, queries.shape[3]), queries.dtype))
        return mx.concatenate(found, axis=1)[None]

    def _attend(self, queries: mx.array, stretch: StretchPlan, scale: float) -> mx.array:
        """Softmax attention of one stretch in explicit steps, because fused kernels tile by the number of rows.

        Returns [G*Q, rows, D].
        """
        heads, _, head_dim = queries.shape
        keys, values = stretch.slab.seen(self._layer, stretch.extent)
        groups, size = keys.shape[0], stretch.hidden.shape[0]
        mine = queries[:, stretch.rows]
        if stretch.filler:
            mine = mx.concatenate([mine, mx.repeat(mine[:, -1:], stretch.filler, axis=1)], axis=1)

        def scores(some: mx.array, seen: mx.array, hidden: mx.array) -> mx.array:  # [G, Q, N, slots]
            products = (some.reshape(groups, -1, head_dim) * scale) @ seen.swapaxes(1, 2)
            return products.reshape(groups, heads // groups, size, -1) + hidden

        if stretch.sink_turn is None:
            seen = scores(mine, keys, stretch.hidden)
        else:
            sink = stretch.sink
            turned = scores(rotate(mine, *stretch.sink_turn), keys[:, :sink], stretch.hidden[:, :sink])
            seen = mx.concatenate([turned, scores(mine, keys[:, sink:], stretch.hidden[:, sink:])], axis=-1)
        shares = mx.softmax(seen, axis=-1, precise=True)
        attended = shares.reshape(groups, -1, stretch.extent) @ values
        return attended.reshape(heads, size, head_dim)[:, : size - stretch.filler]


class AttentionOrSlabs:
    """A model's attention function, except that attention over a SlabCache is ours."""

    def __init__(self, original: Callable[..., mx.array]) -> None:
        self._original = original

    def __call__(self, queries: mx.array, keys: mx.array, values: mx.array, cache: Any, **options: Any) -> mx.array:
        if isinstance(cache, SlabCache):
            return cache.attend(queries, options["scale"])
        return self._original(queries, keys, values, cache=cache, **options)


def let_attend_over_slabs(module: ModuleType) -> None:
    """Makes the models of one of mlx-lm's modules call our attention for our caches, since mlx-lm has no registry for that."""
    original = module.scaled_dot_product_attention
    if not isinstance(original, AttentionOrSlabs):
        module.scaled_dot_product_attention = AttentionOrSlabs(original)  # type: ignore[attr-defined] # Not of every module.


def rotate(vectors: mx.array, cosines: mx.array, sines: mx.array) -> mx.array:
    """`vectors` [..., N, D] turned by angles given as `cosines` and `sines` [N, D]."""
    low, high = mx.split(vectors, 2, axis=-1)
    return vectors * cosines + mx.concatenate([-high, low], axis=-1) * sines
