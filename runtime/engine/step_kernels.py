"""Attention of a step by kernels in Triton, which read slabs where they lie: on GPUs of NVIDIA and AMD.

A program attends one block of rows of one slab, over one run of slots, for the heads of one group; a second kernel joins
the runs of a row in their order (as FlashDecoding does, https://pytorch.org/blog/flash-decoding). Runs begin at the same slots
for everyone, and a product has always the same shape. So what a row gets follows from its query and its slab: rows beside
it in its block, and slots that it does not see, add zeros to its sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.engine.exact import Claim, Ground
from runtime.engine.step_attention import Step

CLAIM = Claim("attention", "kernels of ours in Triton, runs of slots joined in order", Ground.ROW_BY_ROW)

# The fewest queries in a product on tensor cores.
_QUERIES = 16
# Slots in a product, and in a run.
_TILE, _RUN = 64, 256


def block_rows(heads_a_group: int) -> int:
    """How many rows of a slab attend in one block."""
    return max(1, _QUERIES // heads_a_group)


def attend_by_kernels(query: Tensor, keys: Tensor, values: Tensor, step: Step) -> Tensor:
    """An `Attend` of `step_attention`, products in the slabs' type and sums in float32."""
    heads, rows, width = query.shape
    groups, slots = keys.shape[1], keys.shape[2]
    each = heads // groups
    runs = triton.cdiv(slots, _RUN)
    inputs, spec = step.inputs, step.spec
    cosines, sines = step.sink_turn
    partial = torch.empty(rows, heads, runs, width, dtype=torch.float32, device=query.device)
    peaks = torch.empty(rows, heads, runs, dtype=torch.float32, device=query.device)
    sums = torch.empty_like(peaks)
    padded_width = triton.next_power_of_2(width)
    _attend_runs[(rows, groups, runs)](
        query, keys, values, cosines, sines, inputs.slabs, inputs.positions, inputs.firsts, inputs.counts,
        partial, peaks, sums,
        query.stride(0), query.stride(1), keys.stride(0), keys.stride(1), keys.stride(2),
        runs, width**-0.5,
        SINK=spec.sink, WINDOW=spec.window, RING=spec.ring, SLOTS=slots,
        EACH=each, QUERIES=max(_QUERIES, triton.next_power_of_2(each)), WIDTH=width, PADDED=padded_width,
        TILE=_TILE, RUN=_RUN, PRECISION="ieee",
    )  # fmt: skip
    attended = torch.empty(rows, heads, width, dtype=query.dtype, device=query.device)
    _join_runs[(rows, heads)](
        partial, peaks, sums, inputs.positions, attended, heads, runs,
        SLOTS=slots, WIDTH=width, PADDED=padded_width, RUN=_RUN,
    )  # fmt: skip
    return attended


