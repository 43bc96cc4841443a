"""Products of rows with the blocks of a GGUF file, for kernels that numba compiles for AVX2.

The blocks of eight outputs lie side by side: first a few bytes of all eight, then the next few, so that a vector has a lane for
each output. Nothing in a block is rounded.

A row is rounded to whole numbers of 8 bits. Inside a group a product is a sum of whole numbers, which no order rounds; groups
are added in order, each by the same few roundings. So what comes of a row depends on that row alone.

Layouts of blocks: ggml-common.h of llama.cpp, and quants.py of the gguf package, with whose results tests compare each kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from runtime.engine.block_tile import (
    BYTE,
    BYTES,
    FLOAT,
    FLOATS,
    INT,
    INTS,
    LONG,
    SHORTS,
    SIDE_BY_SIDE,
    Tile,
    as_pairs,
    beyond,
    call,
    constant,
    everywhere,
    filled,
    multiply_add,
    split_bytes,
    sum_byte_pairs,
    sum_pairs,
)

SMALL_GROUP = 32
"""Rows are rounded in groups of 32 with a scale for the whole row, and a whole factor for each group; in larger groups with a
scale for each."""

# What stays together when blocks are laid side by side: from which byte of a block on how many units of how many bytes, in the
# order in which kernels read them.
_UNITS: dict[Kind, tuple[tuple[int, int, int], ...]] = {
    Kind.Q8_0: ((0, 1, 2), (2, 8, 4)),
    Kind.Q4_0: ((0, 1, 2), (2, 4, 4)),
    Kind.Q4_1: ((0, 2, 2), (4, 4, 4)),
    Kind.Q5_0: ((0, 1, 2), (2, 5, 4)),
    Kind.Q5_1: ((0, 2, 2), (4, 5, 4)),
    Kind.Q4_K: ((0, 2, 2), (4, 12, 1), (16, 32, 4)),
    Kind.Q5_K: ((0, 2, 2), (4, 12, 1), (16, 40, 4)),
    Kind.Q6_K: (
        *((208, 1, 2), (192, 16, 1)),
        *(
            (begin, 4, 4)
            for half in range(2)
            for part in (0, 16)
            for begin in (64 * half + part, 64 * half + 32 + part, 128 + 32 * half + part)
        ),
    ),
}
KINDS = frozenset(_UNITS)
"""The kinds of blocks that rows can be multiplied with."""


def side_by_side(kind: Kind, blocks: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Rows of blocks [O, bytes] as kernels take them, flat; zeros fill up the last eight."""
    if missing := -len(blocks) % SIDE_BY_SIDE:
        blocks = np.pad(blocks, ((0, missing), (0, 0)))
    outputs = len(blocks)
    size = GGML_QUANT_SIZES[kind][1]
    whole = blocks.reshape(outputs // SIDE_BY_SIDE, SIDE_BY_SIDE, -1, size)
    laid = np.empty((whole.shape[0], whole.shape[2], SIDE_BY_SIDE * size), np.uint8)
    at = 0
    for begin, count, unit in _UNITS[kind]:
        parts = np.ascontiguousarray(whole[..., begin : begin + count * unit]).view(f"u{unit}").transpose(0, 2, 3, 1)
        length = SIDE_BY_SIDE * count * unit
        laid[..., at : at + length] = np.ascontiguousarray(parts).view(np.uint8).reshape(*laid.shape[:2], length)
        at += length
    return laid.reshape(-1)


_Add = Callable[[Tile, list[Any]], None]


# Each adds eight blocks' products to the sums of the tile's rows.


def _add_q8_0(tile: Tile, found: list[Any]) -> None:
    builder = tile.builder
    tile.fetch(0, 34)
    sums = [constant(INTS, 0)] * len(found)
    factors = [tile.factor(row) for row in tile.rows]
    for run in range(8):
        weights = tile.four_bytes(2 + 4 * run)
        sizes = call(builder, "llvm.abs.v32i8", BYTES, weights, ir.Constant(ir.IntType(1), 0))
        for row in tile.rows:
            # The first factor of the products has no sign: the second takes it over.
            steps = call(builder, "llvm.x86.avx2.psign.b", BYTES, tile.step(row, 4 * run), weights)
            products = sum_pairs(builder, sum_byte_pairs(builder, sizes, steps), factors[row])
            sums[row] = builder.add(sums[row], products)
    size = tile.numbers(0)
    for row in tile.rows:
        found[row] = multiply_add(builder, builder.sitofp(sums[row], FLOATS), size, found[row])


def _fifth_bits(builder: Any, bits: Any, run: int) -> Any:
    """16 where the bit of a weight is set, of four weights of each block from this run on, and else 0."""
    lanes = [lane // 4 * 4 + run // 2 for lane in range(32)]
    spread = builder.shuffle_vector(bits, bits, ir.Constant(ir.VectorType(INT, 32), lanes))
    own = ir.Constant(BYTES, [1 << (run % 2 * 4 + lane % 4) for lane in range(32)])
    return _where_set(builder, spread, own)


def _where_set(builder: Any, bits: Any, own: Any) -> Any:
    is_set = builder.icmp_unsigned("==", builder.and_(bits, own), own)
    return builder.select(is_set, constant(BYTES, 16), constant(BYTES, 0))


def _add_nibbles(*, has_fifth: bool, has_least: bool) -> _Add:
    """Q4_0 and Q5_0, whose weights lie around zero, and Q4_1 and Q5_1, to whose weights a block adds its least."""
    head = 4 if has_least else 2

    def add(tile: Tile, found: list[Any]) -> None:
        builder = tile.builder
        tile.fetch(0, head + 16 + 4 * has_fifth)
        bits = tile.four_bytes(head) if has_fifth else None

        def weights(runs: Iterable[int]) -> Iterator[tuple[int, Any]]:
            for run in runs:
                raw = tile.four_bytes(head + 4 * has_fifth + 4 * run)
                for half, nibbles in enumerate(split_bytes(builder, raw)):
                    place = 4 * half + run
                    yield 4 * place, builder.or_(nibbles, _fifth_bits(builder, bits, place)) if has_fifth else nibbles

        sums, factors = tile.zeros(), [tile.factor(row) for row in tile.rows]
        # Of weights of five bits four products at once fit into 16 bits.
        for runs in ((0, 1), (2, 3)) if has_fifth else (range(4),):
            tile.add_products(sums, weights(runs), factors)
        size = tile.numbers(0)
        middle = constant(FLOATS, -16.0 if has_fifth else -8.0)
        least = tile.numbers(2) if has_least else builder.fmul(size, middle)
        for row in tile.rows:
            whole = builder.sitofp(builder.load(sums[row]), FLOATS)
            found[row] = multiply_add(builder, least, tile.share(row), found[row])
            found[row] = multiply_add(builder, whole, size, found[row])

    return add


def _scale_of_six(tile: Tile, place: int) -> tuple[Any, Any]:
    """The scale and the least of a group of Q4_K or Q5_K."""
    builder = tile.builder

    def bits(at: int, shift: int, mask: int) -> Any:
        return builder.and_(builder.lshr(tile.bytes(4 + at), constant(INTS, shift)), constant(INTS, mask))

    if place < 4:
        return bits(place, 0, 63), bits(place + 4, 0, 63)
    upper = [builder.shl(bits(at, 6, 3), constant(INTS, 4)) for at in (place - 4, place)]
    return builder.or_(bits(place + 4, 0, 15), upper[0]), builder.or_(bits(place + 4, 4, 15), upper[1])


def _add_with_least(*, has_fifth: bool) -> _Add:
    """Q4_K and Q5_K: groups of 32 in a block of 256, each with a scale and a least of six bits."""

    def add(tile: Tile, found: list[Any]) -> None:
        builder = tile.builder
        below = [constant(INTS, 0)] * len(found)
        scales = cgutils.alloca_once(builder, ir.ArrayType(SHORTS, 8))
        for place in range(8):
            scale, least = (as_pairs(builder, one, one) for one in _scale_of_six(tile, place))
            builder.store(scale, cgutils.gep_inbounds(builder, scales, 0, place))
            for row in tile.rows:
                below[row] = builder.add(below[row], sum_pairs(builder, least, tile.sum(row, 2 * place)))
        below_size = builder.fneg(tile.numbers(2))
        for row in tile.rows:
            factor = builder.fmul(below_size, tile.scale(row))
            found[row] = multiply_add(builder, builder.sitofp(below[row], FLOATS), factor, found[row])

        sums = tile.zeros()
        with cgutils.for_range(builder, constant(LONG, 4)) as loop:
            first = builder.mul(loop.index, constant(LONG, 2))
            places = first, builder.add(first, constant(LONG, 1))
            bits = [builder.shl(constant(BYTE, 1), builder.trunc(place, BYTE)) for place in places]
            own = [filled(builder, one, BYTES) for one in bits]
            steps_at, raw_at = (builder.mul(loop.index, constant(LONG, count)) for count in (64, 32))
            tile.fetch(builder.mul(loop.index, constant(LONG, 44 if has_fifth else 36)), 44 if has_fifth else 36)

            def weights(half: int, runs: Iterable[int]) -> Iterator[tuple[Any, Any]]:
                for run in runs:
                    at = (48 if has_fifth else 16) + 4 * run
                    nibbles = split_bytes(builder, tile.four_bytes(builder.add(raw_at, constant(LONG, at))))[half]
                    if has_fifth:
                        fifth = _where_set(builder, tile.four_bytes(16 + 4 * run), own[half])
                        nibbles = builder.or_(nibbles, fifth)
                    yield builder.add(steps_at, constant(LONG, 32 * half + 4 * run)), nibbles

            for half, place in enumerate(places):
                factor = builder.load(cgutils.gep_inbounds(builder, scales, 0, place))
                for runs in (range(4), range(4, 8)) if has_fifth else (range(8),):
                    tile.add_products(sums, weights(half, runs), [factor] * len(found))
        size = tile.numbers(0)
        for row in tile.rows:
            whole = builder.sitofp(builder.load(sums[row]), FLOATS)
            found[row] = multiply_add(builder, whole, builder.fmul(size, tile.scale(row)), found[row])

    return add


def _add_q6_k(tile: Tile, found: list[Any]) -> None:
    builder = tile.builder
    below = [constant(INTS, 0)] * len(found)
    for place in range(0, 16, 2):
        factors = as_pairs(builder, tile.signed_bytes(2 + place), tile.signed_bytes(3 + place))
        for row in tile.rows:
            below[row] = builder.add(below[row], sum_pairs(builder, factors, tile.sum(row, place)))
    sums = tile.zeros()
    with cgutils.for_range(builder, constant(LONG, 4)) as loop:
        half, part = (getattr(builder, name)(loop.index, constant(LONG, 1)) for name in ("lshr", "and_"))
        raw_at = builder.add(builder.mul(loop.index, constant(LONG, 48)), constant(LONG, 18))
        tile.fetch(builder.mul(loop.index, constant(LONG, 53)), 53)

        def at(of_half: int, of_part: int, rest: int) -> Any:
            both = builder.add(builder.mul(half, constant(LONG, of_half)), builder.mul(part, constant(LONG, of_part)))
            return builder.add(both, constant(LONG, rest))

        def raw(more: int) -> Any:
            return tile.four_bytes(builder.add(raw_at, constant(LONG, more)))

        def weights(run: int, first: int) -> Iterator[tuple[Any, Any]]:
            for more in (first, first + 4):
                low = split_bytes(builder, raw(16 * (run % 2) + more))[run // 2]
                high = builder.lshr(raw(32 + more), constant(BYTES, 2 * run))
                upper = builder.shl(builder.and_(high, constant(BYTES, 3)), constant(BYTES, 4))
                yield at(128, 16, 32 * run + more), builder.or_(low, upper)

        scales = [tile.signed_bytes(at(8, 1, 2 + 2 * run)) for run in range(4)]
        factors = [as_pairs(builder, scale, scale) for scale in scales]
        for first in (0, 8):
            for run, factor in enumerate(factors):
                tile.add_products(sums, weights(run, first), [factor] * len(found))
    size = tile.numbers(0)
    for row in tile.rows:
        # A weight is its six bits less 32.
        less = builder.mul(below[row], constant(INTS, 32))
        whole = builder.sitofp(builder.sub(builder.load(sums[row]), less), FLOATS)
        found[row] = multiply_add(builder, whole, builder.fmul(size, tile.scale(row)), found[row])


_ADDERS: dict[Kind, _Add] = {
    Kind.Q8_0: _add_q8_0,
    Kind.Q4_0: _add_nibbles(has_fifth=False, has_least=False),
    Kind.Q4_1: _add_nibbles(has_fifth=False, has_least=True),
    Kind.Q5_0: _add_nibbles(has_fifth=True, has_least=False),
    Kind.Q5_1: _add_nibbles(has_fifth=True, has_least=True),
    Kind.Q4_K: _add_with_least(has_fifth=False),
    Kind.Q5_K: _add_with_least(has_fifth=True),
    Kind.Q6_K: _add_q6_k,
}


def _tile(count: int) -> Any:
    """An intrinsic that writes the products of `count` rows with eight outputs."""

    @intrinsic
    def multiply(
        typing: Any,
        kind: Any,
        blocks: Any,
        at: Any,
        rounded: Any,
        row: Any,
        inputs: Any,
        out: Any,
        to: Any,
        outputs: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            chosen, _, place, parts, first, width, _, target, between = given

            def data(array: Any, value: Any) -> Any:
                found = cgutils.create_struct_proxy(array)(context, builder, value).data
                return builder.bitcast(found, BYTE.as_pointer())

            blocks_at = builder.gep(data(blocks, given[1]), [place])
            made = [data(one, builder.extract_value(parts, index)) for index, one in enumerate(rounded.types)]
            numbers = [builder.add(first, constant(LONG, number)) for number in range(count)]
            sums = [cgutils.alloca_once(builder, FLOATS) for _ in numbers]
            scales = [cgutils.alloca_once(builder, FLOATS) for _ in numbers]
            for one, scale in zip(sums, scales, strict=True):
                builder.store(constant(FLOATS, 0.0), one)
                builder.store(constant(FLOATS, 1.0), scale)
            after = builder.append_basic_block("after")
            switch = builder.switch(chosen, after)
            for known, add in _ADDERS.items():
                block = builder.append_basic_block(known.name)
                switch.add_case(constant(LONG, int(known)), block)
                builder.position_at_end(block)
                values, size = GGML_QUANT_SIZES[known]
                groups = builder.sdiv(width, constant(LONG, values))
                # The bytes that each part of what was rounded has for a group.
                each = values, 4, values // 8, 4, 4
                starts = [
                    [beyond(builder, part, builder.mul(number, groups), bytes_) for number in numbers]
                    for part, bytes_ in zip(made, each, strict=True)
                ]
                if values == SMALL_GROUP:
                    for number, scale in zip(numbers, scales, strict=True):
                        builder.store(everywhere(builder, beyond(builder, made[1], number, 4), FLOAT), scale)
                with cgutils.for_range(builder, groups) as loop:
                    found = [builder.load(one) for one in sums]
                    here = [
                        [beyond(builder, one, loop.index, bytes_) for one in part]
                        for part, bytes_ in zip(starts, each, strict=True)
                    ]
                    block_at = beyond(builder, blocks_at, loop.index, SIDE_BY_SIDE * size)
                    add(Tile(builder, block_at, *here), found)
                    for one, value in zip(sums, found, strict=True):
                        builder.store(value, one)
                builder.branch(after)
            builder.position_at_end(after)
            for number, (one, scale) in enumerate(zip(sums, scales, strict=True)):
                total = builder.fmul(builder.load(one), builder.load(scale))
                far = builder.add(target, builder.mul(between, constant(LONG, number)))
                place = beyond(builder, data(out, given[6]), far, 4)
                builder.store(total, builder.bitcast(place, FLOATS.as_pointer()), align=1)
            return context.get_dummy_value()

        whole = types.intp
        return types.void(whole, blocks, whole, rounded, whole, whole, out, whole, whole), generate

    return multiply


one_row, two_rows, four_rows = (_tile(count) for count in (1, 2, 4))
