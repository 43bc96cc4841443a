"""Linears in other forms than torch's own: near to it, and the same bits for a row in every batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from runtime.engine.linears import (
    INT4_GROUP,
    HalfLinear,
    Int4Linear,
    Int8Linear,
    IntegerLinear,
    PackedLinear,
    can_pack,
    knows_fbgemm,
    replace_linears,
)
from runtime.errors import InvalidSetting

CPU = torch.device("cpu")
FORMS: dict[str, tuple[Callable[[nn.Linear], nn.Module], float]] = {
    "packed": (PackedLinear, 1e-5),
    # Shares of the result's own size: bfloat16 has 8 bits, and weights 8 or 4.
    "int8": (Int8Linear, 0.02),
    "int4": (Int4Linear, 0.15),
}
if knows_fbgemm():
    FORMS |= {"half": (HalfLinear, 1e-3), "integer": (IntegerLinear, 0.01)}


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


@pytest.mark.parametrize("form", FORMS)
def test_a_row_has_the_same_bits_in_every_batch(form: str) -> None:
    torch.manual_seed(1)
    linear = FORMS[form][0](nn.Linear(1024, 512, bias=False))
    rows = torch.randn(256, 1024)

    with torch.inference_mode():
        whole = linear(rows)
        for first, last in ((0, 1), (17, 18), (3, 5), (0, 32), (5, 70), (100, 256)):
            assert torch.equal(linear(rows[first:last]), whole[first:last])


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

    plain = PackedLinear if can_pack(torch.float32, CPU) else nn.Linear
    eight = IntegerLinear if knows_fbgemm() else Int8Linear
    assert found == {
        "none": [plain] * 3,
        "int8": [eight] * 3,
        "int4": [Int4Linear, Int4Linear, eight],
    }


@pytest.mark.skipif(not knows_fbgemm(), reason="FBGEMM's kernels for AVX2 are not here")
@pytest.mark.parametrize("of", [torch.bfloat16, torch.float16])
def test_weights_of_a_checkpoint_in_half_precision_are_read_in_it(of: torch.dtype) -> None:
    model = Model().to(of).float()
    replace_linears(model, model.head, "none", torch.float32, CPU)

    assert forms(model) == [HalfLinear] * 3


def test_weights_that_half_precision_would_round_are_not_held_in_it() -> None:
    assert not HalfLinear.holds(nn.Linear(64, 48))


@pytest.mark.skipif(not knows_fbgemm(), reason="FBGEMM's kernels for AVX2 are not here")
@pytest.mark.parametrize("inputs", [64, 1000, 3072])
def test_integer_products_of_the_largest_rows_and_weights_do_not_overflow(inputs: int) -> None:
    linear = nn.Linear(inputs, 32, bias=False)
    nn.init.constant_(linear.weight, -0.5)
    rows = torch.stack((torch.full((inputs,), 3.0), torch.full((inputs,), -3.0)))

    torch.testing.assert_close(IntegerLinear(linear)(rows), linear(rows), rtol=1e-4, atol=0)


def test_where_kernels_of_another_type_are_known_to_be_right_nothing_is_replaced() -> None:
    model = Model()
    replace_linears(model, model.head, "none", torch.bfloat16, CPU)

    assert forms(model) == [nn.Linear] * 3


def test_quantised_weights_elsewhere_than_on_a_cpu_are_refused() -> None:
    model = Model()
    with pytest.raises(InvalidSetting, match="weights=int8 runs on device=cpu only"):
        replace_linears(model, model.head, "int8", torch.float16, torch.device("cuda"))


def test_a_layer_that_does_not_divide_into_groups_is_refused_under_int4() -> None:
    model = Model(width=INT4_GROUP + 1)
    with pytest.raises(InvalidSetting, match="weights=int4"):
        replace_linears(model, model.head, "int4", torch.float32, CPU)
