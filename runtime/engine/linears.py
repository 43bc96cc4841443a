"""Linear layers in forms in which a row gets the same bits whatever rows are beside it, among them quantised ones.

Each form names its ground (`runtime.engine.exact`); docs/adr/0010 has the sources.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from runtime.engine.configuration import HEAD_MOST_ROWS
from runtime.engine.exact import Ground
from runtime.engine.machine import Level, level
from runtime.errors import InvalidSetting

# The most rows in one call of a kernel, so that a probe can try every count.
MOST_ROWS = 128

# On AMX a product in 16 bits costs the same for one row as for this many; elsewhere fewer rows cost less.
_FIXED_ROWS_ON_AMX, _FIXED_ROWS_ON_CPU = 32, 4
# A GPU waits for the weights of a product, so this many rows take no longer than one.
ROWS_ON_GPU = 64

# FBGEMM's kernels for AVX2 sum rows in blocks of 3 to 6 in one order, and in smaller blocks in another.
_BLOCK_ROWS = 6
_SMALLEST_BLOCK_ROWS = 3

# If half precision moves a weight by no more than this, half its smallest step, a sum moves by less than float32's rounding.
_HALF_ROUNDING = 2.0**-25

# The low half of a weight is this many bits below the high one; both are scaled to use half precision's largest exponents.
_LOW_SHIFT = 2.0**11
_LARGEST_EXPONENT = 14

# A row is multiplied as two digits from -64 to 64: sums of two products of 7 and 8 bits fit into the 16 bits that AVX2 has
# for them, and both digits together hold 14 bits.
_DIGIT = 128
_DIGIT_ZERO = 64
_LARGEST_ROW_STEP = 63 * _DIGIT + 63

# Weights of a row in this many columns share a scale and a zero.
INT4_GROUP = 32
_INT4_OUTPUTS = 16


@dataclass(frozen=True, slots=True)
class Packed:
    """Weights in FBGEMM's form, and their size in bytes. They never change, so copies of a model share them."""

    weights: torch.ScriptObject
    bytes: int

    def __deepcopy__(self, memo: object) -> Packed:
        return self


class RowLinear(nn.Module):
    """A linear that multiplies rows of any shape as one list, at most `most_rows` at once, and then adds its bias."""

    ground: ClassVar[Ground]
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, most_rows: int = MOST_ROWS) -> None:
        super().__init__()
        self.inputs, self.outputs = linear.in_features, linear.out_features
        self.most_rows = most_rows
        self.bias = linear.bias

    def forward(self, rows: Tensor) -> Tensor:
        parts = [self.multiply(part) for part in rows.flatten(0, -2).split(self.most_rows)]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        result: Tensor = whole.to(rows.dtype).unflatten(0, rows.shape[:-1])
        return result if self.bias is None else result + self.bias

    def multiply(self, flat: Tensor) -> Tensor:
        """Rows [N, inputs], at most `most_rows`, times the weights; the type of the result is that in which the form computes."""
        raise NotImplementedError


class FixedRowsLinear(RowLinear):
    """torch's own linear, always called with the same number of rows, by which its kernels choose their order of sums."""

    ground = Ground.FIXED_ROWS

    def __init__(self, linear: nn.Linear, rows: int) -> None:
        super().__init__(linear, rows)
        self.linear: nn.Linear = linear
        self.bias = None

    def multiply(self, flat: Tensor) -> Tensor:
        missing = self.most_rows - len(flat)
        padded = nn.functional.pad(flat, (0, 0, 0, missing)) if missing else flat
        products: Tensor = self.linear(padded)
        return products[: len(flat)]


