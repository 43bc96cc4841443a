"""Figures, their ratios, and how often a measurement is repeated."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bench.figures import Figure, figure, over, pooled, repeats

SPEEDS = st.lists(st.floats(0.1, 1e6), min_size=1)


def test_a_figure_is_the_median_between_the_least_and_the_most() -> None:
    assert figure("ms", [3.0, 1.0, 10.0]) == Figure("ms", 3.0, 1.0, 10.0)


@given(SPEEDS, SPEEDS)
def test_a_ratio_lies_between_those_of_any_two_measurements(upper: list[float], lower: list[float]) -> None:
    ratio = over(figure("tokens/s", upper), figure("tokens/s", lower))

    every = [above / below for above in upper for below in lower]
    assert ratio.unit == "x"
    assert ratio.min == min(every) <= ratio.median <= max(every) == ratio.max


@given(st.lists(SPEEDS, min_size=1, max_size=4))
def test_rounds_come_to_what_lies_between_the_least_and_the_most_of_all(rounds: list[list[float]]) -> None:
    together = pooled([figure("tokens/s", one) for one in rounds])

    every = [speed for one in rounds for speed in one]
    assert together.unit == "tokens/s"
    assert (together.min, together.max) == (min(every), max(every))
    assert together.min <= together.median <= together.max


def test_one_round_out_of_line_does_not_move_the_median_of_three() -> None:
    assert pooled([figure("ms", [one]) for one in (3.0, 1.0, 10.0)]) == Figure("ms", 3.0, 1.0, 10.0)


def test_a_measurement_is_repeated_so_often_at_least_whatever_it_takes() -> None:
    assert list(repeats(0.0, least=4)) == [0, 1, 2, 3]


def test_one_with_time_left_is_repeated_up_to_the_most() -> None:
    assert list(repeats(3600.0, least=1, most=5)) == [0, 1, 2, 3, 4]
