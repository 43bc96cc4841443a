"""Attention of a row batch over slabs by our own kernels: any rows of any slabs, each row computed by itself.

What a token attends to, and how far the sinks are, is as in `attention`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runtime.dtypes import dtype_named
from runtime.engine import findings
from runtime.engine.crew import Crew
from runtime.engine.exact import Claim, Ground
from runtime.engine.probe import is_exact_at_every_count, tried_attention
from runtime.engine.rotary import ExactRotary
from runtime.engine.row_kernel import MOST_QUERIES, attend_rows, room_for, write_rows
from runtime.engine.torch_slab import SlabStore, as_torch, torch_pool
from runtime.rows import Row, RowBatch
from runtime.slab import Slab, SlabPool
from runtime.slab_spec import SlabSpec

CLAIM = Claim("attention", "a kernel of ours in float32, slots in order", Ground.ROW_BY_ROW)

# Waking a thread for fewer slots takes longer than their work.
_LEAST_SLOTS = 2**12
# numba's arrays have no 16-bit floats: kernels get these as whole numbers of 16 bits, and know what they mean.
_VIEWED = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}

_log = logging.getLogger("perennial.engine")


@dataclass(frozen=True, slots=True)
class StoreRows:
    """The rows of a batch over slabs of one store in blocks, and how many threads they are worth."""

    keys: Any  # [L, B, G, S, W]
    values: Any
    rows: Any  # the numbers of these
    firsts: Any  # the first row of each block, and how many it has
    counts: Any
    threads: int


@dataclass(frozen=True, slots=True)
class RowPlan:
    """What a forward computes once: where rows lie, and the angles for the sinks past the window."""

    stores: tuple[StoreRows, ...]
    slabs: Any  # [N]
    slots: Any  # [N]
    positions: Any  # [N]
    ends: tuple[tuple[Slab, int], ...]
    sink_turn: tuple[Any, Any]  # cosines and sines [N * D], or none where no row is past the window

    def advance(self, layer: int) -> None:
        """Has slabs know that the rows are written into this layer."""
        for slab, end in self.ends:
            slab.advance(layer, end)


def prepare_kernels(spec: SlabSpec) -> None:
    """Has the kernels for slabs of this type compiled, or found in the user's cache, before the first forward needs them."""
    rows, nowhere = np.empty((1, 1, spec.head_dim), np.float32), np.empty(0, np.int64)
    given = (*given_for_no_rows(spec), np.zeros(2, np.int64), 0, *room_for(1, spec.head_dim))
    write_rows(0, given[2], rows, nowhere, nowhere, nowhere)
    attend_rows(0, rows, rows, *given)


def given_for_no_rows(spec: SlabSpec) -> tuple[Any, ...]:
    """What `RowAttention.given` returns, in the types in which it does so for slabs of `spec`."""
    held = _for_kernels(torch.empty(1, 1, 1, spec.slots, spec.width, dtype=dtype_named(spec.dtype)))
    nothing, nowhere = np.empty(0, np.float32), np.empty(0, np.int64)
    return nothing, nothing, held, held, *[nowhere] * 4, spec.sink, spec.window, np.float32(1)


