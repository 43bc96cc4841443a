"""Quantised blocks in the forms that engines hold, each compared with what the gguf package makes of it."""

import numpy as np
import pytest
import torch
from gguf import dequantize
from torch import Tensor

from runtime.engine.blocks import Blocks, unpack
from runtime.engine.stored import Tally, matrix_of
from runtime.gguf_file import StoredTensor
from tests.gguf_files import HALVES, Kind, drawn_blocks

FORMS = {
    Kind.Q8_0: "8 bits with a scale in float16 for each 32",
    Kind.Q4_0: "4 bits with a scale in float16 for each 32",
    Kind.Q4_1: "4 bits with a scale in float16 and an offset for each 32",
    Kind.Q5_0: "8 bits with a scale in float16 for each 32",
    Kind.Q5_1: "8 bits with a scale in float16 and an offset for each 32",
    Kind.Q4_K: "4 bits with a scale in float32 and an offset for each 32",
    Kind.Q5_K: "8 bits with a scale in float32 and an offset for each 32",
    Kind.Q6_K: "8 bits with a scale in float32 for each 16",
    Kind.MXFP4: "8 bits with a scale in float32 for each 32",
}
# Those whose offset is a sum of two products, which float32 may round where gguf rounds others.
SUMMED = (Kind.Q4_K, Kind.Q5_K)
OUTPUTS, INPUTS = 64, 1024


def stored(kind: Kind, seed: int = 0) -> StoredTensor:
    return StoredTensor(kind, (OUTPUTS, INPUTS), lambda: drawn_blocks(kind, OUTPUTS, INPUTS, seed))


def blocks_of(tensor: StoredTensor) -> Blocks:
    blocks = unpack(tensor)
    assert blocks is not None
    return blocks


def dequantised(tensor: StoredTensor) -> Tensor:
    return torch.from_numpy(dequantize(tensor.read(), tensor.kind).copy())


@pytest.mark.parametrize("kind", FORMS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("seed", range(4))
def test_every_weight_of_a_block_is_what_gguf_dequantises_it_to(kind: Kind, seed: int) -> None:
    tensor = stored(kind, seed)
    expected = dequantised(tensor)

    weights = blocks_of(tensor).dense(torch.float64)

    if kind in SUMMED:
        largest = expected.unflatten(1, (-1, 32)).abs().amax(dim=2, keepdim=True).double()
        errors = (weights - expected).unflatten(1, (-1, 32)).abs()
        assert (errors <= largest * torch.finfo(torch.float32).eps * 4).all()
    else:
        assert torch.equal(weights.float(), expected)


def test_mxfp4_is_what_gguf_dequantises_it_to_at_every_scale_and_number() -> None:
    """Of the scales but the last two, which reach past float32 or stand for no number."""
    numbers = np.arange(256, dtype=np.uint8).reshape(16, 16)
    blocks = np.concatenate(
        [np.repeat(np.arange(253, dtype=np.uint8), 16)[:, None], np.tile(numbers, (253, 1))], axis=1
    )
    tensor = StoredTensor(Kind.MXFP4, (253, 16 * 32), lambda: blocks.reshape(253, -1))

    assert torch.equal(blocks_of(tensor).dense(torch.float32), dequantised(tensor))


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q4_K], ids=lambda kind: kind.name)
def test_steps_of_four_bits_fit_into_four_bits_with_a_sign(kind: Kind) -> None:
    steps = blocks_of(stored(kind)).steps

    assert (int(steps.min()), int(steps.max())) == (-8, 7)


@pytest.mark.parametrize("kind", FORMS, ids=lambda kind: kind.name)
def test_what_became_of_a_kind_is_told_with_its_memory(kind: Kind) -> None:
    tally = Tally()
    tensor = stored(kind)

    matrix = matrix_of(tensor, tally)

    (line,) = tally.lines()
    assert line.startswith(f"1 of {kind.name}: {FORMS[kind]}, ")
    assert f"{matrix.nbytes / 2**20:.1f} MiB for {tensor.nbytes / 2**20:.1f} in the file, no value rounded" in line


@pytest.mark.parametrize("kind", [Kind.Q2_K, Kind.Q3_K], ids=lambda kind: kind.name)
def test_a_kind_without_a_form_is_rounded_to_eight_bits_and_the_error_is_told(kind: Kind) -> None:
    assert kind in HALVES
    tensor = stored(kind)
    tally = Tally()

    matrix = matrix_of(tensor, tally)

    assert isinstance(matrix, Blocks)
    error = (matrix.dense(torch.float32) - dequantised(tensor)).abs().max() / dequantised(tensor).abs().max()
    # Half a step of 127.
    assert 0 < error < 0.5 / 127 + 1e-4
    assert f"moved by at most {error:.2%} of the largest" in tally.lines()[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_values_that_are_not_quantised_keep_their_type(dtype: torch.dtype) -> None:
    values = torch.randn(OUTPUTS, INPUTS).to(dtype)
    kind = {torch.float32: Kind.F32, torch.float16: Kind.F16, torch.bfloat16: Kind.BF16}[dtype]
    raw = values.view(torch.uint8).numpy().astype(np.uint8)

    matrix = matrix_of(StoredTensor(kind, (OUTPUTS, INPUTS), lambda: raw), Tally())

    assert isinstance(matrix, Tensor)
    assert matrix.dtype == dtype
    assert torch.equal(matrix, values)