class HalfLinear(RowLinear):
    """A linear whose weights are read in half precision and multiplied in float32, by FBGEMM.

    For weights that half precision holds: those of a checkpoint in bfloat16 or float16.
    """

    ground = Ground.ROW_BY_ROW

    def __init__(self, linear: nn.Linear, most_rows: int = MOST_ROWS) -> None:
        super().__init__(linear, most_rows)
        self.packed = _packed_halves(linear.weight.detach())

    @staticmethod
    def holds(linear: nn.Linear) -> bool:
        """Whether half precision can hold every weight of this linear."""
        weight = linear.weight.detach()
        low, high = torch.aminmax(weight)
        if max(-low, high) > torch.finfo(torch.float16).max:
            return False
        # Weights that came from bfloat16 are recognised by their lower bits; it has fewer digits than half precision.
        is_bfloat16 = not (weight.view(torch.int32) & 0xFFFF).any()
        return is_bfloat16 or bool((weight.half().float() - weight).abs().max() <= _HALF_ROUNDING)

    def multiply(self, flat: Tensor) -> Tensor:
        return _times_halves(flat, self.packed)


class TwoHalvesLinear(RowLinear):
    """A linear whose float32 weights are held as two half-precision numbers each, rounded weight and remainder, by FBGEMM.

    Together they hold a weight to half of its last bit, unless it is 2^-25 times as small as the largest or less.
    """

    ground = Ground.ROW_BY_ROW

    def __init__(self, linear: nn.Linear, most_rows: int = MOST_ROWS) -> None:
        super().__init__(linear, most_rows)
        weight = linear.weight.detach()
        largest = float(weight.abs().max()) or 1.0
        # A power of two, so that scaling rounds nothing.
        self._scale = float(2.0 ** (_LARGEST_EXPONENT - torch.tensor(largest).log2().floor()))
        scaled = weight * self._scale
        self.packed = _packed_halves(scaled)
        self.low = _packed_halves((scaled - scaled.half().float()) * _LOW_SHIFT)

    def multiply(self, flat: Tensor) -> Tensor:
        low = _times_halves(flat, self.low)
        return _times_halves(flat, self.packed).add_(low, alpha=1 / _LOW_SHIFT).mul_(1 / self._scale)


def _packed_halves(weight: Tensor) -> Packed:
    packed = torch.ops.quantized.linear_prepack_fp16(weight, None)
    return Packed(packed, weight.numel() * torch.float16.itemsize)


def _times_halves(flat: Tensor, packed: Packed) -> Tensor:
    count = len(flat)
    if 0 < count % _BLOCK_ROWS < _SMALLEST_BLOCK_ROWS:
        flat = torch.cat((flat, flat[:1].expand(-count % _SMALLEST_BLOCK_ROWS, -1)))
    result: Tensor = torch.ops.quantized.linear_dynamic_fp16(flat.float(), packed.weights)
    return result[:count]


class IntegerLinear(RowLinear):
    """A linear with weights of 8 bits and a scale for each output, and rows of 14 bits and a scale each, by FBGEMM."""

    ground = Ground.WHOLE_NUMBERS

    def __init__(self, linear: nn.Linear, most_rows: int = MOST_ROWS) -> None:
        super().__init__(linear, most_rows)
        weight = linear.weight.detach().float()
        scales = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
            zeros = torch.zeros(len(scales), dtype=torch.long)
            steps = torch.quantize_per_channel(weight, scales.double(), zeros, 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(steps, None)
        self.packed = Packed(packed, weight.numel() + scales.numel() * scales.itemsize)

    def multiply(self, flat: Tensor) -> Tensor:
        flat = flat.float()
        size = torch.linalg.vector_norm(flat, torch.inf, dim=-1, keepdim=True).clamp_(min=1e-30)
        exact = flat * (_LARGEST_ROW_STEP / _DIGIT / size)
        high = exact.round()
        digits = torch.cat((high, (exact - high) * _DIGIT))  # The kernel rounds the low digits.
        multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        products: Tensor = multiply(digits, 1.0, _DIGIT_ZERO, self.packed.weights)
        high_products, low_products = products.chunk(2)
        result: Tensor = low_products.add(high_products, alpha=_DIGIT).mul_(size / _LARGEST_ROW_STEP)
        return result


class Int8Linear(RowLinear):
    """A linear with weights of 8 bits and a scale for each output; it computes in bfloat16."""

    ground = Ground.ROW_BY_ROW
    weight: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Linear, most_rows: int = MOST_ROWS) -> None:
        super().__init__(linear, most_rows)
        weight = linear.weight.detach().float()
        # Weights are rounded against the scale as stored, so that the scale's own rounding adds no error.
        scales = (weight.abs().amax(dim=1).clamp(min=1e-12) / 127).bfloat16()
        steps = (weight / scales.float().unsqueeze(1)).round().clamp(-128, 127)
        self.register_buffer("weight", steps.to(torch.int8), persistent=False)
        self.register_buffer("scales", scales, persistent=False)

    def multiply(self, flat: Tensor) -> Tensor:
        result: Tensor = torch._weight_int8pack_mm(flat.bfloat16(), self.weight, self.scales)  # noqa: SLF001
        return result


