"""The inputs of a step besides weights and slabs: a fixed number of rows, in memory that never moves, filled by one copy.

A graph that was captured once reads the same addresses each time it is replayed. So everything that differs between two
steps, such as which rows there are and where they lie, is a value in these columns, and every shape is the same in all
steps.
"""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor

from runtime.engine.torch_slab import as_torch
from runtime.rows import RowBatch

# The token, its position, its slab's number and its slot; the rows that draw; the blocks of rows that attend together.
_COLUMNS = 7
_NOWHERE = -1


class StepInputs:
    """The columns of a step of `rows` rows, each [rows] int64 on `device`.

    A step may bring fewer rows. Unused rows have the position -1, and write into the slab with the number `spare`, which no
    session has. Rows of a slab that follow each other attend in blocks of at most `block`: `firsts` are the rows that begin
    one, and `counts` how many it has, none where there is no such block.
    """

    def __init__(self, rows: int, block: int, spare: int, device: torch.device) -> None:
        self.rows, self.block = rows, block
        self._spare = spare
        # A copy runs beside the device's work only from pinned pages.
        self._host = torch.zeros(_COLUMNS, rows, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._device = torch.zeros(_COLUMNS, rows, dtype=torch.int64, device=device)
        self.tokens, self.positions, self.slabs, self.slots, self.drawing, self.firsts, self.counts = self._device
        self.fill(RowBatch(()))

    def fill(self, batch: RowBatch) -> None:
        """Fills in the rows of a batch. The device must have read the rows before."""
        rows = batch.rows
        assert len(rows) <= self.rows
        columns = self._host.numpy()
        tokens, positions, slabs, slots, drawing, firsts, counts = columns
        columns[:] = 0
        positions[len(rows) :] = _NOWHERE
        slabs[len(rows) :] = self._spare
        for index, row in enumerate(rows):
            tokens[index], positions[index] = row.token_id, row.position
            slabs[index], slots[index] = as_torch(row.slab).index, row.slab.spec.slot(row.position)
        wanted = [index for index, row in enumerate(rows) if row.draw is not None]
        drawing[: len(wanted)] = wanted
        for index, (first, count) in enumerate(self._blocks(batch)):
            firsts[index], counts[index] = first, count
        self._device.copy_(self._host, non_blocking=True)

    def _blocks(self, batch: RowBatch) -> list[tuple[int, int]]:
        found = []
        first = 0
        for _, members in groupby(batch.rows, key=lambda row: id(row.slab)):
            behind = first + sum(1 for _ in members)
            found += [(begin, min(self.block, behind - begin)) for begin in range(first, behind, self.block)]
            first = behind
        return found


def write(held: Tensor, new: Tensor, inputs: StepInputs) -> None:
    """Puts the keys or values of a step's rows, `new` [G, rows, D], into a layer's slabs, `held` [B, G, S, D]."""
    held.transpose(1, 2).index_put_((inputs.slabs, inputs.slots), new.transpose(0, 1))
