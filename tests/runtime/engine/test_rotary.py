"""Rotary angles: those of transformers, exact at any position."""

import math
from decimal import Decimal, getcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from runtime.engine.rotary import ExactRotary, rotate
from runtime.errors import ModelUnavailable

HEAD_DIM = 64
TURN = "6.28318530717958647692528676655900576839433879875021"


def rotary(rope_type: str = "default", **more: object) -> tuple[LlamaRotaryEmbedding, ExactRotary]:
    config = LlamaConfig(
        hidden_size=HEAD_DIM,
        num_attention_heads=1,
        max_position_embeddings=512,
        rope_parameters={"rope_type": rope_type, "rope_theta": 10_000.0, **more},
    )
    original = LlamaRotaryEmbedding(config)
    return original, ExactRotary(original)


@pytest.mark.parametrize(
    ("rope_type", "more"),
    [
        ("default", {}),
        ("linear", {"factor": 4.0}),
        ("yarn", {"factor": 4.0, "original_max_position_embeddings": 128}),
        (
            "llama3",
            {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        ),
    ],
)
def test_angles_are_those_of_transformers_inside_its_context(rope_type: str, more: dict[str, object]) -> None:
    original, exact = rotary(rope_type, **more)
    positions = torch.arange(512).unsqueeze(0)
    hidden = torch.zeros(1, 512, HEAD_DIM)

    ours, theirs = exact(hidden, positions), original(hidden, positions)

    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_angles_come_in_the_type_of_the_hidden_states(dtype: torch.dtype) -> None:
    _, exact = rotary()

    cosines, sines = exact(torch.zeros(1, 3, HEAD_DIM, dtype=dtype), torch.arange(3).unsqueeze(0))

    assert (cosines.dtype, sines.dtype) == (dtype, dtype)


@pytest.mark.parametrize("position", [1, 2_000, 10_000_000, 2**40])
def test_an_angle_is_exact_at_any_position(position: int) -> None:
    _, exact = rotary()

    cosines, sines = exact.turn(torch.tensor([position]))

    # By long arithmetic, from the frequencies as the model has them.
    getcontext().prec = 50
    turns = [Decimal(frequency) * position % Decimal(TURN) for frequency in exact.frequencies.tolist()]
    # An angle in float64 is off by its own last bit.
    slack = position * 2**-52 + 1e-12
    assert cosines[0].tolist() == pytest.approx([math.cos(turn) for turn in turns] * 2, abs=slack)
    assert sines[0].tolist() == pytest.approx([math.sin(turn) for turn in turns] * 2, abs=slack)


def turned(exact: ExactRotary, vector: Tensor, position: int) -> Tensor:
    cosines, sines = exact(vector, torch.tensor([position]))
    return rotate(vector, cosines[0], sines[0])


@settings(max_examples=50)
@given(st.integers(0, 10_000_000), st.integers(0, 4096))
def test_a_score_depends_on_the_distance_alone_however_far_out(position: int, distance: int) -> None:
    _, exact = rotary()
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, HEAD_DIM, generator=generator)

    near = turned(exact, query, distance) @ turned(exact, key, 0)
    far = turned(exact, query, position + distance) @ turned(exact, key, position)

    assert abs(float(far - near)) < 1e-4


def test_turning_back_undoes_a_turn() -> None:
    _, exact = rotary()
    vector = torch.randn(HEAD_DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    there = rotate(vector, *(part[0] for part in exact.turn(torch.tensor([977]))))
    back = rotate(there, *(part[0] for part in exact.turn(torch.tensor([-977]))))

    torch.testing.assert_close(back, vector, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope", None])
def test_frequencies_that_change_with_the_length_are_refused(rope_type: str | None) -> None:
    original: Any = nn.Module()
    original.rope_type = rope_type

    with pytest.raises(ModelUnavailable, match="rotary embedding of type"):
        ExactRotary(original)
