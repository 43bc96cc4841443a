"""Attention by kernels of our own: against a loop over positions, for each type that slabs hold."""

import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from runtime.engine.machine import Level, hardware_level
from runtime.engine.probe import hard_rows, is_exact_at_every_count
from runtime.engine.rotary import rotate
from runtime.engine.row_attention import RowAttention, RowAttentionAlone, prepare_kernels
from runtime.engine.row_kernel import attend_rows, write_rows
from runtime.engine.torch_slab import as_torch, torch_pool
from runtime.rows import Row, RowBatch
from runtime.slab import Slab, as_held
from runtime.slab_spec import SlabSpec
from tests.reference.window import positions_seen
from tests.runtime.engine.feeding import GREEDY, threads
from tests.runtime.engine.test_attention import a_rotary

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 48
SPEC = SlabSpec(
    layers=2,
    kv_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    sink=2,
    window=45,
    row_tile=16,
    dtype="float32",
)
HELD = ("float32", "bfloat16", "float16", "int8")
LENGTH = 150
# Of `digests`.
EVERYWHERE = {
    "float32": "9e4a9d41d127fec54b93d04aa93eb717",
    "bfloat16": "26d19903e6d575cad7e17bbbf2981503",
    "float16": "9e4a9d41d127fec54b93d04aa93eb717",
    "int8": "e64d3a7ca7b6326f5e57a295012a287f",
}