class Int4Linear(RowLinear):
    """A linear with weights of 4 bits, a scale and a zero for each `INT4_GROUP` of them; it computes in bfloat16."""

    ground = Ground.ROW_BY_ROW
    packed: Tensor
    scales_and_zeros: Tensor

    def __init__(self, linear: nn.Linear, most_rows: int = MOST_ROWS) -> None:
        """Raises InvalidSetting if the weights do not divide into groups."""
        super().__init__(linear, most_rows)
        outputs, inputs = linear.weight.shape
        if inputs % INT4_GROUP or outputs % _INT4_OUTPUTS:
            raise InvalidSetting(
                f"weights=int4 cannot hold a layer of {inputs} x {outputs}, which are not multiples of {INT4_GROUP} and "
                f"{_INT4_OUTPUTS}: set weights to int8 or none"
            )
        groups = linear.weight.detach().float().view(outputs, -1, INT4_GROUP)
        low, high = groups.amin(dim=2), groups.amax(dim=2)
        scales = ((high - low).clamp(min=1e-12) / 15).bfloat16()
        # A step of 8 represents zero.
        zeros = (low + 8 * scales.float()).bfloat16()
        steps = (groups - zeros.float().unsqueeze(2)) / scales.float().unsqueeze(2) + 8
        whole = steps.round().clamp(0, 15).to(torch.int32).view(outputs, inputs)
        self.register_buffer("packed", self._pack(whole), persistent=False)
        together = torch.stack((scales, zeros), dim=-1).transpose(0, 1).contiguous()  # [groups, outputs, 2]
        self.register_buffer("scales_and_zeros", together, persistent=False)

    def multiply(self, flat: Tensor) -> Tensor:
        mm = torch.ops.aten._weight_int4pack_mm_for_cpu  # noqa: SLF001
        result: Tensor = mm(flat.bfloat16(), self.packed, INT4_GROUP, self.scales_and_zeros)
        return result

    def _pack(self, whole: Tensor) -> Tensor:
        """Steps [outputs, inputs] from 0 to 15, as the kernel reads them."""
        packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole, 1)  # noqa: SLF001
        return packed


class Int4OnGpuLinear(Int4Linear):
    """As Int4Linear, for CUDA's kernel, which keeps weights in tiles of its tensor cores."""

    ground = Ground.FIXED_ROWS

    def multiply(self, flat: Tensor) -> Tensor:
        missing = self.most_rows - len(flat)
        rows = nn.functional.pad(flat.bfloat16(), (0, 0, 0, missing)) if missing else flat.bfloat16()
        mm = torch.ops.aten._weight_int4pack_mm  # noqa: SLF001
        result: Tensor = mm(rows, self.packed, INT4_GROUP, self.scales_and_zeros)
        return result[: len(flat)]

    def _pack(self, whole: Tensor) -> Tensor:
        # Of two steps in a byte, the first lies in the upper half.
        pairs = (whole[:, ::2] << 4 | whole[:, 1::2]).to(torch.uint8)
        packed: Tensor = torch.ops.aten._convert_weight_to_int4pack(pairs, _inner_tiles(self.inputs))  # noqa: SLF001
        return packed


