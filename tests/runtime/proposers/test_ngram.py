"""Prompt lookup against a search through the whole history."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.proposers.ngram import NgramProposer

FEW_TOKENS = st.lists(st.integers(0, 3), max_size=60)


def looked_up(history: list[int], count: int, longest: int, shortest: int) -> list[int]:
    """What followed the longest ending of the history that came before, where it came last."""
    for length in range(longest, shortest - 1, -1):
        for at in range(len(history) - 1, length - 1, -1):
            if len(history) >= length and history[at - length : at] == history[len(history) - length :]:
                going_on = list(history)
                for index in range(count):
                    going_on.append(going_on[at + index])
                return going_on[len(history) :]
    return []


@settings(max_examples=300, deadline=None)
@given(st.lists(FEW_TOKENS, max_size=4), st.integers(1, 9), st.integers(1, 3), st.integers(0, 3))
def test_proposes_what_followed_the_longest_match_however_the_history_came(
    parts: list[list[int]], count: int, shortest: int, more: int
) -> None:
    proposer = NgramProposer(shortest + more, shortest)
    for part in parts:
        proposer.extend(part)
    history = [token for part in parts for token in part]

    assert list(proposer.propose(count)) == looked_up(history, count, shortest + more, shortest)


@settings(max_examples=200, deadline=None)
@given(FEW_TOKENS, st.integers(6, 12))
def test_remembers_as_much_as_it_may_and_no_more(history: list[int], most: int) -> None:
    proposer = NgramProposer(3, 2, most_tokens=most)
    proposer.extend(history)

    assert list(proposer.propose(4)) == looked_up(history[-most:], 4, 3, 2)


def test_its_size_is_bounded_however_long_the_history() -> None:
    proposer = NgramProposer(4, 2, most_tokens=100)
    for number in range(5000):
        proposer.extend([number % 97, number * number % 89])

    assert proposer.size <= 100 + 3 * 100


def test_proposes_nothing_for_what_never_came() -> None:
    proposer = NgramProposer()
    proposer.extend(range(100))

    assert list(proposer.propose(8)) == []
