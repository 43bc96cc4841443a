"""Rows and blocks as kernels of products meet them: eight blocks side by side, and one to four rows that are rounded.

The functions here write instructions of LLVM; what they take and return are its values.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba.core import cgutils

SIDE_BY_SIDE = 8
"""Outputs whose blocks lie side by side."""

BYTE, SHORT, INT, LONG, FLOAT = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
BYTES, SHORTS, INTS, FLOATS = (
    ir.VectorType(kind, count) for kind, count in ((BYTE, 32), (SHORT, 16), (INT, 8), (FLOAT, 8))
)
# Bytes between what is multiplied and what is read for later: memory takes about as long as the products in between.
_AHEAD, _LINE = 2048, 64
EIGHT_BYTES, EIGHT_HALVES = ir.VectorType(BYTE, 8), ir.VectorType(ir.HalfType(), 8)


@dataclass(frozen=True, slots=True)
class Tile:
    """Some rows that are multiplied with eight blocks together.

    For each row there is a place in each part of what `round_row` wrote: where this group begins.
    """

    builder: Any
    block: Any
    steps: Sequence[Any]
    scales: Sequence[Any]
    sums: Sequence[Any]
    factors: Sequence[Any]
    shares: Sequence[Any]

    @property
    def rows(self) -> range:
        return range(len(self.steps))

    def numbers(self, at: int) -> Any:
        """A half-precision number of each block, as float32."""
        return self.builder.fpext(self._of_blocks(EIGHT_HALVES, at), FLOATS)

    def bytes(self, at: int) -> Any:
        """A byte of each block, in 32 bits."""
        return self.builder.zext(self._of_blocks(EIGHT_BYTES, at), INTS)

    def signed_bytes(self, at: Any) -> Any:
        return self.builder.sext(self._of_blocks(EIGHT_BYTES, at), INTS)

    def four_bytes(self, at: Any) -> Any:
        return self._of_blocks(BYTES, at)

    def step(self, row: int, at: Any) -> Any:
        """Four steps of a row, from this one of the group on, for every output."""
        return self.builder.bitcast(everywhere(self.builder, self.steps[row], INT, at), BYTES)

    def scale(self, row: int) -> Any:
        return everywhere(self.builder, self.scales[row], FLOAT)

    def sum(self, row: int, at: int) -> Any:
        """The sums of two of a row's runs of 16."""
        return self.builder.bitcast(everywhere(self.builder, self.sums[row], INT, 2 * at), SHORTS)

    def factor(self, row: int) -> Any:
        return self.builder.bitcast(everywhere(self.builder, self.factors[row], INT), SHORTS)

    def share(self, row: int) -> Any:
        return everywhere(self.builder, self.shares[row], FLOAT)

    def add_products(self, sums: Sequence[Any], weights: Iterable[tuple[Any, Any]], factors: Sequence[Any]) -> None:
        """Adds to each row's sum that of its steps times `weights`, four at a time from this step on, times the row's factor.

        So many products fit into 16 bits.
        """
        builder = self.builder
        short: list[Any] = [None] * len(sums)
        for at, four in weights:
            for row in self.rows:
                pairs = sum_byte_pairs(builder, four, self.step(row, at))
                short[row] = pairs if short[row] is None else builder.add(short[row], pairs)
        for row, place in enumerate(sums):
            products = sum_pairs(builder, short[row], factors[row])
            builder.store(builder.add(builder.load(place), products), place)

    def zeros(self) -> list[Any]:
        """A sum of each row for every output, in memory that LLVM makes registers of."""
        return [cgutils.alloca_once_value(self.builder, constant(INTS, 0)) for _ in self.rows]

    def fetch(self, at: Any, count: int) -> None:
        """Has the CPU begin to read so many bytes of each of the blocks that come some time later."""
        builder = self.builder
        kind = ir.FunctionType(ir.VoidType(), [BYTE.as_pointer(), INT, INT, INT])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        place = beyond(builder, beyond(builder, self.block, at, SIDE_BY_SIDE), _AHEAD)
        for line in range(0, SIDE_BY_SIDE * count, _LINE):
            # To read, into all caches, and no code.
            builder.call(function, [beyond(builder, place, line), *(constant(INT, value) for value in (0, 3, 1))])

    def _of_blocks(self, kind: Any, at: Any) -> Any:
        place = beyond(self.builder, self.block, at, SIDE_BY_SIDE)
        return read(self.builder, place, kind)


def constant(kind: Any, value: Any) -> Any:
    return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)


def beyond(builder: Any, place: Any, numbers: Any, bytes_: int = 1) -> Any:
    """The place so many `numbers` of these bytes further on: a whole number, or a value of the kernel's."""
    if isinstance(numbers, int):
        numbers = constant(LONG, numbers)
    return builder.gep(place, [builder.mul(numbers, constant(LONG, bytes_))])


def read(builder: Any, place: Any, kind: Any, offset: Any = 0) -> Any:
    return builder.load(builder.bitcast(beyond(builder, place, offset), kind.as_pointer()), align=1)


def everywhere(builder: Any, place: Any, kind: Any, offset: Any = 0) -> Any:
    """What lies there, in all eight lanes."""
    return filled(builder, read(builder, place, kind, offset), ir.VectorType(kind, 8))


def filled(builder: Any, value: Any, kind: Any) -> Any:
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, constant(INT, 0))
    return builder.shuffle_vector(first, first, constant(ir.VectorType(INT, kind.count), 0))


def call(builder: Any, name: str, kind: Any, *given: Any) -> Any:
    function = ir.FunctionType(kind, [one.type for one in given])
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), given)


def sum_pairs(builder: Any, left: Any, right: Any) -> Any:
    """The sums of two products each, of 16 numbers of 16 bits: 8 of 32 bits."""
    return call(builder, "llvm.x86.avx2.pmadd.wd", INTS, left, right)


def sum_byte_pairs(builder: Any, unsigned: Any, signed: Any) -> Any:
    """The sums of two products each, of 32 bytes without and with a sign: 16 of 16 bits, which have to hold them."""
    return call(builder, "llvm.x86.avx2.pmadd.ub.sw", SHORTS, unsigned, signed)


def multiply_add(builder: Any, left: Any, right: Any, summand: Any) -> Any:
    return call(builder, "llvm.fma.v8f32", FLOATS, left, right, summand)


def split_bytes(builder: Any, raw: Any) -> tuple[Any, Any]:
    """The low and the high halves of bytes."""
    return builder.and_(raw, constant(BYTES, 15)), builder.lshr(raw, constant(BYTES, 4))


def as_pairs(builder: Any, first: Any, second: Any) -> Any:
    """Two small whole numbers of 32 bits for each output, as one pair of 16 bits."""
    low = builder.and_(first, constant(INTS, 0xFFFF))
    return builder.bitcast(builder.or_(low, builder.shl(second, constant(INTS, 16))), SHORTS)