@triton.jit  # type: ignore[untyped-decorator] # Triton has no types.
def _attend_runs(  # type: ignore[no-untyped-def] # Its arguments are not Python values.
    query, keys, values, cosines, sines, slabs, positions, firsts, counts, partial, peaks, sums,
    query_head, query_row, held_slab, held_head, held_slot, runs, scaling,
    SINK: tl.constexpr, WINDOW: tl.constexpr, RING: tl.constexpr, SLOTS: tl.constexpr, EACH: tl.constexpr,
    QUERIES: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The peak of the scores, the sum of their exponents and the values so weighted, of a block over one run of slots."""
    block, group, run = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    count = tl.load(counts + block)
    first = tl.load(firsts + block)
    last = tl.load(positions + first + tl.maximum(count, 1) - 1)
    extent = tl.where(count > 0, tl.minimum(last + 1, SLOTS), 0).to(tl.int32)
    begin = run * RUN
    if begin < extent:
        number = tl.arange(0, QUERIES)
        column = tl.arange(0, PADDED)
        is_query = number // EACH < count
        row = first + number // EACH
        head = group * EACH + number % EACH
        is_column = column < WIDTH
        is_held = is_query[:, None] & is_column[None, :]
        position = tl.load(positions + row, mask=is_query, other=-1)
        slab = tl.load(slabs + first)
        held = slab * held_slab + group * held_head

        place = query + head[:, None] * query_head + row[:, None] * query_row
        asked = tl.load(place + column[None, :], mask=is_held, other=0.0)
        # The other half of a head, with which its columns are turned.
        half = WIDTH // 2
        across = tl.where(column < half, column + half, column - half)
        opposite = tl.load(place + across[None, :], mask=is_held, other=0.0).to(tl.float32)
        opposite = tl.where((column < half)[None, :], -opposite, opposite)
        turn = row[:, None] * WIDTH + column[None, :]
        cosine = tl.load(cosines + turn, mask=is_held, other=0.0)
        sine = tl.load(sines + turn, mask=is_held, other=0.0)
        at_sinks = (asked.to(tl.float32) * cosine + opposite * sine).to(asked.dtype)

        peak = tl.full([QUERIES], float("-inf"), tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
        summed = tl.zeros([QUERIES, PADDED], tl.float32)
        in_ring = (position % RING).to(tl.int32)
        for start in range(begin, tl.minimum(begin + RUN, extent), TILE):
            slot = start + tl.arange(0, TILE)
            is_slot = slot < SLOTS
            place = held + slot * held_slot
            key = tl.load(
                keys + place[None, :] + column[:, None], mask=is_slot[None, :] & is_column[:, None], other=0.0
            )
            value = tl.load(
                values + place[:, None] + column[None, :], mask=is_slot[:, None] & is_column[None, :], other=0.0
            )
            scores = tl.dot(asked, key, input_precision=PRECISION)
            if start < SINK:
                scores = tl.where((slot < SINK)[None, :], tl.dot(at_sinks, key, input_precision=PRECISION), scores)
            # Rings are added so that the difference is not negative.
            age = (in_ring[:, None] - slot[None, :] + (SLOTS + RING - 1) // RING * RING) % RING
            in_window = (age < WINDOW) & (position[:, None] - age >= SINK)
            is_seen = tl.where((slot < SINK)[None, :], slot[None, :] <= position[:, None], in_window)
            is_seen = is_seen & is_query[:, None] & is_slot[None, :]
            scores = tl.where(is_seen, scores * scaling, float("-inf"))

            higher = tl.maximum(peak, tl.max(scores, 1))
            # For a row that has seen no slot so far.
            base = tl.where(higher == float("-inf"), 0.0, higher)
            shares = tl.exp(scores - base[:, None])
            shrunk = tl.exp(peak - base)
            total = total * shrunk + tl.sum(shares, 1)
            summed = summed * shrunk[:, None] + tl.dot(shares.to(value.dtype), value, input_precision=PRECISION)
            peak = higher

        part = (row * tl.num_programs(1) * EACH + head) * runs + run
        tl.store(peaks + part, peak, mask=is_query)
        tl.store(sums + part, total, mask=is_query)
        tl.store(partial + part[:, None] * WIDTH + column[None, :], summed, mask=is_held)


@triton.jit  # type: ignore[untyped-decorator] # Triton has no types.
def _join_runs(  # type: ignore[no-untyped-def] # Its arguments are not Python values.
    partial, peaks, sums, positions, attended, heads, runs,
    SLOTS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """The attention of a row for one head, joined from the runs of slots up to its position."""
    row, head = tl.program_id(0), tl.program_id(1)
    extent = tl.minimum(tl.load(positions + row) + 1, SLOTS).to(tl.int32)
    column = tl.arange(0, PADDED)
    is_column = column < WIDTH
    peak = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    summed = tl.zeros([PADDED], tl.float32)
    for run in range((extent + RUN - 1) // RUN):
        part = (row * heads + head) * runs + run
        its_peak = tl.load(peaks + part)
        higher = tl.maximum(peak, its_peak)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        shrunk, its_share = tl.exp(peak - base), tl.exp(its_peak - base)
        total = total * shrunk + tl.load(sums + part) * its_share
        values = tl.load(partial + part * WIDTH + column, mask=is_column, other=0.0)
        summed = summed * shrunk + values * its_share
        peak = higher
    result = summed / tl.where(total > 0, total, 1.0)
    tl.store(attended + (row * heads + head) * WIDTH + column, result.to(attended.dtype.element_ty), mask=is_column)
