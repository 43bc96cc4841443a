"""Row batches: how the rows of a forward are cut into stretches that attend alike."""

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.engine.torch_slab import torch_pool
from runtime.rows import Row, RowBatch
from runtime.slab_spec import SlabSpec

SPEC = SlabSpec(
    layers=1,
    kv_heads=1,
    head_dim=1,
    sink=4,
    window=600,
    row_tile=32,
    dtype="float32",
)
# Bucket edges, the window's edge, and where extents end.
STARTS = st.sampled_from([0, 240, 250, 256, 500, 590, 603, 604, 620, 5_000])
SESSIONS = st.lists(st.tuples(STARTS, st.integers(1, 20)), min_size=1, max_size=6)


def batch_of(sessions: list[tuple[int, int]]) -> RowBatch:
    pool = torch_pool(SPEC, len(sessions))
    return RowBatch(
        tuple(
            Row(slab, position, 0)
            for slab, (start, length) in ((pool.acquire(), session) for session in sessions)
            for position in range(start, start + length)
        )
    )


@settings(max_examples=100)
@given(SESSIONS)
def test_stretches_hold_every_row_once_and_in_order(sessions: list[tuple[int, int]]) -> None:
    batch = batch_of(sessions)

    covered = [index for stretch in batch.stretches() for index in range(stretch.start, stretch.stop)]

    assert covered == list(range(len(batch.rows)))


@settings(max_examples=100)
@given(SESSIONS)
def test_all_rows_of_a_stretch_attend_alike(sessions: list[tuple[int, int]]) -> None:
    batch = batch_of(sessions)

    for stretch in batch.stretches():
        for row in batch.rows[stretch.start : stretch.stop]:
            assert row.slab is stretch.slab
            assert SPEC.extent(row.position) == stretch.extent
            assert (row.position >= SPEC.visible) == stretch.is_past_window


@settings(max_examples=100)
@given(SESSIONS)
def test_rows_that_attend_alike_are_not_cut_apart(sessions: list[tuple[int, int]]) -> None:
    stretches = batch_of(sessions).stretches()

    for one, other in pairwise(stretches):
        assert (one.slab, one.extent, one.is_past_window) != (other.slab, other.extent, other.is_past_window)
