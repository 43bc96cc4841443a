"""Tries on this machine whether rows get the same bits in every batch, as a check on the grounds of `exact`.

Each part is tried alone and in depth, because a whole model rounds rare differences away; then the model is tried.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from runtime.errors import ModelUnavailable
from runtime.events import Sampling
from runtime.rows import Row, RowBatch
from runtime.sampling import Draw
from runtime.slab import Slab, SlabPool, as_held
from runtime.slab_spec import BUCKET_SLOTS, SlabSpec

NO_NUMBERS = "the model computes no numbers: its weights or its config.json are damaged"

PROBED_ROWS = 4096
# Each count of rows is tried on at least this many rows, at several places: a single count may err, and in few values.
_ROWS_A_COUNT = 128
# Attention is not tried over longer windows, since more runs of slots only repeat the same products.
_ATTENDED_WINDOW = 1020
_ATTENDING_TOKENS = 64
# Rows computed again, in other counts, for each row of the reference.
_TRIED_FOR_EACH = 4

_CPU = torch.device("cpu")
_SMALL_TILE = 32
# Cuts of a small tile; for a larger tile each part is as many times larger.
_UNEVEN_CUTS = ((7, 7, 7, 7, 4), (13, 13, 6))
_GREEDY = Draw(Sampling())


class LogitsEngine(Protocol):
    def new_pool(self, count: int) -> SlabPool: ...

    def logits(self, batch: RowBatch) -> Tensor: ...


def is_exact_function(
    function: Callable[[Tensor], Tensor],
    columns: int,
    dtype: torch.dtype,
    most_rows: int,
    device: torch.device = _CPU,
) -> bool:
    """Whether `function` of rows [N, columns] on a device gives a row `torch.equal` results beside all other rows that are tried.

    It tries every N up to `most_rows`, each at several places, on at least `PROBED_ROWS` rows of `hard_rows` in all.
    """
    choice = random.Random(columns)
    generator = torch.Generator().manual_seed(columns)
    each = max(_ROWS_A_COUNT, PROBED_ROWS // most_rows)
    counts = [count for count in range(1, most_rows + 1) for _ in range(max(2, each // count))]
    choice.shuffle(counts)
    while counts:
        rows = hard_rows(2 * most_rows, columns, dtype, generator).to(device)
        reference = torch.cat([function(part) for part in rows.split(most_rows)])
        tried = 0
        while counts and tried < _TRIED_FOR_EACH * len(rows):
            count = counts.pop()
            first = choice.randrange(len(rows) - count + 1)
            if not torch.equal(function(rows[first : first + count]), reference[first : first + count]):
                return False
            tried += count
    return True


def tried_attention(spec: SlabSpec, heads: int, dtype: torch.dtype) -> tuple[SlabSpec, Tensor]:
    """Slabs over which to try attention of `heads`, and a table [tokens, heads + 2 G, D] of queries, keys and values."""
    parts = heads + 2 * spec.kv_heads
    generator = torch.Generator().manual_seed(1)
    rows = hard_rows(_ATTENDING_TOKENS * parts, spec.head_dim, dtype, generator)
    tried = replace(spec, layers=1, window=min(spec.window, _ATTENDED_WINDOW))
    return tried, rows.view(_ATTENDING_TOKENS, parts, -1)


def hard_rows(count: int, columns: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Rows [count, columns] whose sums depend on their order: with wide exponents, cancellation, subnormals, or equal values."""
    limits = torch.finfo(dtype)
    plain = torch.randn(count, columns, generator=generator)
    spread = min(24, int(-torch.tensor(limits.tiny).log2()) // 2)
    exponents = torch.randint(-spread, spread // 2, plain.shape, generator=generator)
    wide = plain * torch.pow(2.0, exponents)
    cancelling = torch.cat((plain[:, : columns // 2], -plain[:, : columns - columns // 2]), dim=1)
    cancelling += wide * 2.0**-spread
    is_tiny = torch.rand(plain.shape, generator=generator) < 0.05
    subnormal = torch.where(is_tiny, plain * limits.tiny / 8, plain)
    equal = plain[:1].expand_as(plain)
    kinds = torch.stack((plain, wide, cancelling, subnormal, equal))
    return kinds[torch.arange(count) % len(kinds), torch.arange(count)].to(dtype)


def is_exact_at_every_count(engine: LogitsEngine, spec: SlabSpec, vocabulary: int) -> bool:
    """Whether rows of a slab get `torch.equal` results at every count up to a tile, alone and beside a neighbour's.

    Counts up to 32 are tried at each place that `is_bit_exact` tries, larger ones at one of them.
    """
    pool = engine.new_pool(2)
    slab, neighbour = pool.acquire(), pool.acquire()
    choice = random.Random(1)
    for one in (slab, neighbour):
        _fill(one)
    tile = spec.row_tile
    beside = tuple(replace(row, draw=None) for row in _random_rows(neighbour, 0, vocabulary, choice))
    starts = _starts(spec)
    for index, start in enumerate(starts):
        rows = _random_rows(slab, start, vocabulary, choice)
        reference = engine.logits(RowBatch(rows))
        for count in range(1, tile + 1):
            companies = [(), beside[: tile - count]]
            if count > _SMALL_TILE:
                companies = [choice.choice(companies)] if count % len(starts) == index else []
            for theirs in companies:
                first = choice.randrange(tile - count + 1)
                mine = rows[first : first + count]
                if not torch.equal(engine.logits(RowBatch((*theirs, *mine))), reference[first : first + count]):
                    return False
    return True


def is_bit_exact(engine: LogitsEngine, spec: SlabSpec, vocabulary: int) -> bool:
    """Whether a tile of rows gets `torch.equal` logits however it is cut and whatever rows of a neighbour run beside it.

    It is tried at the head of a history, across a bucket's edge, and past the window, over slabs of random content.

    Raises ModelUnavailable if logits are not finite.
    """
    pool = engine.new_pool(2)
    slab, neighbour = pool.acquire(), pool.acquire()
    choice = random.Random(0)
    for one in (slab, neighbour):
        _fill(one)
    for start in _starts(spec):
        rows = _random_rows(slab, start, vocabulary, choice)
        beside = _random_rows(neighbour, start // 2, vocabulary, choice)
        whole = engine.logits(RowBatch(rows))
        if whole.isnan().any():
            # This is the fault of the weights and not of the machine: another model of the same shape must not be called
            # inexact.
            raise ModelUnavailable(NO_NUMBERS)
        for cuts, neighbours in _cuts(spec.row_tile, beside):
            at = 0
            for batch in _cut_rows(rows, cuts, neighbours, choice):
                drawing = [row.slab is slab for row in batch.rows if row.draw is not None]
                logits = engine.logits(batch)[torch.tensor(drawing, dtype=torch.bool)]
                if not torch.equal(logits, whole[at : at + len(logits)]):
                    return False
                at += len(logits)
    return True


def _starts(spec: SlabSpec) -> list[int]:
    """First positions of a tile: at the head of a history, before a bucket's edge, and past the window."""
    return sorted({0, max(0, min(spec.bucket, spec.visible) - _SMALL_TILE // 2), 3 * spec.slots})


def _random_rows(slab: Slab, start: int, vocabulary: int, choice: random.Random) -> tuple[Row, ...]:
    """A tile of consecutive rows that all draw."""
    return tuple(Row(slab, start + n, choice.randrange(vocabulary), _GREEDY) for n in range(slab.spec.row_tile))


def _cuts(tile: int, beside: tuple[Row, ...]) -> Iterator[tuple[tuple[int, ...], tuple[Row, ...]]]:
    """Ways to cut a tile, each with the neighbours' rows of which some run beside each part."""
    for cuts in _of_growing_size(tile):
        yield cuts, ()
        yield cuts, beside
    if tile % _SMALL_TILE == 0:
        for cuts in _UNEVEN_CUTS:
            yield tuple(count * (tile // _SMALL_TILE) for count in cuts), beside


def _of_growing_size(tile: int) -> list[tuple[int, ...]]:
    """Cuts of a tile with every power of two and every number half-way between two of them, up to but without the whole tile."""
    doubles = [1 << power for power in range(tile.bit_length())]
    sizes = sorted(size for size in {*doubles, *(3 * size // 2 for size in doubles[1:])} if size < tile)
    found: list[tuple[int, ...]] = []
    cuts: tuple[int, ...] = ()
    for size in sizes:
        if sum(cuts) + size > tile:
            found.append((*cuts, tile - sum(cuts)))
            cuts = ()
        cuts = (*cuts, size)
    return [*found, (*cuts, tile - sum(cuts))]


def _cut_rows(
    rows: tuple[Row, ...], cuts: tuple[int, ...], neighbours: tuple[Row, ...], choice: random.Random
) -> Iterator[RowBatch]:
    """Batches with `rows` cut by `cuts`, each with some of the `neighbours` on one side: none, or as many as fill the tile."""
    assert sum(cuts) == len(rows)
    at = 0
    for count in cuts:
        mine = rows[at : at + count]
        theirs = neighbours[: choice.randrange(len(neighbours) - count + 1)] if neighbours else ()
        yield RowBatch(theirs + mine if choice.random() < 0.5 else mine + theirs)
        at += count


def _fill(slab: Slab) -> None:
    """Puts random numbers into every slot of an empty slab, as if another session had left them there."""
    generator = torch.Generator().manual_seed(0)
    spec = slab.spec
    block = torch.randn(spec.layers, spec.kv_heads, BUCKET_SLOTS, spec.head_dim, generator=generator)
    whole = as_held(block, spec.dtype).repeat(1, 1, -(-spec.slots // BUCKET_SLOTS), 1)[:, :, : spec.slots]
    for layer in range(spec.layers):
        slab.put(layer, whole[layer], whole[layer])
