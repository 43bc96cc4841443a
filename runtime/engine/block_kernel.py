"""Kernels of what lies between the attention of two layers, over the blocks of a GGUF file.

Each works on a row by itself, in an order that its text states, so that a row's bits do not depend on the rows beside it.
Letters: N rows, K numbers of a row, O outputs.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np

from runtime.engine.block_lanes import SMALL_GROUP, four_rows, one_row, two_rows
from runtime.engine.block_tile import SIDE_BY_SIDE
from runtime.engine.crew import count_up, wait_for
from runtime.engine.lanes import (
    LANES,
    absolute,
    add,
    array_at,
    choose,
    divide,
    full,
    kernel,
    larger,
    largest,
    load,
    multiply,
    multiply_add,
    nearest,
    positive,
    store,
    sum_of,
)
from runtime.engine.row_kernel import attend_rows, exp_of, turn_vector, write_row


class Operation(IntEnum):
    """What a step does, with `width` numbers of each row; `source`, `other` and `target` are columns of the space they lie in."""

    ROUND = 0
    """Rounds `source` in groups of `group` numbers."""
    MULTIPLY = 1
    """Writes products of the rows rounded last with `outputs` rows of blocks, from the byte `weight` on, to `target`."""
    NORM = 2
    """Norms `count` vectors of each row of `source` into `target`, with the constants from `weight` on."""
    ADD = 3
    """Adds `source` to `target`."""
    BIAS = 4
    """Adds the constants from `weight` on to each row of `target`."""
    GATE = 5
    """Makes silu of `target`, times `other`, of `target`."""
    TURN = 6
    """Turns `count` vectors of each row of `target` by the row's angles: cosines in `source`, sines in `other`."""


_FIELDS = (
    *("operation", "source", "other", "target", "width", "count"),
    *("weight", "kind", "row_bytes", "outputs", "group"),
)
STEP = np.dtype([*((name, np.int64) for name in _FIELDS), ("epsilon", np.float64)])
"""A step of a program. In a space of N rows a column c, and those beside it, begin at c * N; one row follows the other."""

_ZERO, _ONE, _LARGEST_INT8 = np.float32(0), np.float32(1), np.float32(127)
# A quiet group of a row is rounded no coarser than 1 / 4095 of the step of its loudest. Sums of a block fit into 32 bits.
_LARGEST_FACTOR = np.float32(4095)
# What would be divided by a smaller number is too large for float32, or has too few bits left.
_LEAST_SCALE = np.float32(2.0**-100)
CLAIMED = 32
"""Outputs that a thread claims at once."""


@kernel
def run_program(
    program: Any,
    begin: int,
    end: int,
    weights: Any,
    space: Any,
    rounded: Any,
    rows: int,
    counters: Any,
) -> None:
    """One thread's share of the steps `begin` to `end` of a `program` [STEP] on N `rows`. Every thread of a crew calls it alike.

    `weights` are addresses and counts of blocks and constants, `space` is float32; `rounded` is as `round_row` writes it.
    `counters` are two zeros for each step.
    """
    blocks, constants = array_at(weights[0], weights[1], np.uint8), array_at(weights[2], weights[3], np.float32)
    for number in range(begin, end):
        step = program[number]
        parts = rows
        if step.operation == Operation.MULTIPLY:
            parts = (step.outputs + CLAIMED - 1) // CLAIMED
        part = count_up(counters, 2 * number)
        while part < parts:
            at, to = step.source * rows + part * step.width, step.target * rows + part * step.width
            if step.operation == Operation.MULTIPLY:
                last = min((part + 1) * CLAIMED, step.outputs)
                multiply_blocks(step, blocks, rounded, rows, space, part * CLAIMED, last)
            elif step.operation == Operation.ROUND:
                round_row(space, at, step.group, step.width, rounded, part)
            elif step.operation == Operation.NORM:
                norm_row(space, at, constants, step.weight, np.float32(step.epsilon), to, step.width, step.count)
            elif step.operation == Operation.ADD:
                add_row(space, at, space, to, step.width)
            elif step.operation == Operation.BIAS:
                add_row(constants, step.weight, space, to, step.width)
            elif step.operation == Operation.GATE:
                gate_row(space, step.other * rows + part * step.width, to, step.width)
            else:
                width = step.width // step.count
                cosine, sine = step.source * rows + part * width, step.other * rows + part * width
                for one in range(to, to + step.width, width):
                    turn_vector(space, one, space, cosine, space, sine, space, one, width)
            count_up(counters, 2 * number + 1)
            part = count_up(counters, 2 * number)
        wait_for(counters, 2 * number + 1, parts)


@kernel
def run_layers(
    program: Any,
    starts: Any,
    weights: Any,
    space: Any,
    rounded: Any,
    counters: Any,
    columns: Any,
    heads: int,
    head_dim: int,
    slots: Any,
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
    room: Any,
    places: Any,
) -> None:
    """One thread's share of a forward: pieces of a `program` [STEP], and after each but the last the attention of a layer.

    Pieces lie between `starts` [L + 1]. `weights` [L, 4], `space` and `rounded` are as `run_program` takes them, and what follows
    `slots` [N] as `attend_rows` does; `columns` are those of query, key and value, and of what was attended to. `counters` are
    two zeros for each step, and four for each layer. Every thread of a crew calls it alike. The keys and values of the last layer
    are not written.
    """
    rows, groups = len(positions), keys.shape[2]
    query, key, value, attended = columns
    for layer in range(len(weights)):
        run_program(program, starts[layer], starts[layer + 1], weights[layer], space, rounded, rows, counters)
        if layer + 1 == len(weights):
            break
        counter = 2 * len(program) + 4 * layer
        new_keys = space[key * rows : (key + groups * head_dim) * rows].reshape(rows, groups, head_dim)
        new_values = space[value * rows : (value + groups * head_dim) * rows].reshape(rows, groups, head_dim)
        row = count_up(counters, counter)
        while row < rows:
            write_row(layer, keys, new_keys, row, slabs[row], slots[row])
            write_row(layer, values, new_values, row, slabs[row], slots[row])
            count_up(counters, counter + 1)
            row = count_up(counters, counter)
        wait_for(counters, counter + 1, rows)
        attend_rows(
            layer,
            space[attended * rows : (attended + heads * head_dim) * rows].reshape(rows, heads, head_dim),
            space[query * rows : (query + heads * head_dim) * rows].reshape(rows, heads, head_dim),
            cosines,
            sines,
            keys,
            values,
            slabs,
            positions,
            firsts,
            counts,
            sink,
            window,
            scaling,
            counters,
            counter + 2,
            room,
            places,
        )
        wait_for(counters, counter + 3, len(firsts) * groups)


