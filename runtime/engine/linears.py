"""Linear layers in the forms that CPU kernels read fastest, and the quantised ones.

In each a row's result is the same bits however many rows are beside it, from some number of rows on; the probe finds it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from runtime.errors import InvalidSetting

# FBGEMM's kernels for AVX2 sum the rows of a block of 3 to 6 in one order, and those of a smaller one in another.
_BLOCK_ROWS = 6
_SMALLEST_BLOCK_ROWS = 3

# A weight that half precision moves by no more than this, half its smallest step, moves a sum by less than float32 rounds.
_HALF_ROUNDING = 2.0**-25

# A row is multiplied as two digits from -64 to 64 each: sums of two products of 7 and 8 bits fit into the 16 that AVX2 has
# for them, and together the digits hold 14 bits.
_DIGIT = 128
_DIGIT_ZERO = 64
_LARGEST_ROW_STEP = 63 * _DIGIT + 63

# Weights of a row in so many columns share a scale and a zero.
INT4_GROUP = 32
_INT4_OUTPUTS = 16


class PackedLinear(nn.Module):
    """A linear with its weights in the blocks in which oneDNN's kernels read them.

    Unpacked, a few rows cost several times what one costs, and one row is summed in another order than several.
    """

    packed: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())  # noqa: SLF001 (torch has no public name)
        self.register_buffer("packed", packed, persistent=False)
        self.bias = linear.bias

    def forward(self, rows: Tensor) -> Tensor:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self.packed, self.bias, "none", [], "")  # noqa: SLF001
        return result


@dataclass(frozen=True, slots=True)
class Packed:
    """Weights as FBGEMM holds them, and how many bytes they are. Never changed, so copies of a model share them."""

    weights: torch.ScriptObject
    bytes: int

    def __deepcopy__(self, memo: object) -> Packed:
        return self


class OverRows(nn.Module):
    """A linear that multiplies rows of any shape as one list of them; its bias comes on top."""

    bias: nn.Parameter | None

    def forward(self, rows: Tensor) -> Tensor:
        result: Tensor = self.multiply(rows.flatten(0, -2)).to(rows.dtype).unflatten(0, rows.shape[:-1])
        return result if self.bias is None else result + self.bias

    def multiply(self, flat: Tensor) -> Tensor:
        """Rows [N, inputs] times the weights, in whichever type it computes."""
        raise NotImplementedError


class HalfLinear(OverRows):
    """A linear whose weights are read in half precision and multiplied in float32, by FBGEMM.

    For weights that half precision holds: those of a checkpoint in bfloat16 or float16.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        packed = torch.ops.quantized.linear_prepack_fp16(weight, None)
        self.packed = Packed(packed, weight.numel() * torch.float16.itemsize)
        self.bias = linear.bias

    @staticmethod
    def holds(linear: nn.Linear) -> bool:
        """Whether half precision rounds no weight away."""
        weight = linear.weight.detach()
        return bool((weight.half().float() - weight).abs().max() <= _HALF_ROUNDING)

    def multiply(self, flat: Tensor) -> Tensor:
        count = len(flat)
        if 0 < count % _BLOCK_ROWS < _SMALLEST_BLOCK_ROWS:
            flat = torch.cat((flat, flat[:1].expand(-count % _SMALLEST_BLOCK_ROWS, -1)))
        result: Tensor = torch.ops.quantized.linear_dynamic_fp16(flat, self.packed.weights)
        return result[:count]


