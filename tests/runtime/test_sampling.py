"""Drawing tokens: a function of logits, seed and position, with the shares that the logits ask for."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from runtime.errors import InvalidRequest
from runtime.events import Sampling
from runtime.sampling import Draw, candidates, draw_id, draw_token, gumbel_noise
from tests.reference.sampling import kept_tokens

LOGITS = st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40).map(torch.tensor)
FEW_LEVELS = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=1, max_size=40).map(torch.tensor)
POSITIONS = st.integers(0, 2**63)
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.floats(0, 100),
    top_p=st.floats(0, 1, exclude_min=True),
    top_k=st.integers(0, 50),
    seed=st.integers(0, 2**64 - 1),
)


@settings(max_examples=200)
@given(LOGITS, SAMPLINGS, POSITIONS)
def test_the_same_logits_seed_and_position_give_the_same_token(
    logits: Tensor, sampling: Sampling, position: int
) -> None:
    again = Sampling(sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed)

    assert draw_id(logits, sampling, position) == draw_id(logits.clone(), again, position)


@settings(max_examples=200)
@given(LOGITS, SAMPLINGS, POSITIONS)
def test_a_drawn_token_is_one_that_was_kept(logits: Tensor, sampling: Sampling, position: int) -> None:
    token = draw_id(logits, sampling, position)

    temperature = sampling.temperature or 1.0
    # In the order of the logits alone where the temperature is so low that quotients overflow.
    scaled = ((logits.double() - logits.double().max()) / temperature).clamp(min=-1e4)
    top_k = sampling.top_k if sampling.temperature else 1
    _, may = kept_tokens(scaled.tolist(), top_k, sampling.top_p)
    assert token in may or float(logits[token]) == float(logits.max())


@settings(max_examples=100)
@given(LOGITS, st.integers(0, 2**64 - 1), POSITIONS)
def test_temperature_zero_takes_the_likeliest_token_whatever_the_seed(logits: Tensor, seed: int, position: int) -> None:
    assert draw_id(logits, Sampling(seed=seed), position) == logits.tolist().index(max(logits.tolist()))


@pytest.mark.parametrize("temperature", [1e-3, 1e-45, 1e-310, 5e-324])
@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_a_temperature_near_zero_takes_the_likeliest_token(temperature: float, top_p: float) -> None:
    logits = torch.tensor([1.0, 30.0, -5.0, 29.0])

    drawn = {draw_id(logits, Sampling(temperature, top_p, seed=seed), 7) for seed in range(20)}

    assert drawn == {1}


@settings(max_examples=300)
@given(st.one_of(LOGITS, FEW_LEVELS), st.integers(0, 50), st.floats(0, 1, exclude_min=True))
def test_top_k_and_top_p_keep_what_their_definitions_say(logits: Tensor, top_k: int, top_p: float) -> None:
    left = candidates(logits.double(), Sampling(temperature=1.0, top_p=top_p, top_k=top_k))

    must, may = kept_tokens(logits.tolist(), top_k, top_p)
    assert must <= set(left.nonzero().flatten().tolist()) <= may


def test_of_equal_tokens_top_k_keeps_the_first() -> None:
    left = candidates(torch.zeros(5).double(), Sampling(temperature=1.0, top_k=2))

    assert left.tolist() == [True, True, False, False, False]


def test_noise_differs_between_seeds_and_between_positions() -> None:
    noises = [gumbel_noise(seed, position, 64) for seed in (0, 1, 2**64 - 1) for position in (0, 1, 2**40)]

    assert len({noise.tobytes() for noise in noises}) == len(noises)


def test_noise_of_a_short_vocabulary_is_the_start_of_that_of_a_long_one() -> None:
    assert np.array_equal(gumbel_noise(3, 9, 50_000)[:100], gumbel_noise(3, 9, 100))


@pytest.mark.parametrize(("seeds", "positions"), [(range(1), range(200)), (range(200), range(1))])
def test_noise_has_the_moments_of_a_gumbel_distribution(seeds: range, positions: range) -> None:
    noise = np.concatenate([gumbel_noise(seed, position, 500) for seed in seeds for position in positions])

    # 100,000 values: the mean's standard error is 0.004, the variance's 0.011.
    assert noise.mean() == pytest.approx(0.5772, abs=0.02)
    assert noise.var() == pytest.approx(math.pi**2 / 6, abs=0.055)


def test_noise_at_neighbouring_positions_is_not_correlated() -> None:
    noise = np.stack([gumbel_noise(0, position, 20_000) for position in range(4)])

    assert np.abs(np.corrcoef(noise) - np.eye(4)).max() < 0.04


@pytest.mark.parametrize(
    ("sampling", "shares"),
    [
        (Sampling(temperature=1.0, seed=1), [0.2, 0.5, 0.3]),
        (Sampling(temperature=0.5, seed=2), [0.04 / 0.38, 0.25 / 0.38, 0.09 / 0.38]),
        (Sampling(temperature=1.0, top_k=2, seed=3), [0.0, 0.625, 0.375]),
        (Sampling(temperature=1.0, top_p=0.6, seed=4), [0.0, 0.625, 0.375]),
    ],
)
def test_twenty_thousand_tokens_have_the_shares_that_the_logits_ask_for(
    sampling: Sampling, shares: list[float]
) -> None:
    logits = torch.tensor([0.2, 0.5, 0.3]).log()
    draws = 20_000

    counts = np.bincount([draw_id(logits, sampling, position) for position in range(draws)], minlength=3)

    assert all(count == 0 for count, share in zip(counts, shares, strict=True) if not share)
    possible = [(count, draws * share) for count, share in zip(counts, shares, strict=True) if share]
    chi_squared = sum((count - expected) ** 2 / expected for count, expected in possible)
    # The 99.9th percentile for one and for two degrees of freedom.
    assert chi_squared < {2: 10.83, 3: 13.82}[len(possible)]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 100.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("top_k", -1),
        ("seed", -1),
        ("seed", 2**64),
    ],
)
def test_sampling_out_of_range_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=field) as caught:
        Sampling(**{field: value})

    assert caught.value.param == field


@settings(max_examples=200)
@given(LOGITS, SAMPLINGS, POSITIONS, st.integers(1, 2**40 - 1))
def test_only_allowed_tokens_are_drawn_and_as_if_there_were_no_others(
    logits: Tensor, sampling: Sampling, position: int, bits: int
) -> None:
    allowed = np.frombuffer(bits.to_bytes(8, "little"), np.int32)
    may = [index for index in range(len(logits)) if bits >> index & 1]
    assume(may)
    others_gone = torch.full_like(logits, -torch.inf)
    others_gone[may] = logits[may]

    token = draw_token(logits, Draw(sampling, allowed), position)

    assert token.token_id in may
    assert token == draw_token(others_gone, Draw(sampling), position)


@settings(max_examples=100)
@given(LOGITS, SAMPLINGS, POSITIONS, st.integers(0, 5))
def test_logprobs_are_the_models_own_whatever_the_sampling(
    logits: Tensor, sampling: Sampling, position: int, count: int
) -> None:
    assume(count <= len(logits))
    token = draw_token(logits, Draw(sampling, top_logprobs=count), position)

    assert token.token_id == draw_id(logits, sampling, position)
    assert token.logprobs is not None
    weights = [math.exp(float(logit) - float(logits.max())) for logit in logits]
    expected = [math.log(weight / sum(weights)) for weight in weights]
    assert token.logprobs.chosen == pytest.approx(expected[token.token_id], abs=1e-4)
    values = [logprob for _, logprob in token.logprobs.top]
    assert values == sorted(values, reverse=True)
    assert values == pytest.approx(sorted(expected, reverse=True)[:count], abs=1e-4)
    assert all(logprob == pytest.approx(expected[index], abs=1e-4) for index, logprob in token.logprobs.top)
