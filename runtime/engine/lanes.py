"""Vectors of 16 numbers for kernels that numba compiles, computed exactly in the order that the kernel states.

LLVM makes them of what the CPU has: one register of AVX-512, two of AVX2. Every operation is that of IEEE 754, and none is
reordered or fused that is not written so: the same numbers come to the same bits wherever a kernel meets them.

The functions with `@intrinsic` are for kernels alone. Their arrays are flat, and places in them count elements.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.core.caching import FunctionCache
from numba.core.registry import CPUDispatcher
from numba.extending import intrinsic, models, register_model

from runtime.caches import cache_folder
from runtime.engine.machine import Level, hardware_level

LANES = 16
# As many sums as registers hold beside what they are made of: AVX-512 has 32 registers for a vector, AVX2 has 8 pairs.
_SUMS_AT_ONCE = LANES if hardware_level() >= Level.AVX512 else 4

# Without numba's allocator a kernel has no symbols but those that a process knows which has compiled nothing.
_OPTIONS = {"nopython": True, "nogil": True, "error_model": "numpy", "_nrt": False}

_Function = TypeVar("_Function", bound=Callable[..., Any])

_BYTE, _SHORT, _INT, _BOOL = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(1)
_FLOAT = ir.FloatType()
_FLOATS, _INTS, _BOOLS = (ir.VectorType(kind, LANES) for kind in (_FLOAT, _INT, _BOOL))


class _Cache(FunctionCache):
    """A cache that costs a compilation where its files are damaged or cannot be written, and never a start."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            # numba's own would first load all that it compiles with: a quarter of a second, and 30 MB.
            return self._load_overload(sig, target_context)
        # What a damaged file raises depends on its bytes: pickle raises all kinds.
        except Exception:
            try:
                self.flush()
            except OSError:
                self.disable()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(OSError):
            super().save_overload(sig, data)


class _Kernel(CPUDispatcher):
    def enable_caching(self) -> None:
        self._cache = _Cache(self.py_func)


def kernel(function: _Function) -> _Function:
    """Compiles a function for this CPU, kept in this user's cache. Several threads may call the result at once.

    What is divided by zero is infinite or no number, as IEEE 754 has it: nothing is raised.
    """
    compiled: Any = _Kernel(function, targetoptions=_OPTIONS)
    folder = _kernel_folder()
    if folder is not None:
        before, config.CACHE_DIR = config.CACHE_DIR, str(folder)
        try:
            # By default numba caches beside the source; that file would stay after an uninstall, and be taken for the
            # package.
            with suppress(RuntimeError, OSError):
                compiled.enable_caching()
        finally:
            config.CACHE_DIR = before
    result: _Function = compiled
    return result


def _kernel_folder() -> Path | None:
    """Where kernels made of this code are kept, once those of other code are cleared away; None for a user without a home."""
    home = cache_folder()
    if home is None:
        return None
    folder = home / "kernels" / _code()
    if not folder.exists():
        shutil.rmtree(folder.parent, ignore_errors=True)
    return folder


@cache
def _code() -> str:
    # numba knows a kernel by its own bytecode and file, and not by the intrinsics that it is made of.
    here = Path(__file__)
    names = (
        "lanes.py",
        "row_kernel.py",
        "block_tile.py",
        "block_lanes.py",
        "block_kernel.py",
        "crew.py",
    )
    return hashlib.sha256(b"".join(here.with_name(name).read_bytes() for name in names)).hexdigest()[:24]


class _Vector(types.Type):
    pass


class _Mask(types.Type):
    pass


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _FLOATS)


@register_model(_Mask)
class _MaskModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _BOOLS)


_vector, _mask = _Vector("vector"), _Mask("mask")


def _ints(value: int) -> ir.Constant:
    return ir.Constant(_INTS, [value] * LANES)


def _filled(builder: Any, value: Any, kind: ir.VectorType) -> Any:
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_INT, 0))
    return builder.shuffle_vector(first, first, _ints(0))


def _place(context: Any, builder: Any, kind: Any, array: Any, at: Any) -> Any:
    return builder.gep(cgutils.create_struct_proxy(kind)(context, builder, array).data, [at])