class History:
    """Random queries, keys and values of one session, queries and keys turned by position."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        turn = [one.float().unsqueeze(1) for one in a_rotary(HEAD_DIM).turn(torch.arange(LENGTH))]
        self.queries = rotate(torch.randn(LENGTH, HEADS, HEAD_DIM, generator=generator), *turn)
        self.keys = rotate(torch.randn(LENGTH, KV_HEADS, HEAD_DIM, generator=generator), *turn)
        self.values = torch.randn(LENGTH, KV_HEADS, HEAD_DIM, generator=generator)

    def expected(self, position: int, dtype: str) -> Tensor:
        """What `position` attends to, [HEADS * HEAD_DIM] float64, by a loop over what it sees, as slabs of `dtype` hold it."""
        keys, values = (read(as_held(held, dtype)) for held in (self.keys, self.values))
        output = torch.zeros(HEADS, HEAD_DIM, dtype=torch.float64)
        seen = sorted(positions_seen(position, SPEC.sink, SPEC.window))
        cosines, sines = a_rotary(HEAD_DIM).turn(torch.tensor(min(0, SPEC.visible - 1 - position)))
        for head in range(HEADS):
            query = self.queries[position, head].double()
            kv_head = head * KV_HEADS // HEADS
            near = rotate(query, cosines, sines)
            scores = [(near if at < SPEC.sink else query) @ keys[at, kv_head] / HEAD_DIM**0.5 for at in seen]
            output[head] = torch.softmax(torch.stack(scores), dim=0) @ values[seen, kv_head]
        return output.flatten()


def read(held: Tensor) -> Tensor:
    """Rows [..., D] float64 of what a slab holds [..., W]."""
    if held.dtype != torch.int8:
        return held.double()
    steps, scale = held.split((HEAD_DIM, held.shape[-1] - HEAD_DIM), dim=-1)
    values: Tensor = steps.double() * scale.contiguous().view(torch.float32).double()
    return values


def attend(batch: RowBatch, histories: dict[Slab, History], layer: int = 0) -> Tensor:
    spec = batch.rows[0].slab.spec
    attention = RowAttention(spec, HEADS, a_rotary(HEAD_DIM))
    query, key, value = (
        torch.stack([getattr(histories[row.slab], part)[row.position] for row in batch.rows])
        for part in ("queries", "keys", "values")
    )
    return attention(layer, query, key, value, attention.plan(batch))


def rows_of(slab: Slab, start: int, stop: int) -> tuple[Row, ...]:
    return tuple(Row(slab, position, 0) for position in range(start, stop))


@pytest.mark.parametrize("tile", [1, 7, 16])
@pytest.mark.parametrize("dtype", HELD)
def test_every_position_gets_what_a_loop_over_its_window_gives(tile: int, dtype: str) -> None:
    history = History(seed=0)
    slab = torch_pool(replace(SPEC, dtype=dtype), 1).acquire()

    outputs = [
        attend(RowBatch(rows_of(slab, start, min(start + tile, LENGTH))), {slab: history})
        for start in range(0, LENGTH, tile)
    ]

    expected = torch.stack([history.expected(position, dtype) for position in range(LENGTH)])
    torch.testing.assert_close(torch.cat(outputs).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (4, 2, 0, 3, 1), (3, 0)])
def test_sessions_of_one_batch_get_what_each_gets_alone(order: tuple[int, ...]) -> None:
    """Some inside the window and some past it, with one row or several, in any order of their slabs, of two pools."""
    slabs = [
        *(pool.acquire() for pool in [torch_pool(SPEC, 3)] * 3),
        *(pool.acquire() for pool in [torch_pool(SPEC, 2)] * 2),
    ]
    histories = {slab: History(seed) for seed, slab in enumerate(slabs)}
    ends, counts = (9, 60, 95, 31, 140), (1, 1, 4, 3, 2)
    mine = {}
    for index in order:
        slab, end = slabs[index], ends[index]
        for start in range(0, end, 8):
            attend(RowBatch(rows_of(slab, start, min(start + 8, end))), histories)
        mine[slab] = rows_of(slab, end, end + counts[index])

    together = attend(RowBatch(tuple(row for rows in mine.values() for row in rows)), histories)

    assert torch.equal(together, torch.cat([attend(RowBatch(rows), histories) for rows in mine.values()]))
    expected = [histories[row.slab].expected(row.position, SPEC.dtype) for rows in mine.values() for row in rows]
    torch.testing.assert_close(together.double(), torch.stack(expected), rtol=0, atol=1e-5)


def test_layers_keep_keys_and_values_of_their_own() -> None:
    slab = torch_pool(SPEC, 1).acquire()
    first, second = History(seed=1), History(seed=2)
    for layer, history in enumerate((first, second)):
        attend(RowBatch(rows_of(slab, 0, 9)), {slab: history}, layer)

    output = attend(RowBatch(rows_of(slab, 9, 10)), {slab: first}, layer=0)

    torch.testing.assert_close(output[0].double(), first.expected(9, SPEC.dtype), rtol=0, atol=1e-5)
    assert slab.frontiers == (10, 9)


@pytest.mark.parametrize("dtype", HELD)
def test_a_slab_holds_rows_rounded_as_torch_rounds_them(dtype: str) -> None:
    """Among them zeros, subnormal numbers, and ones between two of the slab's."""
    spec = replace(SPEC, dtype=dtype, layers=1, row_tile=64)
    rows = hard_rows(64 * KV_HEADS, HEAD_DIM, torch.float32, torch.Generator().manual_seed(0))
    rows = rows.view(64, KV_HEADS, HEAD_DIM).clamp(-6e4, 6e4)
    rows[3] = 0
    slab = torch_pool(spec, 1).acquire()
    attention = RowAttention(spec, HEADS, a_rotary(HEAD_DIM))

    attention(0, torch.randn(64, HEADS, HEAD_DIM), rows, -rows, attention.plan(RowBatch(rows_of(slab, 0, 64))))

    keys, values = as_torch(slab).held(0)
    assert torch.equal(keys, as_held(rows, dtype).transpose(0, 1))
    assert torch.equal(values, as_held(-rows, dtype).transpose(0, 1))


