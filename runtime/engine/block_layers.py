"""Layers in blocks with the attention between them: one call of a kernel for all but the last.

Between two calls threads would sleep, and wake a little late for each of a model's layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runtime.engine.block_kernel import STEP, run_program
from runtime.engine.block_program import BlockGraph, memory_for_rounded
from runtime.engine.crew import count_up, wait_for
from runtime.engine.lanes import kernel
from runtime.engine.parts import Graphs
from runtime.engine.row_attention import RowAttention, RowPlan, given_for_no_rows
from runtime.engine.row_kernel import attend_rows, write_row
from runtime.slab_spec import SlabSpec


@kernel
def run_layers(
    program: Any,
    starts: Any,
    weights: Any,
    space: Any,
    rounded: Any,
    counters: Any,
    columns: Any,
    heads: int,
    head_dim: int,
    slots: Any,
    cosines: Any,
    sines: Any,
    keys: Any,
    values: Any,
    slabs: Any,
    positions: Any,
    firsts: Any,
    counts: Any,
    sink: int,
    window: int,
    scaling: Any,
) -> None:
    """One thread's share of a forward: pieces of a `program` [STEP], and after each but the last the attention of a layer.

    Pieces lie between `starts` [L + 1]. `weights` [L, 4], `space` and `rounded` are as `run_program` takes them, and what follows
    `slots` [N] as `attend_rows` does; `columns` are those of query, key and value, and of what was attended to. `counters` are
    two zeros for each step, and four for each layer. Every thread of a crew calls it alike.
    """
    rows, groups = len(positions), keys.shape[2]
    query, key, value, attended = columns
    for layer in range(len(weights)):
        run_program(program, starts[layer], starts[layer + 1], weights[layer], space, rounded, rows, counters)
        if layer + 1 == len(weights):
            break
        counter = 2 * len(program) + 4 * layer
        new_keys = space[key * rows : (key + groups * head_dim) * rows].reshape(rows, groups, head_dim)
        new_values = space[value * rows : (value + groups * head_dim) * rows].reshape(rows, groups, head_dim)
        row = count_up(counters, counter)
        while row < rows:
            write_row(layer, keys, new_keys, row, slabs[row], slots[row])
            write_row(layer, values, new_values, row, slabs[row], slots[row])
            count_up(counters, counter + 1)
            row = count_up(counters, counter)
        wait_for(counters, counter + 1, rows)
        attend_rows(
            layer,
            space[attended * rows : (attended + heads * head_dim) * rows].reshape(rows, heads, head_dim),
            space[query * rows : (query + heads * head_dim) * rows].reshape(rows, heads, head_dim),
            cosines,
            sines,
            keys,
            values,
            slabs,
            positions,
            firsts,
            counts,
            sink,
            window,
            scaling,
            counters,
            counter + 2,
        )
        wait_for(counters, counter + 3, len(firsts) * groups)


def prepare_layers(spec: SlabSpec) -> None:
    """Has the kernel compiled for slabs of this type, or found in the user's cache, before the first forward needs it."""
    nowhere, program = np.zeros(0, np.int64), np.empty(0, STEP)
    weights, rows = np.empty((0, 4), np.int64), np.empty(0, np.float32)
    space = (rows, memory_for_rounded(0), nowhere, (0, 0, 0, 0), 1, spec.head_dim, nowhere)
    run_layers(program, np.zeros(1, np.int64), weights, *space, *given_for_no_rows(spec))


@dataclass(frozen=True)
class BlockGraphs(Graphs):
    """The graphs of a model in blocks: rows lie in one space, and alike between any two of them."""

    first: BlockGraph
    between: tuple[BlockGraph, ...]

    def project(
        self, embedded: Tensor, angles: Sequence[Tensor], attend: RowAttention, plan: RowPlan, layers: int
    ) -> list[Tensor]:
        # Slabs of several stores are rare, and the kernel knows one.
        if layers == 1 or len(plan.stores) > 1:
            return super().project(embedded, angles, attend, plan, layers)
        pieces = self._pieces
        layout, space, count = self.between[0], self.first.space, len(embedded)
        rows, rounded = space.rows(count, pieces.columns), space.rounded(count * pieces.widest)
        attended, hidden, *turn = layout.inputs
        for columns, given in zip((hidden, *turn), (embedded, *angles), strict=True):
            columns.of(rows, count)[:] = given.numpy()
        _, query, key, value = layout.outputs
        work = partial(
            run_layers,
            pieces.program,
            pieces.starts,
            pieces.places[:layers],
            rows,
            rounded,
            np.zeros(2 * len(pieces.program) + 4 * layers, np.int64),
            (query.at, key.at, value.at, attended.at),
            query.heads,
            query.width // query.heads,
            plan.slots,
            *attend.given(plan, plan.stores[0]),
        )
        space.crew.run(work, space.threads)
        for layer in range(layers - 1):
            plan.advance(layer)
        return [torch.from_numpy(columns.of(rows, count)) for columns in layout.outputs]

    @cached_property
    def _pieces(self) -> _Pieces:
        return _Pieces.of((self.first, *self.between))


@dataclass(frozen=True, slots=True)
class _Pieces:
    """The programs of graphs, one after the other, with what is common to them."""

    program: Any  # [STEP]
    starts: Any  # [L + 1]
    places: Any  # [L, 4]
    columns: int
    widest: int

    @classmethod
    def of(cls, graphs: Sequence[BlockGraph]) -> _Pieces:
        return cls(
            np.concatenate([graph.program for graph in graphs]),
            np.cumsum([0, *(len(graph.program) for graph in graphs)]),
            np.stack([graph.places for graph in graphs]),
            max(graph.columns for graph in graphs),
            max(graph.widest for graph in graphs),
        )