def _read(builder: Any, place: Any, kind: Any = _FLOATS) -> Any:
    # Rows are aligned only to their elements.
    return builder.load(builder.bitcast(place, kind.as_pointer()), align=1)


def _write(builder: Any, value: Any, place: Any) -> None:
    builder.store(value, builder.bitcast(place, value.type.as_pointer()), align=1)


def _call(builder: Any, name: str, *given: Any) -> Any:
    kind = ir.FunctionType(_FLOATS, [_FLOATS] * len(given))
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{LANES}f32"), given)


def _lanewise(name: str, given: int) -> Any:
    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return _call(builder, name, *values)

    return _vector(*[_vector] * given), generate


@intrinsic
def array_at(typing: Any, address: Any, count: Any, dtype: Any) -> Any:
    """The array of `count` numbers that lies at an address, which has to outlive it."""
    kind = types.Array(dtype.dtype, 1, "C")

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        array = context.make_array(kind)(context, builder)
        size = context.get_constant(types.intp, context.get_abi_sizeof(context.get_data_type(kind.dtype)))
        array.data = builder.inttoptr(values[0], context.get_data_type(kind.dtype).as_pointer())
        array.nitems, array.itemsize = values[1], size
        array.shape, array.strides = (cgutils.pack_array(builder, [one]) for one in (values[1], size))
        array.meminfo, array.parent = (cgutils.get_null_value(part.type) for part in (array.meminfo, array.parent))
        return array._getvalue()  # noqa: SLF001 # numba has no other name for it.

    return kind(types.int64, types.int64, dtype), generate


@intrinsic
def load(typing: Any, array: Any, at: Any) -> Any:
    """16 numbers of an array of float32, bfloat16 (as uint16), float16 (as int16) or int8."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = _place(context, builder, array, *values)
        if array.dtype == types.float32:
            return _read(builder, place)
        if array.dtype == types.int8:
            return builder.sitofp(_read(builder, place, ir.VectorType(_BYTE, LANES)), _FLOATS)
        if array.dtype == types.int16:
            return builder.fpext(_read(builder, place, ir.VectorType(ir.HalfType(), LANES)), _FLOATS)
        upper = builder.zext(_read(builder, place, ir.VectorType(_SHORT, LANES)), _INTS)
        return builder.bitcast(builder.shl(upper, _ints(16)), _FLOATS)

    return _vector(array, types.intp), generate


@intrinsic
def store(typing: Any, array: Any, at: Any, numbers: Any) -> Any:
    """Writes 16 numbers in one of the types of `load`, each rounded to the nearest; int8 takes whole numbers."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place, floats = _place(context, builder, array, *values[:2]), values[2]
        if array.dtype == types.float32:
            _write(builder, floats, place)
        elif array.dtype == types.int8:
            _write(builder, builder.fptosi(floats, ir.VectorType(_BYTE, LANES)), place)
        elif array.dtype == types.int16:
            _write(builder, builder.fptrunc(floats, ir.VectorType(ir.HalfType(), LANES)), place)
        else:
            bits = builder.bitcast(floats, _INTS)
            is_odd = builder.and_(builder.lshr(bits, _ints(16)), _ints(1))
            rounded = builder.add(builder.add(bits, _ints(0x7FFF)), is_odd)
            _write(builder, builder.trunc(builder.lshr(rounded, _ints(16)), ir.VectorType(_SHORT, LANES)), place)
        return context.get_dummy_value()

    return types.void(array, types.intp, _vector), generate


@intrinsic
def load_scale(typing: Any, array: Any, at: Any) -> Any:
    """The float32 in the bytes of an array of int8 from `at` on; 1 of any other array."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        if array.dtype != types.int8:
            return ir.Constant(_FLOAT, 1.0)
        return _read(builder, _place(context, builder, array, *values), _FLOAT)

    return types.float32(array, types.intp), generate


@intrinsic
def store_scale(typing: Any, array: Any, at: Any, scale: Any) -> Any:
    """Puts a float32 into the bytes of an array of int8 from `at` on."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        _write(builder, values[2], _place(context, builder, array, *values[:2]))
        return context.get_dummy_value()

    return types.void(array, types.intp, types.float32), generate


