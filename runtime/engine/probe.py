"""Finds the row counts for which this machine's kernels give a row the same bits in every batch, and proves it."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from runtime.events import Sampling
from runtime.rows import Row, RowBatch
from runtime.sampling import Draw
from runtime.slab import BUCKET_SLOTS, Slab, SlabPool, SlabSpec

# The smallest padding first: fewer rows are wasted on a lone token. What fails is a kernel class of its own for few rows.
SMALLEST = (1, 2, 4, 8, 16, 32)
_SMALL_TILE = 32
# Of a small tile; a larger one is cut into as many parts, each so many times as large.
_UNEVEN_CUTS = ((7, 7, 7, 7, 4), (13, 13, 6))
_GREEDY = Draw(Sampling())


@dataclass(frozen=True, slots=True)
class RowSizes:
    """The ascending counts to which a forward's `rows`, and the `queries` of each piece, are padded; the last is the tile."""

    rows: tuple[int, ...]
    queries: tuple[int, ...]


def growing(smallest: int, tile: int) -> tuple[int, ...]:
    """From `smallest` up to `tile`: its doubles, and what lies half-way between them, so that little is wasted on padding."""
    doubles = [smallest << power for power in range(tile.bit_length())]
    between = [3 * size // 2 for size in doubles if size % 2 == 0]
    return (*sorted(size for size in {*doubles, *between} if size < tile), tile)


def padded(count: int, sizes: tuple[int, ...]) -> int:
    """The least of the ascending `sizes` that is `count` or more."""
    return sizes[bisect_left(sizes, count)]


class LogitsEngine(Protocol):
    def new_pool(self, count: int) -> SlabPool: ...

    def logits(self, batch: RowBatch) -> Tensor: ...


def find_sizes(
    padded_to: Callable[[tuple[int, ...]], LogitsEngine], spec: SlabSpec, vocabulary: int
) -> tuple[int, ...] | None:
    """The least padding under which rows are bit-equal in every batch of a tile that was tried, or None."""
    candidates = (growing(smallest, spec.row_tile) for smallest in SMALLEST)
    return next((sizes for sizes in candidates if is_bit_exact(padded_to(sizes), spec, vocabulary)), None)


def is_bit_exact(engine: LogitsEngine, spec: SlabSpec, vocabulary: int) -> bool:
    """Whether a tile of rows gets `torch.equal` logits however it is cut and whatever rows of a neighbour run beside it.

    Tried at the head of a history, across a bucket's edge, and past the window, over slabs of random content.
    """
    pool = engine.new_pool(2)
    slab, neighbour = pool.acquire(), pool.acquire()
    choice = random.Random(0)
    for one in (slab, neighbour):
        _fill(one)
    for start in sorted({0, min(spec.bucket, spec.visible) - _SMALL_TILE // 2, 3 * spec.slots}):
        rows = _random_rows(slab, max(0, start), vocabulary, choice)
        beside = _random_rows(neighbour, max(0, start) // 2, vocabulary, choice)
        whole = engine.logits(RowBatch(rows))
        for cuts, neighbours in _cuts(spec.row_tile, beside):
            at = 0
            for batch in _cut(rows, cuts, neighbours, choice):
                drawing = [row.slab is slab for row in batch.rows if row.draw is not None]
                logits = engine.logits(batch)[torch.tensor(drawing, dtype=torch.bool)]
                if not torch.equal(logits, whole[at : at + len(logits)]):
                    return False
                at += len(logits)
    return True


def _random_rows(slab: Slab, start: int, vocabulary: int, choice: random.Random) -> tuple[Row, ...]:
    """A tile of consecutive rows. So many draw as a small tile has: logits of all would take a large model's head too long."""
    tile = slab.spec.row_tile
    drawing = {*range(_SMALL_TILE // 2), *choice.sample(range(tile), _SMALL_TILE // 2)} if tile > _SMALL_TILE else None
    return tuple(
        Row(
            slab,
            start + offset,
            choice.randrange(vocabulary),
            _GREEDY if drawing is None or offset in drawing else None,
        )
        for offset in range(tile)
    )


def _cuts(tile: int, beside: tuple[Row, ...]) -> Iterator[tuple[tuple[int, ...], tuple[Row, ...]]]:
    """Ways to cut a tile, and the rows of which some run beside each part."""
    for cuts in _of_every_size(tile):
        yield cuts, ()
        yield cuts, beside
    for cuts in _UNEVEN_CUTS:
        yield tuple(count * (tile // _SMALL_TILE) for count in cuts), beside


def _of_every_size(tile: int) -> list[tuple[int, ...]]:
    """Cuts of a tile in which every size comes up to which anything is padded, but for the tile itself."""
    found: list[tuple[int, ...]] = []
    cuts: tuple[int, ...] = ()
    for size in growing(1, tile)[:-1]:
        if sum(cuts) + size > tile:
            found.append((*cuts, tile - sum(cuts)))
            cuts = ()
        cuts = (*cuts, size)
    return [*found, (*cuts, tile - sum(cuts))]


def _cut(
    rows: tuple[Row, ...], cuts: tuple[int, ...], neighbours: tuple[Row, ...], choice: random.Random
) -> Iterator[RowBatch]:
    """Batches that hold `rows` cut by `cuts`, each with some of the `neighbours`, a tile of them or none, at one side."""
    assert sum(cuts) == len(rows)
    at = 0
    for count in cuts:
        mine = rows[at : at + count]
        theirs = neighbours[: choice.randrange(len(neighbours) - count + 1)] if neighbours else ()
        yield RowBatch(theirs + mine if choice.random() < 0.5 else mine + theirs)
        at += count


def _fill(slab: Slab) -> None:
    """Leaves random bytes in every slot of an empty slab."""
    generator = torch.Generator().manual_seed(0)
    spec = slab.spec
    block = torch.randn(spec.layers, spec.kv_heads, BUCKET_SLOTS, spec.head_dim, generator=generator)
    whole = block.to(spec.dtype).repeat(1, 1, -(-spec.slots // BUCKET_SLOTS), 1)[:, :, : spec.slots]
    slab.fill(whole, whole, spec.slots)
    slab.clear()
