"""Finds the row counts for which this machine's kernels give a row the same bits in every batch, and proves it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from runtime.events import Sampling
from runtime.rows import Row, RowBatch
from runtime.sampling import Draw
from runtime.slab import BUCKET_SLOTS, Slab, SlabPool, SlabSpec

# Smallest padding first: fewer rows are wasted on a lone token. What fails is a kernel class of its own for few rows.
CANDIDATES = ((8, 16, 32), (16, 32), (32,))
_SMALL_CUT = (1, 1, 2, 3, 5, 8, 12)
_CUTS_BESIDE_OTHERS = (_SMALL_CUT, (7, 7, 7, 7, 4), (13, 13, 6))
_GREEDY = Draw(Sampling())


class LogitsEngine(Protocol):
    def logits(self, batch: RowBatch) -> Tensor: ...


def find_row_sizes(
    padded_to: Callable[[tuple[int, ...]], LogitsEngine], spec: SlabSpec, vocabulary: int
) -> tuple[int, ...] | None:
    """The first of `CANDIDATES` under which rows are bit-equal in every batch tried, or None."""
    return next((sizes for sizes in CANDIDATES if is_bit_exact(padded_to(sizes), spec, vocabulary)), None)


def is_bit_exact(engine: LogitsEngine, spec: SlabSpec, vocabulary: int) -> bool:
    """Whether a tile of rows gets `torch.equal` logits however it is cut and whatever rows of a neighbour run beside it.

    Tried at the head of a history, across a bucket's edge, and past the window, over slabs of random content.
    """
    pool = SlabPool(spec, 2)
    slab, neighbour = pool.acquire(), pool.acquire()
    choice = random.Random(0)
    for one in (slab, neighbour):
        _fill(one)
    for start in sorted({0, min(BUCKET_SLOTS, spec.visible) - spec.row_tile // 2, 3 * spec.slots}):
        first = max(0, start)
        tokens = [choice.randrange(vocabulary) for _ in range(spec.row_tile)]
        beside = [choice.randrange(vocabulary) for _ in range(spec.row_tile)]
        rows = _rows(slab, first, tokens)
        whole = engine.logits(RowBatch(rows))
        neighbours = _rows(neighbour, first // 2, beside)
        for cuts, others in ((_SMALL_CUT, ()), *((cuts, neighbours) for cuts in _CUTS_BESIDE_OTHERS)):
            at = 0
            for batch, count in _cut(rows, cuts, others, choice):
                logits = engine.logits(batch)
                mine = [index for index, row in enumerate(batch.rows) if row.slab is slab]
                if not torch.equal(logits[mine], whole[at : at + count]):
                    return False
                at += count
    return True


def _rows(slab: Slab, start: int, tokens: list[int]) -> tuple[Row, ...]:
    return tuple(Row(slab, start + offset, token, _GREEDY) for offset, token in enumerate(tokens))


def _cut(
    rows: tuple[Row, ...], cuts: tuple[int, ...], neighbours: tuple[Row, ...], choice: random.Random
) -> Iterator[tuple[RowBatch, int]]:
    """Batches that hold `rows` cut by `cuts`, each with some of the `neighbours`, a tile of them or none, at one side."""
    at = 0
    for count in cuts:
        mine = rows[at : at + count]
        theirs = neighbours[: choice.randrange(len(neighbours) - count + 1)] if neighbours else ()
        yield RowBatch(theirs + mine if choice.random() < 0.5 else mine + theirs), count
        at += count


def _fill(slab: Slab) -> None:
    generator = torch.Generator().manual_seed(0)
    spec = slab.spec
    block = torch.randn(spec.kv_heads, BUCKET_SLOTS, spec.head_dim, generator=generator)
    block = block.to(device=spec.device, dtype=spec.dtype)
    for store in (slab.keys, slab.values):
        for low in range(0, spec.slots, BUCKET_SLOTS):
            high = min(low + BUCKET_SLOTS, spec.slots)
            store[:, :, low:high] = block[:, : high - low]