@intrinsic
def full(typing: Any, number: Any) -> Any:
    """The number in all 16 lanes."""
    return _vector(types.float32), lambda context, builder, signature, values: _filled(builder, values[0], _FLOATS)


@intrinsic
def add(typing: Any, left: Any, right: Any) -> Any:
    return _vector(_vector, _vector), lambda context, builder, signature, values: builder.fadd(*values)


@intrinsic
def multiply(typing: Any, left: Any, right: Any) -> Any:
    return _vector(_vector, _vector), lambda context, builder, signature, values: builder.fmul(*values)


@intrinsic
def divide(typing: Any, left: Any, right: Any) -> Any:
    return _vector(_vector, _vector), lambda context, builder, signature, values: builder.fdiv(*values)


@intrinsic
def multiply_add(typing: Any, left: Any, right: Any, summand: Any) -> Any:
    """`left * right + summand`, rounded once."""
    return _lanewise("fma", 3)


@intrinsic
def larger(typing: Any, left: Any, right: Any) -> Any:
    return _lanewise("maxnum", 2)


@intrinsic
def absolute(typing: Any, numbers: Any) -> Any:
    return _lanewise("fabs", 1)


@intrinsic
def nearest(typing: Any, numbers: Any) -> Any:
    """The nearest whole numbers, even ones where two are as near."""
    return _lanewise("rint", 1)


@intrinsic
def power_of_two(typing: Any, exponents: Any) -> Any:
    """2 to the power of whole numbers from -126 to 127."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        biased = builder.add(builder.fptosi(values[0], _INTS), _ints(127))
        return builder.bitcast(builder.shl(biased, _ints(23)), _FLOATS)

    return _vector(_vector), generate


def _over_lanes(builder: Any, numbers: Any, join: Callable[[Any, Any], Any]) -> Any:
    """The 16 joined to one: lanes 8 apart first, then those 4, 2 and 1 apart."""
    distance = LANES // 2
    while distance:
        across = ir.Constant(_INTS, [lane ^ distance for lane in range(LANES)])
        numbers = join(numbers, builder.shuffle_vector(numbers, numbers, across))
        distance //= 2
    return builder.extract_element(numbers, ir.Constant(_INT, 0))


@intrinsic
def largest(typing: Any, numbers: Any) -> Any:
    """The largest of the 16."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return _over_lanes(builder, values[0], lambda one, other: _call(builder, "maxnum", one, other))

    return types.float32(_vector), generate


@intrinsic
def sum_of(typing: Any, numbers: Any) -> Any:
    """The sum of the 16."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return _over_lanes(builder, values[0], builder.fadd)

    return types.float32(_vector), generate


@intrinsic
def positive(typing: Any, numbers: Any) -> Any:
    """Which of the 16 are larger than 0."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.fcmp_ordered(">", values[0], ir.Constant(_FLOATS, [0.0] * LANES))

    return _mask(_vector), generate


