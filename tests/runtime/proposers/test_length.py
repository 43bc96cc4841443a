"""The length of proposals follows what they bring and what they cost."""

from __future__ import annotations

import random

import pytest

from runtime.proposers.length import Experience, ProposalLength

ROW_S, FORWARD_S = 0.001, 0.02


def seconds(length: int, row_s: float = ROW_S) -> float:
    """What a forward takes with so many proposed rows."""
    return FORWARD_S + length * row_s


def run(acceptance: float, tokens: int, *, most: int = 8, row_s: float = ROW_S) -> tuple[float, list[int]]:
    """Seconds a token, and the lengths chosen, where each proposed token holds with this chance."""
    chance = random.Random(7)
    length = ProposalLength(most)
    spent, made, chosen = 0.0, 0, []
    while made < tokens:
        count = length.choose()
        accepted = 0
        while accepted < count and chance.random() < acceptance:
            accepted += 1
        length.learn(count, accepted, seconds(count, row_s))
        chosen.append(count)
        spent += seconds(count, row_s)
        made += accepted + 1
    return spent / made, chosen


def test_what_always_holds_is_proposed_at_full_length() -> None:
    _, chosen = run(1.0, 2000)

    assert chosen[-50:].count(8) >= 49


def test_what_never_holds_is_left_but_for_a_try_now_and_then() -> None:
    _, chosen = run(0.0, 2000)

    assert sum(count > 0 for count in chosen[100:]) <= len(chosen) / 50
    assert set(chosen[100:]) <= {0, 1}


@pytest.mark.parametrize("acceptance", [0.0, 0.1, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("row_s", [0.0, 0.001, 0.01, 0.02])
def test_no_stream_is_more_than_three_per_cent_slower_than_without(acceptance: float, row_s: float) -> None:
    a_token, _ = run(acceptance, 5000, row_s=row_s)

    assert a_token <= 1.03 * FORWARD_S


@pytest.mark.parametrize("row_s", [0.001, 0.01, 0.02])
def test_short_streams_learn_from_those_before_them(row_s: float) -> None:
    """Proposals that never hold cost all of them together little, however often one begins."""
    experience = Experience()
    spent = made = 0.0
    for _ in range(200):
        length = ProposalLength(8, experience)
        for _ in range(20):
            count = length.choose()
            length.learn(count, 0, seconds(count, row_s))
            spent += seconds(count, row_s)
            made += 1

    assert spent / made <= 1.03 * FORWARD_S


def test_it_comes_back_when_proposals_hold_again() -> None:
    length = ProposalLength(8)
    for _ in range(200):
        count = length.choose()
        length.learn(count, 0, seconds(count))
    chosen = []
    for _ in range(2000):
        count = length.choose()
        length.learn(count, count, seconds(count))
        chosen.append(count)

    assert chosen[-50:].count(8) >= 49