class RowAttention:
    """Attention of a model with that many query `heads` over slabs of `spec`, on as many threads as torch has.

    Its threads sleep between calls, and end when this object is collected.
    """

    def __init__(self, spec: SlabSpec, heads: int, rotary: ExactRotary) -> None:
        self._spec, self._heads, self._rotary = spec, heads, rotary
        self._scaling = np.float32(spec.head_dim**-0.5)
        self._crew = Crew(torch.get_num_threads())

    def plan(self, batch: RowBatch) -> RowPlan:
        rows = batch.rows
        spec = self._spec
        positions = torch.tensor([row.position for row in rows])
        blocks: dict[SlabStore, list[tuple[int, int]]] = {}
        ends = []
        most = max(1, MOST_QUERIES // (self._heads // spec.kv_heads))
        for slab, members in groupby(enumerate(rows), key=lambda numbered: numbered[1].slab):
            numbers = [number for number, _ in members]
            ends.append((slab, rows[numbers[-1]].position + 1))
            of_store = blocks.setdefault(as_torch(slab).store, [])
            of_store += [(first, min(most, numbers[-1] + 1 - first)) for first in numbers[::most]]
        sink_turn = np.empty(0, np.float32), np.empty(0, np.float32)
        if spec.sink and any(row.position >= spec.visible for row in rows):
            cosines, sines = self._rotary.turn((spec.visible - 1 - positions).clamp(max=0))
            sink_turn = cosines.float().numpy().reshape(-1), sines.float().numpy().reshape(-1)
        slabs = np.array([as_torch(row.slab).index for row in rows])
        slots = np.array([spec.slot(row.position) for row in rows])
        return RowPlan(
            stores=tuple(self._in_store(store, cut, rows) for store, cut in blocks.items()),
            slabs=slabs,
            slots=slots,
            positions=positions.numpy(),
            ends=tuple(ends),
            sink_turn=sink_turn,
        )

    def write(self, layer: int, key: Tensor, value: Tensor, plan: RowPlan) -> None:
        """Writes `key`, `value` [N, G, D] in float32 into the slabs of `plan`."""
        for part in plan.stores:
            for held, new in ((part.keys, key), (part.values, value)):
                write_rows(layer, held, new.numpy(), part.rows, plan.slabs, plan.slots)
        plan.advance(layer)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, plan: RowPlan) -> Tensor:
        """Writes `key`, `value` [N, G, D] into the slabs of `plan`, then attends `query` [N, G*Q, D] over them, all float32.

        Returns [N, G*Q * D]; rows beyond those of the plan are zeros.
        """
        self.write(layer, key, value, plan)
        attended = torch.empty(len(query), query.shape[1] * query.shape[2])
        attended[len(plan.positions) :] = 0
        rows = attended.view(query.shape).numpy(), query.numpy()
        for part in plan.stores:
            given = (*rows, *self.given(plan, part), np.zeros(2, np.int64), 0)
            self._crew.run(partial(self._share, layer, given), part.threads)
        return attended

    def _share(self, layer: int, given: tuple[Any, ...]) -> None:
        given = (*given, *self.room())
        attend_rows(layer, *given)

    def room(self) -> tuple[Any, Any]:
        """Memory for one thread."""
        return room_for(self._heads // self._spec.kv_heads, self._spec.head_dim)

    def given(self, plan: RowPlan, part: StoreRows) -> tuple[Any, ...]:
        """What `attend_rows` takes, from `cosines` on to `scaling`."""
        where = (part.keys, part.values, plan.slabs, plan.positions, part.firsts, part.counts)
        return *plan.sink_turn, *where, self._spec.sink, self._spec.window, self._scaling

    def _in_store(self, store: SlabStore, blocks: list[tuple[int, int]], rows: tuple[Row, ...]) -> StoreRows:
        firsts, counts = np.array(blocks).T.copy()
        # The cost of a block: that of its queries over its slots, and that of reading the slots.
        costs = [(count + 1) * min(rows[first + count - 1].position + 1, self._spec.slots) for first, count in blocks]
        groups = self._spec.kv_heads
        return StoreRows(
            keys=_for_kernels(store.keys),
            values=_for_kernels(store.values),
            rows=np.array([number for first, count in blocks for number in range(first, first + count)]),
            firsts=firsts,
            counts=counts,
            threads=min(len(blocks) * groups, sum(costs) * groups // _LEAST_SLOTS),
        )


def _for_kernels(held: Tensor) -> Any:
    return held.view(_VIEWED.get(held.dtype, held.dtype)).numpy()


class RowAttentionAlone:
    """A model that consists of attention over slabs alone: query, keys and values of each token come from a `table`."""

    def __init__(self, spec: SlabSpec, heads: int, rotary: ExactRotary, table: Tensor) -> None:
        """`table` is [tokens, heads + 2 G, D] float32."""
        self._spec, self._heads, self._table = spec, heads, table
        self._attend = RowAttention(spec, heads, rotary)

    def new_pool(self, count: int) -> SlabPool:
        return torch_pool(self._spec, count)

    def logits(self, batch: RowBatch) -> Tensor:
        """The attention's output for each row with `draw`, [rows, Q*G*D]."""
        parts = self._table[[row.token_id for row in batch.rows]]
        query, key, value = (
            part.contiguous() for part in parts.split((self._heads, self._spec.kv_heads, self._spec.kv_heads), dim=1)
        )
        attended = self._attend(0, query, key, value, self._attend.plan(batch))
        return attended[[index for index, row in enumerate(batch.rows) if row.draw is not None]]


def row_attention_is_exact(spec: SlabSpec, heads: int, rotary: ExactRotary) -> bool:
    """Whether attention of `heads` over slabs of this shape gives a row the same bits in every batch here."""
    tried, table = tried_attention(spec, heads, torch.float32)
    alone = RowAttentionAlone(tried, heads, rotary, table)
    kind = f"row by row attention of {heads} heads over {tried}"
    holds = findings.find_or_probe(kind, partial(is_exact_at_every_count, alone, tried, len(table)))
    if not holds:
        _log.warning("a row gets other bits in other batches of %s", kind)
    return holds