@intrinsic
def within(typing: Any, first: Any, low: Any, high: Any) -> Any:
    """Which of the whole numbers `first`, `first + 1` and so on lie in [low, high)."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        begin, least, end = (_filled(builder, builder.trunc(one, _INT), _INTS) for one in values)
        numbers = builder.add(begin, ir.Constant(_INTS, list(range(LANES))))
        return builder.and_(builder.icmp_signed(">=", numbers, least), builder.icmp_signed("<", numbers, end))

    return _mask(types.intp, types.intp, types.intp), generate


@intrinsic
def either(typing: Any, one: Any, other: Any) -> Any:
    return _mask(_mask, _mask), lambda context, builder, signature, values: builder.or_(*values)


@intrinsic
def choose(typing: Any, mask: Any, where_true: Any, elsewhere: Any) -> Any:
    return _vector(_mask, _vector, _vector), lambda context, builder, signature, values: builder.select(*values)


@intrinsic
def dot_products(typing: Any, rows: Any, at: Any, other: Any, other_at: Any, width: Any) -> Any:
    """The products of 16 consecutive rows, of `width` float32 each, with another one. The width is a multiple of 16."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        first = _place(context, builder, rows, *values[:2])
        vector = _place(context, builder, other, *values[2:4])
        columns = values[4]
        none = ir.Constant(columns.type, 0)
        step = ir.Constant(columns.type, LANES)
        sums = [cgutils.alloca_once_value(builder, ir.Constant(_FLOATS, [0.0] * LANES)) for _ in range(LANES)]
        for begin in range(0, LANES, _SUMS_AT_ONCE):
            some = range(begin, begin + _SUMS_AT_ONCE)
            for number in some:
                builder.store(ir.Constant(_FLOATS, [0.0] * LANES), sums[number])
            with cgutils.for_range_slice(builder, none, columns, step, columns.type) as (column, _):
                theirs = _read(builder, builder.gep(vector, [column]))
                for number in some:
                    place = builder.add(column, builder.mul(columns, ir.Constant(columns.type, number)))
                    ours = _read(builder, builder.gep(first, [place]))
                    builder.store(_call(builder, "fma", theirs, ours, builder.load(sums[number])), sums[number])
        return _sums_of_each(builder, [builder.load(one) for one in sums])

    return _vector(rows, types.intp, other, types.intp, types.intp), generate


def _sums_of_each(builder: Any, vectors: list[Any]) -> Any:
    """The sum over the lanes of each of 16 vectors: neighbours first, then pairs of them, and so on."""
    distance = 1
    while len(vectors) > 1:
        # Lanes whose number has the bit `distance` set take from the right vector, the others from the left.
        own = [lane + LANES * bool(lane & distance) for lane in range(LANES)]
        across = [(lane ^ distance) + LANES * bool(lane & distance) for lane in range(LANES)]
        vectors = [
            builder.fadd(*(builder.shuffle_vector(left, right, ir.Constant(_INTS, lanes)) for lanes in (own, across)))
            for left, right in zip(vectors[::2], vectors[1::2], strict=True)
        ]
        distance *= 2
    return vectors[0]


@intrinsic
def add_weighted(
    typing: Any, sums: Any, at: Any, kept: Any, weights: Any, weights_at: Any, rows: Any, rows_at: Any, width: Any
) -> Any:
    """Makes of `width` sums, times `kept`, their own and 16 rows, each times its weight. The width is a multiple of 16."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        target = _place(context, builder, sums, *values[:2])
        shares = _place(context, builder, weights, *values[3:5])
        first = _place(context, builder, rows, *values[5:7])
        columns = values[7]

        def of_columns(column: Any, count: int) -> None:
            places = [
                builder.gep(target, [builder.add(column, ir.Constant(columns.type, part * LANES))])
                for part in range(count)
            ]
            found = [builder.fmul(_read(builder, place), values[2]) for place in places]
            for number in range(LANES):
                share = _filled(
                    builder, _read(builder, builder.gep(shares, [ir.Constant(_INT, number)]), _FLOAT), _FLOATS
                )
                row = builder.add(column, builder.mul(columns, ir.Constant(columns.type, number)))
                for part in range(count):
                    place = builder.add(row, ir.Constant(columns.type, part * LANES))
                    found[part] = _call(builder, "fma", share, _read(builder, builder.gep(first, [place])), found[part])
            for place, one in zip(places, found, strict=True):
                _write(builder, one, place)

        # A sum waits for the sum before; four at once take as long as one, so use four as far as the width allows.
        many = ir.Constant(columns.type, 4 * LANES)
        edge = builder.sub(columns, builder.srem(columns, many))
        none = ir.Constant(columns.type, 0)
        with cgutils.for_range_slice(builder, none, edge, many, columns.type) as (column, _):
            of_columns(column, 4)
        with cgutils.for_range_slice(builder, edge, columns, ir.Constant(columns.type, LANES), columns.type) as (
            column,
            _,
        ):
            of_columns(column, 1)
        return context.get_dummy_value()

    return types.void(sums, types.intp, _vector, weights, types.intp, rows, types.intp, types.intp), generate