def _inner_tiles(inputs: int) -> int:
    """The number of tiles of 16 columns that CUDA's kernel takes at once: 8, or fewer if that divides the inputs."""
    return next(tiles for tiles in (8, 4, 2) if inputs % (16 * tiles) == 0)


def replace_linears(
    model: nn.Module, head: nn.Module, weights: str, dtype: torch.dtype, device: torch.device, *, is_strict: bool = True
) -> None:
    """Gives the linears of `model` the form for this setting of `weights`, one at a time, so that only one is held twice.

    Under int4 the `head` is held in 8 bits, because it decides between tokens. Unless `is_strict`, linears that need a fixed
    number of rows to be exact stay torch's own. Raises InvalidSetting.
    """
    if weights != "none" and device.type not in ("cpu", "cuda"):
        raise InvalidSetting(
            f"weights={weights} does not run on device={device.type}: set weights to none, or device to cpu"
        )
    # By name, because a list of linears would keep each of them in memory to the end.
    parents = [part for part in model.modules() if not isinstance(part, nn.Linear)]
    for parent in parents:
        for name in [name for name, _ in parent.named_children()]:
            child = getattr(parent, name)
            if isinstance(child, nn.Linear):
                form = _form_of(child, child is head, weights, dtype, device)(child)
                if is_strict or not isinstance(form, FixedRowsLinear):
                    setattr(parent, name, form)


def _form_of(
    linear: nn.Linear, is_head: bool, weights: str, dtype: torch.dtype, device: torch.device
) -> Callable[[nn.Linear], RowLinear]:
    most_rows = HEAD_MOST_ROWS if is_head else MOST_ROWS
    if linear.out_features < _INT4_OUTPUTS:
        # Gates with few columns, which fewer bits would not make faster.
        weights = "none"
    if weights != "none" and device.type == "cuda":
        return partial(Int8Linear if is_head or weights == "int8" else Int4OnGpuLinear, most_rows=ROWS_ON_GPU)
    if weights == "int4" and not is_head:
        return partial(Int4Linear, most_rows=most_rows)
    if weights in ("int8", "int4"):
        # With AVX-512 torch's own kernel is as fast, and needs less work around it.
        is_integer = has_fbgemm() and level() == Level.AVX2
        return partial(IntegerLinear if is_integer else Int8Linear, most_rows=most_rows)
    if dtype == torch.float32 and device.type == "cpu" and has_fbgemm():
        return partial(HalfLinear if HalfLinear.holds(linear) else TwoHalvesLinear, most_rows=most_rows)
    if device.type != "cpu":
        return partial(FixedRowsLinear, rows=ROWS_ON_GPU)
    is_on_amx = dtype == torch.bfloat16 and level() == Level.AMX
    return partial(FixedRowsLinear, rows=_FIXED_ROWS_ON_AMX if is_on_amx else _FIXED_ROWS_ON_CPU)


def has_fbgemm() -> bool:
    """Whether FBGEMM is available, with kernels whose order of sums is known: those for AVX2 and AVX-512."""
    # torch deprecates the quantised tensor types from which FBGEMM packs.
    has_operators = hasattr(torch, "quantize_per_channel") and "fbgemm" in torch.backends.quantized.supported_engines
    return has_operators and level() >= Level.AVX2


def weights_bytes(model: nn.Module) -> int:
    """The size in bytes of a model's weights, in the forms in which its linears hold them."""
    modules = list(model.modules())
    held = [buffer for part in modules if isinstance(part, (Int8Linear, Int4Linear)) for buffer in part.buffers()]
    packed = [value for part in modules for value in vars(part).values() if isinstance(value, Packed)]
    return sum(weight.numel() * weight.itemsize for weight in (*model.parameters(), *held)) + sum(
        one.bytes for one in packed
    )
