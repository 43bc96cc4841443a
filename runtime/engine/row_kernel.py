"""The kernels of attention over slabs in torch's memory: rows are written into slots, and attend to them one by one.

A query takes 16 slots at a time, from the first slot on, and what it adds for them depends on nothing but itself and what
they hold: which other queries a kernel works on, how many and on which thread, reaches no bit of it. Slots that a query
does not see add 0 to its sums. Softmax goes along with the largest score so far (arXiv 1805.02867).

Letters: N rows, Q query heads a kv head, G kv heads, D head dimension, B slabs, L layers, S slots. Slots hold rows of W
values: D numbers, and where these are int8 the bytes of their scale.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from runtime.engine.crew import count_up
from runtime.engine.lanes import (
    LANES,
    absolute,
    add,
    add_weighted,
    choose,
    dot_products,
    either,
    full,
    kernel,
    larger,
    largest,
    load,
    load_scale,
    multiply,
    multiply_add,
    nearest,
    power_of_two,
    store,
    store_scale,
    within,
)

# Queries of a block, unless a single row has more; with more, the slots that they share would not fit into the cache beside
# them.
MOST_QUERIES = 64

_ZERO, _ONE, _NOTHING = np.float32(0), np.float32(1), np.float32(-np.inf)
_LARGEST_INT8 = np.float32(127)
_LINE_FLOATS = 16

# exp(x) is 2 to the power of n, times exp(r): n is the nearest whole number to x / log 2, and log 2 is held in two parts.
_LOG2_E, _LOG_2_HIGH, _LOG_2_LOW = np.float32(1.44269504), np.float32(-0.693359375), np.float32(2.12194440e-4)
# Of the polynomial that Cephes has for exp(r), after 1 + r + r^2 / 2.
_C5, _C4, _C3 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_C2, _C1, _C0 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
# Below this exp would be a subnormal number, with which a CPU takes many times as long.
_LEAST_EXPONENT = np.float32(-87)


@kernel
def exp_of(numbers: Any) -> Any:
    """exp of numbers up to 0; exactly 1 for 0."""
    numbers = larger(numbers, full(_LEAST_EXPONENT))
    whole = nearest(multiply(numbers, full(_LOG2_E)))
    rest = multiply_add(whole, full(_LOG_2_HIGH), numbers)
    rest = multiply_add(whole, full(_LOG_2_LOW), rest)
    sums = multiply_add(full(_C5), rest, full(_C4))
    sums = multiply_add(sums, rest, full(_C3))
    sums = multiply_add(sums, rest, full(_C2))
    sums = multiply_add(sums, rest, full(_C1))
    sums = multiply_add(sums, rest, full(_C0))
    sums = add(multiply_add(multiply(sums, rest), rest, rest), full(_ONE))
    return multiply(sums, power_of_two(whole))


@kernel
def turn_vector(
    given: Any, at: int, cosines: Any, cosine: int, sines: Any, sine: int, target: Any, to: int, width: int
) -> None:
    """Writes a vector of `width` numbers, turned by as many angles, to `target`, which may be where it lies."""
    half = width // 2
    for column in range(half):
        far = half + column
        low, high = given[at + column], given[at + far]
        target[to + column] = low * cosines[cosine + column] - high * sines[sine + column]
        target[to + far] = high * cosines[cosine + far] + low * sines[sine + far]


@kernel
def write_rows(layer: int, held: Any, given: Any, rows: Any, slabs: Any, slots: Any) -> None:
    """Writes those `rows` of `given` [N, G, D] float32 into `slots` [N] of `slabs` [N] of `held` [L, B, G, S, W]."""
    for row in rows:
        write_row(layer, held, given, row, slabs[row], slots[row])


@kernel
def write_row(layer: int, held: Any, given: Any, row: int, slab: int, slot: int) -> None:
    """Writes a row of `given` [N, G, D] float32 into a slot of `held` [L, B, G, S, W]."""
    _, count, groups, most, width = held.shape
    head_dim = given.shape[2]
    target, source = held.reshape(-1), given.reshape(-1)
    for group in range(groups):
        at = (row * groups + group) * head_dim
        to = (((layer * count + slab) * groups + group) * most + slot) * width
        shrunk = full(_ONE)
        if width > head_dim:
            top = full(_ZERO)
            for column in range(0, head_dim, LANES):
                top = larger(top, absolute(load(source, at + column)))
            size = largest(top)
            store_scale(target, to + head_dim, size / _LARGEST_INT8)
            shrunk = full(_LARGEST_INT8 / size if size > _ZERO else _ZERO)
        for column in range(0, head_dim, LANES):
            numbers = load(source, at + column)
            store(target, to + column, nearest(multiply(numbers, shrunk)) if width > head_dim else numbers)


def room_for(queries: int, head_dim: int) -> tuple[Any, Any]:
    """Memory for one thread of `attend_rows`, of a model with so many query heads a kv head."""
    at_once = max(MOST_QUERIES, queries)
    slots = _LINE_FLOATS + 2 * LANES * head_dim
    return np.empty(slots + at_once * (head_dim + 3 * LANES + 1), np.float32), np.empty(at_once, np.int64)


@kernel
def attend_rows(
    layer: int,
    attended: Any,
    queries: Any,
    cosines: Any,
    sines: Any,
    keys: Any,
    values: Any,
    slabs: Any,
    positions: Any,
    firsts: Any,
    counts: Any,
    sink: int,
    window: int,
    scaling: Any,
    counters: Any,
    counter: int,
    room: Any,
    places: Any,
) -> None:
    """Writes what `queries` [N, G*Q, D] float32 attend to into `attended`, of the same shape.

    Rows come in blocks of consecutive rows of one slab: `counts` from `firsts` on, `slabs` and `positions` [N] say where.
    Items of work are a block's heads, block * G + kv head. Every thread of a crew calls this with the same: two of `counters`,
    from `counter` on, count the items that one of them has begun, and those that are done. Past the window a row meets the
    sinks with its query turned by angles whose `cosines` and `sines` are [N * D]. `keys` and `values` are [L, B, G, S, W].
    `room` [float32] and `places` [int64] are the thread's own, as `room_for` makes them.
    """
    _, heads, head_dim = queries.shape
    _, pool, groups, most, width = keys.shape
    each = heads // groups
    ring = most - sink
    outputs, asked = attended.reshape(-1), queries.reshape(-1)
    all_keys, all_values = keys.reshape(-1), values.reshape(-1)
    at_once = max(MOST_QUERIES, each)
    # The slots in float32 lie aligned to a line.
    begin = (-(room.ctypes.data // 4)) % _LINE_FLOATS
    some_keys, begin = room[begin : begin + LANES * head_dim], begin + LANES * head_dim
    some_values, begin = room[begin : begin + LANES * head_dim], begin + LANES * head_dim
    turned, begin = room[begin : begin + at_once * head_dim], begin + at_once * head_dim
    scores, begin = room[begin : begin + at_once * LANES], begin + at_once * LANES
    kept, begin = room[begin : begin + at_once * LANES], begin + at_once * LANES
    sums, begin = room[begin : begin + at_once * LANES], begin + at_once * LANES
    tops = room[begin : begin + at_once]

    item = count_up(counters, counter)
    while item < len(firsts) * groups:
        block, group = item // groups, item % groups
        first, count = firsts[block], counts[block]
        for query in range(count * each):
            places[query] = ((first + query // each) * heads + group * each + query % each) * head_dim
            tops[query] = _NOTHING
            store(sums, query * LANES, full(_ZERO))
            for column in range(0, head_dim, LANES):
                store(outputs, places[query] + column, full(_ZERO))
            row = first + query // each
            if sink > 0 and positions[row] >= sink + window:
                at = row * head_dim
                turn_vector(asked, places[query], cosines, at, sines, at, turned, query * head_dim, head_dim)
        base = ((layer * pool + slabs[first]) * groups + group) * most * width
        for slot in range(0, min(positions[first + count - 1] + 1, most), LANES):
            for other in range(LANES):
                at = base + (slot + other) * width
                key_scale, value_scale = (
                    full(load_scale(all_keys, at + head_dim)),
                    full(load_scale(all_values, at + head_dim)),
                )
                for column in range(0, head_dim, LANES):
                    to = other * head_dim + column
                    store(some_keys, to, multiply(load(all_keys, at + column), key_scale))
                    store(some_values, to, multiply(load(all_values, at + column), value_scale))
            # What an earlier session left beyond the last row may be no number, and 0 times that is none.
            for other in range(max(0, positions[first + count - 1] + 1 - slot), LANES):
                for column in range(0, head_dim, LANES):
                    store(some_values, other * head_dim + column, full(_ZERO))
            for query in range(count * each):
                found = dot_products(some_keys, 0, asked, places[query], head_dim)
                if slot < sink and positions[first + query // each] >= sink + window:
                    reached = dot_products(some_keys, 0, turned, query * head_dim, head_dim)
                    found = choose(within(slot, 0, sink), reached, found)
                store(scores, query * LANES, multiply(found, full(scaling)))
            for query in range(count * each):
                position = positions[first + query // each]
                oldest = max(sink, position - window + 1)
                start = sink + (oldest - sink) % ring
                stop = start + max(0, position + 1 - oldest)
                seen = either(
                    within(slot, 0, min(sink, position + 1)),
                    # Beyond the last slot the ring continues at its beginning.
                    either(within(slot, start, stop), within(slot, sink, stop - ring)),
                )
                found = choose(seen, load(scores, query * LANES), full(_NOTHING))
                top = max(largest(found), tops[query])
                fall, share = full(_ONE), full(_ZERO)
                if top > _NOTHING:
                    fall = exp_of(full(tops[query] - top))
                    share = choose(seen, exp_of(add(found, full(-top))), full(_ZERO))
                tops[query] = top
                store(sums, query * LANES, multiply_add(load(sums, query * LANES), fall, share))
                store(scores, query * LANES, share)
                store(kept, query * LANES, fall)
            for query in range(count * each):
                fall = load(kept, query * LANES)
                add_weighted(outputs, places[query], fall, scores, query * LANES, some_values, 0, head_dim)
        for query in range(count * each):
            total = _ZERO
            for lane in range(LANES):
                total += sums[query * LANES + lane]
            for column in range(0, head_dim, LANES):
                whole = load(outputs, places[query] + column)
                store(outputs, places[query] + column, multiply(whole, full(_ONE / total)))
        count_up(counters, counter + 1)
        item = count_up(counters, counter)
