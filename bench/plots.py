"""Plots of results: what was measured turn by turn."""

from __future__ import annotations

from collections.abc import Mapping
from math import isnan
from pathlib import Path

from bench.results import Record

# What differs between peers by orders of magnitude is told apart on a logarithmic scale.
_LOGARITHMIC = 10.0


def file_of(record: Record, kind: str) -> str:
    """The name of the plot of one kind of series of a record."""
    return f"{record.name}-{kind.replace(' ', '-')}.png"


def draw(record: Record, directory: Path) -> None:
    """One PNG for each kind of series."""
    for kind, lines in record.result.series.items():
        _draw(record.name, kind, lines, directory / file_of(record, kind))


def _draw(title: str, kind: str, lines: Mapping[str, list[float]], path: Path) -> None:
    # Only who draws needs it.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for label, values in lines.items():
        # A line with gaps is a point here and there.
        marker = "o" if any(map(isnan, values)) else None
        axes.plot(range(1, len(values) + 1), values, label=label, linewidth=1, marker=marker)
    highest = [max(value for value in values if not isnan(value)) for values in lines.values()]
    if max(highest) > _LOGARITHMIC * min(highest):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set(title=title, xlabel="turn", ylabel=kind)
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100)
