"""Linears in other forms than torch's own: near to it, and the same bits for a row in every batch."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from runtime.engine.linears import (
    INT4_GROUP,
    MOST_ROWS,
    FixedRowsLinear,
    HalfLinear,
    Int4Linear,
    Int8Linear,
    IntegerLinear,
    RowLinear,
    TwoHalvesLinear,
    has_fbgemm,
    replace_linears,
)
from runtime.engine.machine import Level, level
from runtime.engine.probe import is_exact_function
from runtime.errors import InvalidSetting
from tests.runtime.engine.feeding import threads

CPU = torch.device("cpu")
FORMS: dict[str, tuple[Callable[[nn.Linear], RowLinear], float]] = {
    "fixed rows": (partial(FixedRowsLinear, rows=8), 1e-6),
    # Shares of the result's own size: bfloat16 has 8 bits, and weights 8 or 4.
    "int8": (Int8Linear, 0.02),
    "int4": (Int4Linear, 0.15),
}
if has_fbgemm():
    FORMS |= {"half": (HalfLinear, 1e-3), "two halves": (TwoHalvesLinear, 1e-6), "integer": (IntegerLinear, 0.01)}
NEEDS_FBGEMM = pytest.mark.skipif(not has_fbgemm(), reason="FBGEMM's kernels for AVX2 or AVX-512 are not here")


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_computes_what_the_linear_does_but_for_rounding(form: str, has_bias: bool) -> None:
    make, tolerance = FORMS[form]
    torch.manual_seed(0)
    linear = nn.Linear(256, 96, bias=has_bias)
    rows = torch.randn(1, 20, 256)

    with torch.inference_mode():
        expected, found = linear(rows), make(linear)(rows)

    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert (found - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize(("inputs", "outputs"), [(1024, 512), (2048, 256), (576, 192)])
@pytest.mark.parametrize("form", FORMS)
def test_a_row_has_the_same_bits_in_every_batch(form: str, inputs: int, outputs: int) -> None:
    torch.manual_seed(1)
    linear = FORMS[form][0](nn.Linear(inputs, outputs, bias=False))

    with torch.inference_mode(), threads(2):
        assert is_exact_function(linear, inputs, torch.float32, 2 * linear.most_rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [8, 32])
def test_torchs_own_linears_are_exact_on_one_fixed_number_of_rows(dtype: torch.dtype, rows: int) -> None:
    linear = FixedRowsLinear(nn.Linear(2048, 512, bias=False, dtype=dtype), rows)

    with torch.inference_mode(), threads(2):
        assert is_exact_function(linear, 2048, dtype, 3 * rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", [form for form in FORMS if form.startswith("int")])
def test_quantised_forms_take_rows_of_any_type_and_give_the_same(form: str, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    linear = nn.Linear(128, 64, bias=False).to(dtype)
    rows = torch.randn(5, 128).to(dtype)

    found = FORMS[form][0](linear)(rows)

    assert found.dtype == dtype
    torch.testing.assert_close(found, linear(rows), rtol=0.1, atol=0.3)


def test_a_weight_of_nothing_stays_nothing() -> None:
    linear = nn.Linear(64, 32, bias=False)
    nn.init.zeros_(linear.weight)

    for make, _ in FORMS.values():
        assert make(linear)(torch.randn(3, 64)).count_nonzero() == 0


class Model(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, 64))
        self.head = nn.Linear(64, 48)


def forms(model: Model) -> list[type]:
    return [type(part) for part in (model.layer[0], model.layer[2], model.head)]


def test_a_model_gets_the_form_that_its_weights_are_to_have() -> None:
    found = {}
    for weights in ("none", "int8", "int4"):
        model = Model()
        replace_linears(model, model.head, weights, torch.float32, CPU)
        found[weights] = forms(model)

    plain = TwoHalvesLinear if has_fbgemm() else FixedRowsLinear
    eight = IntegerLinear if level() == Level.AVX2 else Int8Linear
    assert found == {
        "none": [plain] * 3,
        "int8": [eight] * 3,
        "int4": [Int4Linear, Int4Linear, eight],
    }


def test_a_head_is_given_fewer_rows_at_once() -> None:
    model: Any = Model()
    replace_linears(model, model.head, "int8", torch.float32, CPU)

    assert model.layer[0].most_rows == MOST_ROWS
    assert model.head.most_rows < MOST_ROWS


@NEEDS_FBGEMM
@pytest.mark.parametrize("of", [torch.bfloat16, torch.float16])
def test_weights_of_a_checkpoint_in_half_precision_are_read_in_it(of: torch.dtype) -> None:
    model = Model().to(of).float()
    replace_linears(model, model.head, "none", torch.float32, CPU)

    assert forms(model) == [HalfLinear] * 3


@NEEDS_FBGEMM
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_two_halves_hold_weights_of_float32_whatever_their_size(size: float) -> None:
    torch.manual_seed(3)
    linear = nn.Linear(512, 256, bias=False)
    linear.weight.data.mul_(size)
    exact = linear.weight.double()
    rows = torch.randn(40, 512)

    found = TwoHalvesLinear(linear)(rows).double()

    expected = rows.double() @ exact.T
    their_error = (linear(rows).double() - expected).square().mean().sqrt()
    assert (found - expected).square().mean().sqrt() < 2 * their_error


def test_weights_that_half_precision_would_round_are_not_held_in_it() -> None:
    large = nn.Linear(64, 48)
    large.weight.data.fill_(2.0**17)

    assert not HalfLinear.holds(nn.Linear(64, 48))
    assert not HalfLinear.holds(large)


@NEEDS_FBGEMM
@pytest.mark.parametrize("inputs", [64, 1000, 3072])
def test_integer_products_of_the_largest_rows_and_weights_do_not_overflow(inputs: int) -> None:
    linear = nn.Linear(inputs, 32, bias=False)
    nn.init.constant_(linear.weight, -0.5)
    rows = torch.stack((torch.full((inputs,), 3.0), torch.full((inputs,), -3.0)))

    torch.testing.assert_close(IntegerLinear(linear)(rows), linear(rows), rtol=1e-4, atol=0)


def test_in_a_type_of_16_bits_torchs_own_linears_get_a_fixed_number_of_rows_unless_speed_is_all() -> None:
    strict, fast = Model(), Model()
    replace_linears(strict, strict.head, "none", torch.bfloat16, CPU)
    replace_linears(fast, fast.head, "none", torch.bfloat16, CPU, is_strict=False)

    assert forms(strict) == [FixedRowsLinear] * 3
    assert forms(fast) == [nn.Linear] * 3


def test_quantised_weights_where_torch_has_no_kernels_for_them_are_refused() -> None:
    model = Model()
    with pytest.raises(InvalidSetting, match="weights=int8 does not run on device=mps"):
        replace_linears(model, model.head, "int8", torch.float16, torch.device("mps"))


def test_a_layer_that_does_not_divide_into_groups_is_refused_under_int4() -> None:
    model = Model(width=INT4_GROUP + 1)
    with pytest.raises(InvalidSetting, match="weights=int4"):
        replace_linears(model, model.head, "int4", torch.float32, CPU)


class Watched(nn.Linear):
    """A linear that counts how many of its kind there are whenever its weights are asked for."""

    alive: ClassVar[weakref.WeakSet[Watched]] = weakref.WeakSet()
    counts: ClassVar[list[int]] = []

    def __init__(self) -> None:
        super().__init__(64, 64, bias=False)
        self.alive.add(self)

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            self.counts.append(len(self.alive))
        return super().__getattr__(name)


def test_a_linear_is_let_go_before_the_next_one_gets_its_form() -> None:
    model = nn.Sequential(nn.ModuleList(Watched() for _ in range(4)), nn.Sequential(*(Watched() for _ in range(4))))
    Watched.counts.clear()

    replace_linears(model, nn.Identity(), "int8", torch.float32, CPU)

    assert list(dict.fromkeys(Watched.counts)) == [8, 7, 6, 5, 4, 3, 2, 1]
    assert not Watched.alive