@kernel
def multiply_blocks(step: Any, blocks: Any, rounded: Any, rows: int, space: Any, begin: int, end: int) -> None:
    """Writes the products of N `rows` with the outputs `begin` to `end` of a step."""
    kind, inputs, outputs = step.kind, step.width, step.outputs
    for one in range(begin, end, SIDE_BY_SIDE):
        at, row = step.weight + one * step.row_bytes, 0
        to = step.target * rows + one
        while rows - row >= 4:
            four_rows(kind, blocks, at, rounded, row, inputs, space, to + row * outputs, outputs)
            row += 4
        if rows - row >= 2:
            two_rows(kind, blocks, at, rounded, row, inputs, space, to + row * outputs, outputs)
            row += 2
        if rows - row >= 1:
            one_row(kind, blocks, at, rounded, row, inputs, space, to + row * outputs, outputs)


@kernel
def round_row(space: Any, at: int, group: int, width: int, rounded: Any, row: int) -> None:
    """Rounds a row to 8 bits, in groups of 32 or more.

    `rounded` is, in this order, the steps [N * K] int8; scales, float32; the sums of 16 steps each [N * K / 16] int16; and for
    groups of 32 [N * K / 32] whole factors, twice in the halves of an int32, and the sums of steps times that factor, float32.
    A group's scale is its own [N * K / group], or the row's [N] times its factor.
    """
    steps, scales, sums, factors, shares = rounded
    groups = width // group
    row_scale = _ZERO
    if group == SMALL_GROUP:
        row_scale = _size_of(space, at, width) / (_LARGEST_INT8 * _LARGEST_FACTOR)
        row_scale = _ZERO if row_scale < _LEAST_SCALE else row_scale
        scales[row] = row_scale
    for number in range(groups):
        begin = at + number * group
        place = row * groups + number
        size = _size_of(space, begin, group)
        factor = 0
        if group == SMALL_GROUP:
            shrunk = _ZERO
            if row_scale > _ZERO:
                near = np.ceil(size / (_LARGEST_INT8 * row_scale))
                factor = int(min(max(near, _ONE), _LARGEST_FACTOR))
                shrunk = _ONE / (row_scale * np.float32(factor))
            factors[place] = factor << 16 | factor
        else:
            scales[place] = size / _LARGEST_INT8
            shrunk = _LARGEST_INT8 / size if size > _LEAST_SCALE else _ZERO
        of_group = 0
        for column in range(0, group, LANES):
            to = place * group + column
            store(steps, to, nearest(multiply(load(space, begin + column), full(shrunk))))
            whole = 0
            for lane in range(LANES):
                whole += steps[to + lane]
            sums[to // LANES] = whole
            of_group += whole
        if group == SMALL_GROUP:
            shares[place] = of_group * factor


@kernel
def _size_of(space: Any, at: int, count: int) -> Any:
    """The largest size of so many numbers; not a number if one of them is not, or is infinite."""
    top, nothing = full(_ZERO), full(_ZERO)
    for column in range(at, at + count, LANES):
        numbers = load(space, column)
        top = larger(top, absolute(numbers))
        nothing = multiply_add(numbers, full(_ZERO), nothing)
    return largest(top) + sum_of(nothing)


@kernel
def norm_row(space: Any, at: int, weights: Any, weight: int, epsilon: Any, to: int, width: int, count: int) -> None:
    """The root mean square norm (arXiv 1910.07467) of each of `count` vectors of a row of `width` numbers."""
    each = width // count
    for vector in range(count):
        begin, target = at + vector * each, to + vector * each
        squares = full(_ZERO)
        for column in range(begin, begin + each, LANES):
            numbers = load(space, column)
            squares = multiply_add(numbers, numbers, squares)
        shrunk = full(_ONE / np.sqrt(sum_of(squares) / np.float32(each) + epsilon))
        for column in range(0, each, LANES):
            normed = multiply(multiply(load(space, begin + column), shrunk), load(weights, weight + column))
            store(space, target + column, normed)


@kernel
def add_row(given: Any, at: int, space: Any, to: int, width: int) -> None:
    for column in range(0, width, LANES):
        store(space, to + column, add(load(space, to + column), load(given, at + column)))


@kernel
def gate_row(space: Any, other: int, to: int, width: int) -> None:
    one = full(_ONE)
    for column in range(0, width, LANES):
        gate = load(space, to + column)
        size = absolute(gate)
        fall = exp_of(multiply(size, full(-_ONE)))
        # For a number above zero its sigmoid is 1 / (1 + exp(-x)), for one below exp(x) / (1 + exp(x)).
        share = divide(choose(positive(gate), one, fall), add(one, fall))
        store(space, to + column, multiply(multiply(gate, share), load(space, other + column)))
