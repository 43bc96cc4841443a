"""Layers in blocks with the attention between them: one call of a kernel for all but the last.

Between two calls threads would sleep, and wake a little late for each of a model's layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runtime.engine.block_kernel import STEP, run_layers, run_program
from runtime.engine.block_program import BlockGraph, memory_for_rounded
from runtime.engine.parts import Graphs
from runtime.engine.row_attention import RowAttention, RowPlan, given_for_no_rows
from runtime.engine.row_kernel import room_for
from runtime.slab_spec import SlabSpec


def prepare_layers(spec: SlabSpec) -> None:
    """Has the kernels compiled for slabs of this type, or found in the user's cache, before the first forward needs them."""
    nowhere, program = np.empty(0, np.int64), np.empty(0, STEP)
    memory = np.empty(0, np.float32), memory_for_rounded(0)
    run_program(program, 0, 0, np.zeros(4, np.int64), *memory, 0, nowhere)
    pieces = program, np.zeros(1, np.int64), np.empty((0, 4), np.int64)
    rest = (nowhere, (0, 0, 0, 0), 1, spec.head_dim, nowhere, *given_for_no_rows(spec), *room_for(1, spec.head_dim))
    given = (*pieces, *memory, *rest)
    run_layers(*given)


@dataclass(frozen=True)
class BlockGraphs(Graphs):
    """The graphs of a model in blocks: rows lie in one space, and alike between any two of them."""

    first: BlockGraph
    between: tuple[BlockGraph, ...]

    def project(
        self, embedded: Tensor, angles: Sequence[Tensor], attend: RowAttention, plan: RowPlan, layers: int
    ) -> list[Tensor]:
        # The kernel knows one store.
        if layers == 1 or len(plan.stores) > 1:
            return super().project(embedded, angles, attend, plan, layers)
        pieces = self._pieces
        layout, space, count = self.between[0], self.first.space, len(embedded)
        memory, rounded = space.memory(count, pieces.columns), space.rounded(count * pieces.widest)
        attended, hidden, *turn = layout.inputs
        for columns, given in zip((hidden, *turn), (embedded, *angles), strict=True):
            columns.of(memory, count)[:] = given.numpy()
        _, query, key, value = layout.outputs
        where = (
            pieces.program,
            pieces.starts,
            pieces.places[:layers],
            memory,
            rounded,
            np.zeros(2 * len(pieces.program) + 4 * layers, np.int64),
            (query.at, key.at, value.at, attended.at),
            query.heads,
            query.width // query.heads,
            plan.slots,
            *attend.given(plan, plan.stores[0]),
        )

        def share() -> None:
            given = (*where, *attend.room())
            run_layers(*given)

        space.crew.run(share, space.threads)
        # Keys and values of the last layer are still to be written.
        for layer in range(layers - 1):
            plan.advance(layer)
        return [torch.from_numpy(columns.of(memory, count)) for columns in layout.outputs]

    @cached_property
    def _pieces(self) -> _Pieces:
        return _Pieces.of((self.first, *self.between))


@dataclass(frozen=True, slots=True)
class _Pieces:
    """The programs of graphs, one after the other, and the most columns and numbers to round that one of them needs."""

    program: Any  # [STEP]
    starts: Any  # [L + 1]
    places: Any  # [L, 4]
    columns: int
    widest: int

    @classmethod
    def of(cls, graphs: Sequence[BlockGraph]) -> _Pieces:
        # What one returns lies where the next finds it.
        assert len({(*graph.inputs[-3:], *graph.outputs[-3:]) for graph in graphs}) == 1
        return cls(
            np.concatenate([graph.program for graph in graphs]),
            np.cumsum([0, *(len(graph.program) for graph in graphs)]),
            np.stack([graph.places for graph in graphs]),
            max(graph.columns for graph in graphs),
            max(graph.widest for graph in graphs),
        )