class IntegerLinear(OverRows):
    """A linear with weights of 8 bits and a scale for each output, and rows of 14 bits and a scale each, by FBGEMM.

    Products and sums are whole numbers, so no order of them rounds anything.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scales = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
            zeros = torch.zeros(len(scales), dtype=torch.long)
            steps = torch.quantize_per_channel(weight, scales.double(), zeros, 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(steps, None)
        self.packed = Packed(packed, weight.numel() + scales.numel() * scales.itemsize)
        self.bias = linear.bias

    def multiply(self, flat: Tensor) -> Tensor:
        flat = flat.float()
        size = torch.linalg.vector_norm(flat, torch.inf, dim=-1, keepdim=True).clamp_(min=1e-30)
        exact = flat * (_LARGEST_ROW_STEP / _DIGIT / size)
        high = exact.round()
        digits = torch.cat((high, (exact - high) * _DIGIT))  # The kernel rounds the low ones.
        multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        products: Tensor = multiply(digits, 1.0, _DIGIT_ZERO, self.packed.weights)
        high_products, low_products = products.chunk(2)
        result: Tensor = low_products.add(high_products, alpha=_DIGIT).mul_(size / _LARGEST_ROW_STEP)
        return result


class Int8Linear(OverRows):
    """A linear with weights of 8 bits and a scale for each output; it computes in bfloat16."""

    weight: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        # The weights are rounded against the scale as it is kept, so that its own rounding costs nothing.
        scales = (weight.abs().amax(dim=1).clamp(min=1e-12) / 127).bfloat16()
        steps = (weight / scales.float().unsqueeze(1)).round().clamp(-128, 127)
        self.register_buffer("weight", steps.to(torch.int8), persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        self.bias = linear.bias

    def multiply(self, flat: Tensor) -> Tensor:
        result: Tensor = torch._weight_int8pack_mm(flat.bfloat16(), self.weight, self.scales)  # noqa: SLF001
        return result


class Int4Linear(OverRows):
    """A linear with weights of 4 bits, a scale and a zero for each `INT4_GROUP` of them; it computes in bfloat16."""

    packed: Tensor
    scales_and_zeros: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        """Raises InvalidSetting where the weights do not divide into groups."""
        super().__init__()
        outputs, inputs = linear.weight.shape
        if inputs % INT4_GROUP or outputs % _INT4_OUTPUTS:
            raise InvalidSetting(
                f"weights=int4 cannot hold a layer of {inputs} x {outputs}, which are not multiples of {INT4_GROUP} and "
                f"{_INT4_OUTPUTS}: set weights to int8 or none"
            )
        groups = linear.weight.detach().float().view(outputs, -1, INT4_GROUP)
        low, high = groups.amin(dim=2), groups.amax(dim=2)
        scales = ((high - low).clamp(min=1e-12) / 15).bfloat16()
        # A step of 8 stands for the zero.
        zeros = (low + 8 * scales.float()).bfloat16()
        steps = (groups - zeros.float().unsqueeze(2)) / scales.float().unsqueeze(2) + 8
        whole = steps.round().clamp(0, 15).to(torch.int32).view(outputs, inputs)
        self.register_buffer("packed", torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole, 1), persistent=False)  # noqa: SLF001
        together = torch.stack((scales, zeros), dim=-1).transpose(0, 1).contiguous()  # [groups, outputs, 2]
        self.register_buffer("scales_and_zeros", together, persistent=False)
        self.bias = linear.bias

    def multiply(self, flat: Tensor) -> Tensor:
        mm = torch.ops.aten._weight_int4pack_mm_for_cpu  # noqa: SLF001
        result: Tensor = mm(flat.bfloat16(), self.packed, INT4_GROUP, self.scales_and_zeros)
        return result


def replace_linears(model: nn.Module, head: nn.Module, weights: str, dtype: torch.dtype, device: torch.device) -> None:
    """Gives the linears of `model` the form for this setting of `weights`, one after the other, so that memory holds one twice.

    The `head` is kept in 8 bits under int4 too: it decides between tokens. Raises InvalidSetting.
    """
    if weights != "none" and device.type != "cpu":
        raise InvalidSetting(f"weights={weights} runs on device=cpu only: set weights to none, or device to cpu")
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, nn.Linear):
                continue
            form: Callable[[nn.Linear], nn.Module] | None = None
            if weights == "int8" or (weights == "int4" and child is head):
                form = IntegerLinear if knows_fbgemm() else Int8Linear
            elif weights == "int4":
                form = Int4Linear
            elif can_pack(dtype, device):
                form = HalfLinear if knows_fbgemm() and HalfLinear.holds(child) else PackedLinear
            if form is not None:
                setattr(parent, name, form(child))


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN's packed form is there and known to be the faster one."""
    return dtype == torch.float32 and device.type == "cpu" and torch.backends.mkldnn.is_available()


def knows_fbgemm() -> bool:
    """Whether FBGEMM is there with the kernels whose order of sums is known here: those for AVX2."""
    # Tensors of quantised types, from which it packs, are to leave torch.
    has_operators = hasattr(torch, "quantize_per_channel") and "fbgemm" in torch.backends.quantized.supported_engines
    return has_operators and torch.backends.cpu.get_cpu_capability() == "AVX2"


def weights_bytes(model: nn.Module) -> int:
    """What the weights of a model take, in whichever form its linears hold theirs."""
    forms = (PackedLinear, Int8Linear, Int4Linear)
    held = [buffer for module in model.modules() if isinstance(module, forms) for buffer in module.buffers()]
    packed = sum(module.packed.bytes for module in model.modules() if isinstance(module, (HalfLinear, IntegerLinear)))
    return sum(weight.numel() * weight.itemsize for weight in (*model.parameters(), *held)) + packed
