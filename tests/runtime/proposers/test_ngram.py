"""Prompt lookup against a search through the whole history."""

from __future__ import annotations

import gc
import random
import tracemalloc
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.checks import MAX_APPEND_TOKENS
from runtime.engine.configuration import check_memory
from runtime.errors import NotEnoughMemory
from runtime.proposers.ngram import PromptLookup
from runtime.settings import Settings
from runtime.slab_spec import SlabSpec

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


@settings(max_examples=300)
@given(st.lists(FEW_TOKENS, max_size=4), st.integers(1, 9), st.integers(1, 3), st.integers(0, 3))
def test_proposes_what_followed_the_longest_match_however_the_history_came(
    parts: list[list[int]], count: int, shortest: int, more: int
) -> None:
    lookup = PromptLookup(shortest + more, shortest)
    for part in parts:
        lookup.extend(part)
    history = [token for part in parts for token in part]

    assert list(lookup.propose(count)) == looked_up(history, count, shortest + more, shortest)


@settings(max_examples=200)
@given(FEW_TOKENS, st.integers(6, 12))
def test_remembers_as_much_as_it_may_and_no_more(history: list[int], most: int) -> None:
    lookup = PromptLookup(3, 2, most_tokens=most)
    lookup.extend(history)

    assert list(lookup.propose(4)) == looked_up(history[-most:], 4, 3, 2)


@pytest.mark.parametrize("parts", [1, 3, 2**12])
def test_the_longest_append_takes_no_more_memory_than_is_told(parts: int) -> None:
    chance = random.Random(5)
    appended = array("I", (chance.randrange(150_000) for _ in range(MAX_APPEND_TOKENS)))
    gc.collect()
    tracemalloc.start()
    lookup = PromptLookup()
    before, _ = tracemalloc.get_traced_memory()
    for part in range(parts):
        lookup.extend(appended[part * len(appended) // parts : (part + 1) * len(appended) // parts])
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert after - before <= PromptLookup.ceiling_bytes()
    assert list(lookup.propose(3)) == []


@pytest.mark.parametrize("proposer", ["none", "ngram"])
def test_what_proposers_hold_counts_when_the_memory_is_checked(proposer: str) -> None:
    chosen = Settings(proposer=proposer, capacity=3, max_concurrent=2)
    spec = SlabSpec(2, 2, 32, 4, 60, 8, "float32")
    enough = 1000 + 5 * (spec.ceiling_bytes + (PromptLookup.ceiling_bytes() if proposer == "ngram" else 0))

    check_memory(1000, enough, chosen, spec, None)
    with pytest.raises(NotEnoughMemory):
        check_memory(1000, enough - 1, chosen, spec, None)


def test_proposes_nothing_for_what_never_came() -> None:
    lookup = PromptLookup()
    lookup.extend(range(100))

    assert list(lookup.propose(8)) == []