@pytest.mark.parametrize("dtype", HELD)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(16, 8, 128), (9, 3, 64), (4, 1, 16), (80, 1, 32)])
def test_a_row_gets_the_same_bits_whatever_is_computed_beside_it(
    heads: int, kv_heads: int, head_dim: int, dtype: str
) -> None:
    spec = replace(SPEC, layers=1, kv_heads=kv_heads, head_dim=head_dim, window=600, row_tile=48, dtype=dtype)
    table = hard_rows(64 * (heads + 2 * kv_heads), head_dim, torch.float32, torch.Generator().manual_seed(2))
    table = table.view(64, -1, head_dim).clamp(-6e4, 6e4)
    rotary = a_rotary(head_dim)
    with threads(3):
        shared = RowAttentionAlone(spec, heads, rotary, table)
    with threads(1):
        alone = RowAttentionAlone(spec, heads, rotary, table)

    assert is_exact_at_every_count(shared, spec, 64)
    slab, other = (engine.new_pool(1).acquire() for engine in (shared, alone))
    for start in range(0, 900, 48):
        mine, theirs = (
            engine.logits(RowBatch(tuple(Row(one, start + n, (7 * start + n) % 64, GREEDY) for n in range(48))))
            for engine, one in ((shared, slab), (alone, other))
        )
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", HELD)
def test_what_an_earlier_session_left_in_a_slab_reaches_nobody_though_it_be_no_number(dtype: str) -> None:
    spec = replace(SPEC, dtype=dtype)
    history = History(seed=0)
    fresh, used = (torch_pool(spec, 1).acquire() for _ in range(2))
    for held in (as_torch(used).keys, as_torch(used).values):
        # Of whole numbers of 8 bits the scales are too large for float32.
        held.fill_(127 if held.dtype == torch.int8 else torch.nan)

    for start in range(0, LENGTH, 7):
        mine, theirs = (
            attend(RowBatch(rows_of(slab, start, min(start + 7, LENGTH))), {slab: history}) for slab in (fresh, used)
        )
        assert torch.equal(mine, theirs)


def signatures() -> list[int]:
    """How many kinds of arrays each kernel has been compiled for."""
    kernels: list[Any] = [attend_rows, write_rows]
    return [len(kernel.signatures) for kernel in kernels]


def compiled_by_a_forward() -> list[str]:
    """The types of slabs for which a forward has more to compile than was prepared."""
    found = []
    table = torch.zeros(64, HEADS + 2 * KV_HEADS, HEAD_DIM)
    for dtype in HELD:
        spec = replace(SPEC, layers=1, dtype=dtype)
        prepare_kernels(spec)
        prepared = signatures()
        engine = RowAttentionAlone(spec, HEADS, a_rotary(HEAD_DIM), table)
        engine.logits(RowBatch((Row(engine.new_pool(1).acquire(), 0, 0, GREEDY),)))
        if prepared != signatures():
            found.append(dtype)
    return found


def test_a_forward_finds_its_kernels_prepared() -> None:
    """In a process of its own, for here other tests have prepared them."""
    code = "from tests.runtime.engine.test_row_attention import compiled_by_a_forward; assert compiled_by_a_forward() == []"

    subprocess.run([sys.executable, "-c", code], check=True)


def digests() -> dict[str, str]:
    """Of what rows of whole numbers attend to, inside a window and past it, by the type of the slab."""
    random = np.random.default_rng(0)
    parts = HEADS + 2 * KV_HEADS
    # No library's logarithm or cosine is in them.
    table = torch.from_numpy(random.integers(-512, 512, (64, parts, HEAD_DIM)).astype(np.float32)) / 128
    found = {}
    for dtype in HELD:
        spec = replace(SPEC, layers=1, sink=0, dtype=dtype)
        engine = RowAttentionAlone(spec, HEADS, a_rotary(HEAD_DIM), table)
        slab = engine.new_pool(1).acquire()
        digest = hashlib.blake2b(digest_size=16)
        for start in range(0, LENGTH - 15, 16):
            rows = tuple(Row(slab, start + n, (7 * start + n) % 64, GREEDY) for n in range(16))
            digest.update(engine.logits(RowBatch(rows)).numpy().tobytes())
        found[spec.dtype] = digest.hexdigest()
    return found


def test_every_cpu_gives_the_same_bits() -> None:
    assert digests() == EVERYWHERE


@pytest.mark.skipif(
    hardware_level() <= Level.AVX2, reason="the kernels here are those of AVX2 anyway, or of another family"
)
def test_kernels_made_for_avx2_give_them_too(tmp_path: Path) -> None:
    code = "from tests.runtime.engine.test_row_attention import EVERYWHERE, digests; assert digests() == EVERYWHERE"
    features = "+avx2,+fma,+f16c,+bmi,+bmi2,+sse4.2"
    of_avx2 = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(tmp_path)}

    subprocess.run([sys.executable, "-c", code], env=os.environ | of_avx2, check=True)
