"""The probe: it accepts an engine whose rows do not depend on the batch, and no other."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from runtime.engine.probe import find_sizes, growing, is_bit_exact, padded
from runtime.engine.torch_slab import as_torch, torch_pool
from runtime.rows import Row, RowBatch
from runtime.slab import SlabPool, SlabSpec

VOCABULARY = 50
SPEC = SlabSpec(
    layers=2,
    kv_heads=1,
    head_dim=2,
    sink=4,
    window=300,
    row_tile=32,
    dtype=torch.float32,
    device=torch.device("cpu"),
)
Error = Callable[[RowBatch, int], float]


class OneLayerEngine:
    """Writes each row's token into the slab and answers with a sum over it, which an error may disturb."""

    def __init__(self, error: Error = lambda batch, index: 0.0, spec: SlabSpec = SPEC) -> None:
        self._error = error
        self._spec = spec

    def new_pool(self, count: int) -> SlabPool:
        return torch_pool(self._spec, count)

    def logits(self, batch: RowBatch) -> Tensor:
        for row in batch.rows:
            as_torch(row.slab).keys[0, 0, row.slab.spec.slot(row.position), 0] = row.token_id
        lines = [
            self._line(row) + self._error(batch, index) for index, row in enumerate(batch.rows) if row.draw is not None
        ]
        return torch.stack(lines) if lines else torch.empty(0, VOCABULARY)

    def _line(self, row: Row) -> Tensor:
        extent = row.slab.spec.extent(row.position)
        visible = row.slab.spec.visible_slots(torch.tensor([row.position]), extent)[0]
        return (as_torch(row.slab).keys[0, 0, :extent, 0] * visible).sum() + torch.arange(VOCABULARY)


LAST_BIT = 2.0**-10


def by_size_of_batch(batch: RowBatch, index: int) -> float:
    return LAST_BIT * (len(batch.rows) < 8)


def by_place_in_batch(batch: RowBatch, index: int) -> float:
    return LAST_BIT * (index % 2)


def by_neighbours(batch: RowBatch, index: int) -> float:
    return LAST_BIT * (len({id(row.slab) for row in batch.rows}) > 1)


def by_size_past_the_window(batch: RowBatch, index: int) -> float:
    return by_size_of_batch(batch, index) * (batch.rows[index].position >= SPEC.visible)


def by_size_across_a_buckets_edge(batch: RowBatch, index: int) -> float:
    return LAST_BIT * (len(batch.rows) < 16) * (batch.rows[index].position == 256)


def by_being_alone(batch: RowBatch, index: int) -> float:
    return LAST_BIT * (len(batch.rows) == 1)


def test_an_engine_whose_rows_do_not_depend_on_the_batch_is_accepted() -> None:
    assert is_bit_exact(OneLayerEngine(), SPEC, VOCABULARY)


@pytest.mark.parametrize(
    "error",
    [
        by_size_of_batch,
        by_place_in_batch,
        by_neighbours,
        by_size_past_the_window,
        by_size_across_a_buckets_edge,
        by_being_alone,
    ],
)
def test_an_engine_whose_rows_depend_on_the_batch_is_refused(error: Error) -> None:
    assert not is_bit_exact(OneLayerEngine(error), SPEC, VOCABULARY)


def test_an_engine_that_lets_a_row_see_a_later_one_is_refused() -> None:
    def by_what_comes_later(batch: RowBatch, index: int) -> float:
        row = batch.rows[index]
        return float(sum(other.token_id for other in batch.rows if other.slab is row.slab))

    assert not is_bit_exact(OneLayerEngine(by_what_comes_later), SPEC, VOCABULARY)


@pytest.mark.parametrize("exact_from", [1, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("tile", [32, 256])
def test_the_smallest_padding_that_holds_is_found(tile: int, exact_from: int) -> None:
    """Below some number of rows this machine's kernels are of another class."""

    def engine_padded_to(sizes: tuple[int, ...]) -> OneLayerEngine:
        def by_kernel(batch: RowBatch, index: int) -> float:
            return LAST_BIT * (index % 2) if padded(len(batch.rows), sizes) < exact_from else 0.0

        return OneLayerEngine(by_kernel, spec)

    spec = replace(SPEC, row_tile=tile)
    found = find_sizes(engine_padded_to, spec, VOCABULARY)

    assert found == (None if exact_from == 64 else growing(exact_from, tile))


@pytest.mark.parametrize("tile", [32, 256])
def test_an_engine_of_large_batches_alone_that_errs_is_refused(tile: int) -> None:
    def by_more_than_half_a_tile(batch: RowBatch, index: int) -> float:
        return LAST_BIT * (len(batch.rows) > tile // 2)

    spec = replace(SPEC, row_tile=tile)
    assert not is_bit_exact(OneLayerEngine(by_more_than_half_a_tile, spec), spec, VOCABULARY)


def test_sizes_grow_by_a_half_or_a_third_up_to_the_tile() -> None:
    assert growing(4, 32) == (4, 6, 8, 12, 16, 24, 32)
    assert growing(1, 20) == (1, 2, 3, 4, 6, 8, 12, 16, 20)
    assert growing(32, 32) == (32,)


@pytest.mark.parametrize("size", [3, 12, 24, 96, 192])
def test_an_engine_that_errs_at_one_size_alone_is_refused(size: int) -> None:
    spec = replace(SPEC, row_tile=256)

    def at_that_size(batch: RowBatch, index: int) -> float:
        return LAST_BIT * (padded(len(batch.rows), growing(1, 256)) == size)

    assert not is_bit_exact(OneLayerEngine(at_that_size, spec), spec, VOCABULARY)


@pytest.mark.parametrize(("sink", "window"), [(0, 1), (0, 16), (4, 2000)])
def test_slabs_of_any_size_can_be_probed(sink: int, window: int) -> None:
    spec = SlabSpec(
        layers=2,
        kv_heads=1,
        head_dim=2,
        sink=sink,
        window=window,
        row_tile=32,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )

    assert is_bit_exact(OneLayerEngine(spec=spec), spec, VOCABULARY)
