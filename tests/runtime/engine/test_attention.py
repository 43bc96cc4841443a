"""Attention over slabs, by itself: against a loop over positions."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from runtime.dtypes import dtype_named
from runtime.engine.architectures import ONE_ROTARY
from runtime.engine.attention import slab_attention
from runtime.engine.attention_plan import block_shape, plan_forward
from runtime.engine.attention_probe import PLAIN, AttentionAlone
from runtime.engine.probe import is_exact_at_every_count
from runtime.engine.rotary import ExactRotary, rotate
from runtime.engine.torch_slab import as_torch, torch_pool
from runtime.rows import Row, RowBatch
from runtime.slab import Slab
from runtime.slab_spec import SlabSpec
from tests.reference.window import positions_seen
from tests.runtime.engine.feeding import threads

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 8
SPEC = SlabSpec(
    layers=2,
    kv_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    sink=2,
    window=13,
    row_tile=16,
    dtype="float32",
)


def a_rotary(head_dim: int = HEAD_DIM) -> ExactRotary:
    original: Any = nn.Module()
    original.rope_type = "default"
    original.register_buffer("inv_freq", 100.0 ** (-torch.arange(head_dim // 2) / (head_dim // 2)))
    return ExactRotary(original)


class Layer(nn.Module):
    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx


class History:
    """Random queries, keys and values of one session, not turned by position yet."""

    def __init__(self, length: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.queries = torch.randn(HEADS, length, HEAD_DIM, generator=generator)
        self.keys = torch.randn(KV_HEADS, length, HEAD_DIM, generator=generator)
        self.values = torch.randn(KV_HEADS, length, HEAD_DIM, generator=generator)

    def expected(self, position: int) -> Tensor:
        """The attention output at `position`, [heads, head_dim] float64, by a loop over what is seen."""
        rotary = a_rotary()
        output = torch.zeros(HEADS, HEAD_DIM, dtype=torch.float64)
        seen = sorted(positions_seen(position, SPEC.sink, SPEC.window))
        for head in range(HEADS):
            kv_head = head * KV_HEADS // HEADS
            scores = []
            for other in seen:
                place = min(position, SPEC.visible - 1) if other < SPEC.sink else position
                cosines, sines = rotary.turn(torch.tensor([place - other]))
                turned = rotate(self.queries[head, position].double(), cosines[0], sines[0])
                scores.append(turned @ self.keys[kv_head, other].double() / math.sqrt(HEAD_DIM))
            shares = torch.softmax(torch.stack(scores), dim=0)
            output[head] = shares @ self.values[kv_head, seen].double()
        return output


def attend(batch: RowBatch, histories: dict[Slab, History], layer: int = 0) -> Tensor:
    """The outputs [rows, heads, head_dim] of one layer for a batch whose rows come from `histories`."""
    rotary = a_rotary()
    rows = batch.rows
    cosines, sines = rotary(torch.zeros(1), torch.tensor([row.position for row in rows]))
    queries = torch.stack([histories[row.slab].queries[:, row.position] for row in rows], dim=1)
    keys = torch.stack([histories[row.slab].keys[:, row.position] for row in rows], dim=1)
    values = torch.stack([histories[row.slab].values[:, row.position] for row in rows], dim=1)
    output, _ = slab_attention(
        Layer(layer),
        rotate(queries, cosines, sines).unsqueeze(0),
        rotate(keys, cosines, sines).unsqueeze(0),
        values.unsqueeze(0),
        None,
        scaling=1 / math.sqrt(HEAD_DIM),
        plan=plan_forward(batch, {ONE_ROTARY: rotary}, HEADS, (PLAIN.kind,) * SPEC.layers),
    )
    return output[0]


def rows_of(slab: Slab, start: int, stop: int) -> tuple[Row, ...]:
    return tuple(Row(slab, position, 0) for position in range(start, stop))


@pytest.mark.parametrize("tile", [1, 5, 16])
def test_every_position_gets_what_a_loop_over_its_window_gives(tile: int) -> None:
    history = History(80, seed=0)
    slab = torch_pool(SPEC, 1).acquire()

    outputs = [
        attend(RowBatch(rows_of(slab, start, min(start + tile, 80))), {slab: history}) for start in range(0, 80, tile)
    ]

    expected = torch.stack([history.expected(position) for position in range(80)])
    torch.testing.assert_close(torch.cat(outputs).double(), expected, rtol=0, atol=1e-5)


def test_sessions_in_one_batch_do_not_see_each_other() -> None:
    pool = torch_pool(SPEC, 2)
    histories = {pool.acquire(): History(40, seed) for seed in (1, 2)}
    one, other = histories

    for start in range(0, 40, 8):
        batch = RowBatch(rows_of(one, start, start + 8) + rows_of(other, start, start + 8))
        output = attend(batch, histories)

    expected = torch.stack([history.expected(position) for history in histories.values() for position in range(32, 40)])
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (4, 2, 0, 3, 1), (3, 0), (1, 4, 2)])
def test_sessions_side_by_side_or_apart_get_what_each_gets_alone(order: tuple[int, ...]) -> None:
    """Some inside the window and some past it, with one row or several, in any order of their slabs, of two pools."""
    slabs = [
        *(pool.acquire() for pool in [torch_pool(SPEC, 3)] * 3),
        *(pool.acquire() for pool in [torch_pool(SPEC, 2)] * 2),
    ]
    histories = {slab: History(60, seed) for seed, slab in enumerate(slabs)}
    chosen = [slabs[index] for index in order]
    ends = {slab: (9, 30, 31, 31, 40)[index] for index, slab in enumerate(slabs)}
    counts = {slab: (1, 1, 1, 3, 2)[index] for index, slab in enumerate(slabs)}
    for slab in chosen:
        for start in range(0, ends[slab], 8):
            attend(RowBatch(rows_of(slab, start, min(start + 8, ends[slab]))), histories)

    batch = RowBatch(tuple(row for slab in chosen for row in rows_of(slab, ends[slab], ends[slab] + counts[slab])))
    output = attend(batch, histories)

    expected = torch.stack([histories[row.slab].expected(row.position) for row in batch.rows])
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5)
    alone = [attend(RowBatch(rows_of(slab, ends[slab], ends[slab] + counts[slab])), histories) for slab in chosen]
    assert torch.equal(output, torch.cat(alone))


def test_layers_keep_keys_and_values_of_their_own() -> None:
    slab = torch_pool(SPEC, 1).acquire()
    first, second = History(10, seed=1), History(10, seed=2)
    attend(RowBatch(rows_of(slab, 0, 9)), {slab: first}, layer=0)
    attend(RowBatch(rows_of(slab, 0, 9)), {slab: second}, layer=1)

    output = attend(RowBatch(rows_of(slab, 9, 10)), {slab: first}, layer=0)

    torch.testing.assert_close(output[0].double(), first.expected(9), rtol=0, atol=1e-5)


def test_what_lies_in_hidden_slots_does_not_matter() -> None:
    history = History(30, seed=0)
    clean, used = (as_torch(torch_pool(SPEC, 1).acquire()) for _ in range(2))
    for store in (used.keys, used.values):
        store.normal_(std=1e4, generator=torch.Generator().manual_seed(3))

    outputs = [attend(RowBatch(rows_of(slab, 0, 12)), {slab: history}) for slab in (clean, used)]

    assert torch.equal(*outputs)


@pytest.mark.parametrize("head_dim", [30, 64, 80])
@pytest.mark.parametrize("heads_a_group", range(1, 17))
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_blocks_lie_alike_in_memory_for_whichever_thread_computes_them(
    heads_a_group: int, head_dim: int, count: int
) -> None:
    spec = replace(SPEC, kv_heads=4, head_dim=head_dim)
    rows, queries = block_shape(spec, 4 * heads_a_group, count)

    assert rows * heads_a_group <= queries < rows * heads_a_group + 8
    assert queries * head_dim * spec.item_bytes % 64 == 0
    # Buffers of as many rows as queries, for a run of 512 slots, two sums and a result.
    assert 4 % count == 0 or queries * (512 + 2 + head_dim) * 4 % 64 == 0


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(9, 3, 64), (5, 1, 64), (12, 4, 80), (6, 3, 30), (6, 2, 30)]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_do_not_depend_on_the_thread_that_computes_a_block(
    heads: int, kv_heads: int, head_dim: int, dtype: str
) -> None:
    """A block's thread follows from how many there are; each thread writes to a place of its own in memory."""
    spec = replace(SPEC, kv_heads=kv_heads, head_dim=head_dim, window=600, row_tile=64, dtype=dtype)
    table = torch.randn(64, heads + 2 * kv_heads, head_dim, generator=torch.Generator().manual_seed(0))
    table = table.to(dtype_named(dtype))
    engine = AttentionAlone(spec, heads, {ONE_ROTARY: a_rotary(head_dim)}, table)

    with threads(2):
        assert is_exact_at_every_count(engine, spec, len(table))
