"""The report of given figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import plots, report, results
from bench.figures import Figure
from bench.results import Record
from bench.scenario import Result
from bench.targets import TARGETS, Target, at_least, at_most

FAST = Figure("x", 1.5, 1.25, 2.0)
RESULT = Result(
    252,
    {"speed-up": FAST, "tokens": Figure("tokens", 100_000, 100_000, 100_000), "share": Figure("%", 0.01234, 0, 0.5)},
    {"seconds a turn": {"perennial": [0.1, 0.2], "other": [0.1, 4.0]}},
    ["other: not installed"],
    {"mlx-lm": "0.32"},
)


def record(result: Result = RESULT, machine: str = "a machine", model: str = "m") -> Record:
    return Record("turns", model, "avx2", "2026-11-25T10:00:00+00:00", machine, {"torch": "2.13.0"}, result)


def row(page: str, name: str) -> list[str]:
    """The cells of the table's row for this figure."""
    (line,) = [line for line in page.splitlines() if f"| {name} |" in line]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_row_has_the_figure_with_its_spread() -> None:
    page = report.render([record()], {}, "results")

    assert row(page, "speed-up") == ["turns-m-avx2", "speed-up", "x", "1.50", "1.25", "2.00", "", ""]
    assert row(page, "tokens")[3] == "100,000"
    assert row(page, "share")[3:6] == ["0.0123", "0.0000", "0.5000"]


@pytest.mark.parametrize(
    ("target", "words", "met"),
    [
        (at_least(1.5), "at least 1.5", "yes"),
        (at_least(1.6), "at least 1.6", "**no**"),
        (at_most(1.5), "at most 1.5", "yes"),
        (at_most(1.4), "at most 1.4", "**no**"),
    ],
)
def test_a_target_is_met_by_the_median(target: Target, words: str, met: str) -> None:
    page = report.render([record()], {("turns", "m"): {"speed-up": target}}, "results")

    assert row(page, "speed-up")[-2:] == [words, met]
    assert ("1.50 x, " + words in page) == (met != "yes")


def test_what_a_missed_target_needs_stands_with_it() -> None:
    page = report.render([record()], {("turns", "m"): {"speed-up": at_least(2, "Another kernel.")}}, "results")

    assert "- turns-m-avx2, speed-up: 1.50 x, at least 2 wanted. Another kernel." in page


def test_a_target_without_a_figure_is_said_to_be_not_measured() -> None:
    page = report.render([], {("turns", "m"): {"speed-up": at_least(2)}}, "results")

    assert "- turns-m, speed-up: not measured." in page


def test_results_of_two_machines_stand_under_their_own() -> None:
    page = report.render([record(machine="one"), record(machine="two", model="n")], {}, "results")

    assert "- one; torch 2.13.0; 2026-11-25:\n  turns-m-avx2 (window 252)." in page
    assert "- two; torch 2.13.0; 2026-11-25:\n  turns-n-avx2 (window 252)." in page


def test_remarks_and_plots_are_named() -> None:
    page = report.render([record()], {}, "results")

    assert "- turns-m-avx2: peers are mlx-lm 0.32.\n- turns-m-avx2: other: not installed." in page
    assert "(results/turns-m-avx2-seconds-a-turn.png)" in page


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    results.write(record(), tmp_path)

    assert results.read_all(tmp_path) == [record()]


def test_each_kind_of_series_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")

    plots.draw(record(), tmp_path)

    (drawn,) = tmp_path.iterdir()
    assert drawn.name == plots.file_of(record(), "seconds a turn")
    assert drawn.read_bytes().startswith(b"\x89PNG")


def test_the_page_is_the_one_that_the_results_make() -> None:
    assert report.PATH.read_text() == report.render(results.read_all(), TARGETS, results.DIRECTORY.name)
