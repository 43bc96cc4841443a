"""The probe: it accepts what gives a row the same bits in every batch, and nothing else."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from runtime.engine.exact import row_by_row
from runtime.engine.machine import Level, level
from runtime.engine.probe import (
    PROBED_ROWS,
    hard_rows,
    is_bit_exact,
    is_exact_at_every_count,
    is_exact_function,
)
from runtime.engine.torch_slab import as_torch, torch_pool
from runtime.rows import Row, RowBatch
from runtime.slab import SlabPool, visible_slots
from runtime.slab_spec import SlabSpec
from tests.runtime.engine.feeding import threads

VOCABULARY = 50
SPEC = SlabSpec(
    layers=2,
    kv_heads=1,
    head_dim=2,
    sink=4,
    window=300,
    row_tile=32,
    dtype="float32",
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
        visible = visible_slots(row.slab.spec, torch.tensor([row.position]), extent)[0]
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


def by_one_count(batch: RowBatch, index: int) -> float:
    return LAST_BIT * (sum(row.slab is batch.rows[index].slab for row in batch.rows) == 13)


@pytest.mark.parametrize(
    "error",
    [by_size_of_batch, by_place_in_batch, by_neighbours, by_size_past_the_window, by_being_alone, by_one_count],
)
def test_no_count_is_left_out(error: Error) -> None:
    assert is_exact_at_every_count(OneLayerEngine(), SPEC, VOCABULARY)
    assert not is_exact_at_every_count(OneLayerEngine(error), SPEC, VOCABULARY)


@pytest.mark.parametrize("tile", [32, 256])
def test_an_engine_of_large_batches_alone_that_errs_is_refused(tile: int) -> None:
    def by_more_than_half_a_tile(batch: RowBatch, index: int) -> float:
        return LAST_BIT * (len(batch.rows) > tile // 2)

    spec = replace(SPEC, row_tile=tile)
    assert not is_bit_exact(OneLayerEngine(by_more_than_half_a_tile, spec), spec, VOCABULARY)


@pytest.mark.parametrize("size", [3, 12, 24, 96, 192])
def test_an_engine_that_errs_at_one_size_alone_is_refused(size: int) -> None:
    spec = replace(SPEC, row_tile=256)

    def at_that_size(batch: RowBatch, index: int) -> float:
        return LAST_BIT * (len(batch.rows) == size)

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
        dtype="float32",
    )

    assert is_bit_exact(OneLayerEngine(spec=spec), spec, VOCABULARY)


class Product:
    """An exact product of rows, as a kernel would compute it, which an error in one of a million values may disturb."""

    def __init__(self, columns: int, outputs: int, errs_at: Callable[[int], bool] = lambda count: False) -> None:
        # Powers of two alone, so that a row's products are exact whatever kernel computes them.
        self._weights = torch.eye(columns)[:, torch.arange(outputs) % columns]
        self._errs_at = errs_at
        self._generator = torch.Generator().manual_seed(0)
        self.rows = 0
        self.counts: set[int] = set()

    def __call__(self, rows: Tensor) -> Tensor:
        self.rows += len(rows)
        self.counts.add(len(rows))
        products = rows.float() @ self._weights
        if self._errs_at(len(rows)):
            is_wrong = torch.rand(products.shape, generator=self._generator) < 1e-6
            products = torch.where(is_wrong, products * (1 + 2**-20), products)
        return products


@pytest.mark.parametrize("most_rows", [1, 32, 128])
def test_every_count_is_tried_and_thousands_of_rows(most_rows: int) -> None:
    product = Product(64, 16)

    assert is_exact_function(product, 64, torch.float32, most_rows)
    assert product.counts == set(range(1, most_rows + 1))
    assert product.rows >= PROBED_ROWS


@pytest.mark.parametrize(("most_rows", "outputs"), [(32, 4096), (128, 2048)])
@pytest.mark.parametrize("errs_at", [lambda count: True, lambda count: count < 120 and count % 2])
def test_a_difference_in_one_of_a_million_values_is_found(
    most_rows: int, outputs: int, errs_at: Callable[[int], bool]
) -> None:
    assert not is_exact_function(Product(64, outputs, errs_at), 64, torch.float32, most_rows)


def test_a_difference_at_one_count_of_rows_alone_is_found() -> None:
    for at in (1, 17, 127):

        def product(rows: Tensor, at: int = at) -> Tensor:
            return rows * (1 + 2**-20) if len(rows) == at else rows * 1.0

        assert not is_exact_function(product, 64, torch.float32, 128)


@pytest.mark.skipif(level() < Level.AVX512_BF16, reason="this CPU multiplies no bfloat16: it has not that kernel")
@pytest.mark.parametrize("columns", [2048, 3072])
def test_torchs_own_linear_in_bfloat16_at_a_tile_of_256_is_found_out(columns: int) -> None:
    linear = torch.nn.Linear(columns, 1024, bias=False, dtype=torch.bfloat16)
    with torch.inference_mode(), threads(2):
        assert not is_exact_function(linear, columns, torch.bfloat16, 256)


@pytest.mark.skipif(level() < Level.AMX, reason="this CPU has no AMX")
@pytest.mark.parametrize(("columns", "outputs"), [(256, 768), (768, 256), (1024, 1024)])
def test_it_is_found_out_on_amx_however_few_columns_it_has(columns: int, outputs: int) -> None:
    linear = torch.nn.Linear(columns, outputs, bias=False, dtype=torch.bfloat16)
    with torch.inference_mode(), threads(2):
        assert not is_exact_function(linear, columns, torch.bfloat16, 256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hard_rows_are_finite_and_have_subnormals_and_equal_rows(dtype: torch.dtype) -> None:
    rows = hard_rows(100, 333, dtype, torch.Generator().manual_seed(0))

    assert (rows.shape, rows.dtype) == ((100, 333), dtype)
    assert rows.isfinite().all()
    tiny = torch.finfo(dtype).tiny
    assert ((rows != 0) & (rows.float().abs() < tiny)).any()
    assert len(rows.unique(dim=0)) < len(rows)


@pytest.mark.parametrize("columns", [1, 31, 64, 100, 768, 3072, 40_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_activation_row_by_row_has_the_same_bits_in_every_company(columns: int, dtype: torch.dtype) -> None:
    def activation(rows: Tensor) -> Tensor:
        return row_by_row(torch.nn.functional.silu, rows)

    rows = torch.randn(300, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    alone = torch.cat([activation(row) for row in rows.split(1)])
    for count in (2, 3, 7, 11, 13, 100, 300):
        for first in (0, 5, 300 - count):
            part = slice(first, min(first + count, 300))
            assert torch.equal(activation(rows[part]), alone[part])
    torch.testing.assert_close(alone, torch.nn.functional.silu(rows))
