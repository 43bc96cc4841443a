"""Figures: what was measured, in one form for the table, the plots and the targets.

The standard library alone: peers are measured by interpreters that have nothing of ours.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Figure:
    """The median of some measurements, with the least and the most of them."""

    unit: str
    median: float
    min: float
    max: float


def figure(unit: str, values: Sequence[float]) -> Figure:
    return Figure(unit, statistics.median(values), min(values), max(values))


def over(upper: Figure, lower: Figure) -> Figure:
    """The ratio of two figures: of their medians, between the two that the spreads of both allow."""
    return Figure("x", upper.median / lower.median, upper.min / lower.max, upper.max / lower.min)


def pooled(rounds: Sequence[Figure]) -> Figure:
    """What the same thing came to in several rounds: the median of their medians, the least and the most of all."""
    medians = statistics.median(one.median for one in rounds)
    return Figure(rounds[0].unit, medians, min(one.min for one in rounds), max(one.max for one in rounds))


def repeats(seconds: float, least: int = 3, most: int = 9) -> Iterator[int]:
    """Numbers of repetitions: `least` of them, and more, up to `most`, until so many seconds have passed."""
    began = time.perf_counter()
    for number in range(most):
        if number >= least and time.perf_counter() - began > seconds:
            return
        yield number
