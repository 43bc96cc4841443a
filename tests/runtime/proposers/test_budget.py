"""The length of proposals follows what they bring and what they cost."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.proposers.budget import Budget, Experience

ROW_S, FORWARD_S = 0.001, 0.02


def seconds(length: int, row_s: float = ROW_S) -> float:
    """What a forward takes with so many proposed rows."""
    return FORWARD_S + length * row_s


def run(
    acceptance: float, tokens: int, *, budget: Budget | None = None, row_s: float = ROW_S, seed: int = 7
) -> tuple[float, int, list[int]]:
    """Seconds spent, tokens made and the lengths chosen, where each proposed token holds with this chance."""
    chance = random.Random(seed)
    budget = budget or Budget(8, Experience())
    spent, made, chosen = 0.0, 0, []
    while made < tokens:
        count = budget.choose()
        accepted = 0
        while accepted < count and chance.random() < acceptance:
            accepted += 1
        budget.learn(count, accepted, seconds(count, row_s))
        chosen.append(count)
        spent += seconds(count, row_s)
        made += accepted + 1
    return spent, made, chosen


def test_what_always_holds_is_proposed_at_full_length() -> None:
    *_, chosen = run(1.0, 2000)

    assert chosen[-50:].count(8) >= 49


def test_what_never_holds_is_left_but_for_a_try_now_and_then() -> None:
    *_, chosen = run(0.0, 2000)

    assert sum(count > 0 for count in chosen[100:]) <= len(chosen) / 50
    assert set(chosen[100:]) <= {0, 1}


@pytest.mark.parametrize("acceptance", [0.0, 0.1, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("row_s", [0.0, 0.001, 0.01, 0.02])
def test_no_stream_is_more_than_three_per_cent_slower_than_without(acceptance: float, row_s: float) -> None:
    spent, made, _ = run(acceptance, 5000, row_s=row_s)

    assert spent <= 1.03 * FORWARD_S * made


@pytest.mark.parametrize("row_s", [0.001, 0.01, 0.02])
def test_short_streams_learn_from_those_before_them(row_s: float) -> None:
    """Proposals that never hold cost all of them together little, however often one begins."""
    experience = Experience()
    spent = made = 0.0
    for _ in range(200):
        budget = Budget(8, experience)
        for _ in range(20):
            count = budget.choose()
            budget.learn(count, 0, seconds(count, row_s))
            spent += seconds(count, row_s)
            made += 1

    assert spent / made <= 1.03 * FORWARD_S


@given(
    believed=st.floats(0, 1),
    acceptance=st.floats(0, 1),
    row_s=st.floats(0, 2 * FORWARD_S),
    most=st.integers(1, 31),
    tokens=st.integers(1, 300),
    seed=st.integers(0, 2**32),
)
def test_no_stream_however_short_loses_more_than_its_share_and_a_forward(
    believed: float, acceptance: float, row_s: float, most: int, tokens: int, seed: int
) -> None:
    """Whatever those before it came to believe of proposals."""
    experience = Experience(believed, {0: FORWARD_S, 1: seconds(1, row_s)})
    budget = Budget(most, experience)

    spent, made, _ = run(acceptance, tokens, budget=budget, row_s=row_s, seed=seed)

    assert spent <= FORWARD_S * (1.03 * made + 1)


def test_it_comes_back_when_proposals_hold_again() -> None:
    budget = Budget(8, Experience())
    for _ in range(200):
        count = budget.choose()
        budget.learn(count, 0, seconds(count))
    chosen = []
    for _ in range(2000):
        count = budget.choose()
        budget.learn(count, count, seconds(count))
        chosen.append(count)

    assert chosen[-50:].count(8) >= 49
