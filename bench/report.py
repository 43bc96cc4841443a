"""`RESULTS.md`, made of the results: one table of all figures beside their targets, what is missed, and the plots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path

from bench import plots, results
from bench.figures import Figure
from bench.results import Record
from bench.targets import TARGETS, Target

PATH = Path(__file__).parent / "RESULTS.md"
_HEAD = """\
# Results

Made by `perennial bench report` of `results/*.json`, which `perennial bench all` measures. Not written by hand.
Every ratio is of figures of one run on one machine. Medians of repeated measurements, with the least and the most; for turns,
of the turns. Everybody has as many threads as there are physical cores, which wait without spinning (`OMP_WAIT_POLICY`). Models
have random weights, but for seedling and SmolLM2.
"""
Targets = Mapping[tuple[str, str], Mapping[str, Target]]


def write(path: Path = PATH, directory: Path = results.DIRECTORY) -> None:
    """Draws every plot and writes the page, of whatever results there are."""
    records = results.read_all(directory)
    for record in records:
        plots.draw(record, directory)
    path.write_text(render(records, TARGETS, directory.name))


def render(records: Sequence[Record], targets: Targets, plots_at: str) -> str:
    """The page in Markdown; plots lie in the folder `plots_at` beside it."""
    return "\n".join(
        [*_head(records), *_table(records, targets), *_missed(records, targets), *_rest(records, plots_at)]
    )


def number(value: float) -> str:
    """Three digits that count, and never an exponent."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    digits = 2 if abs(value) >= 1 else 4
    return f"{value:.{digits}f}"


def _head(records: Sequence[Record]) -> Iterator[str]:
    yield from _HEAD.splitlines()
    yield ""

    def terms(record: Record) -> tuple[str, str]:
        versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
        return record.machine, versions

    for (machine, versions), group in groupby(sorted(records, key=terms), terms):
        of = list(group)
        dates = sorted({record.date[:10] for record in of})
        yield f"- {machine}; {versions}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}:"
        yield f"  {', '.join(f'{record.name} (window {record.result.window:,})' for record in of)}."
    yield ""


def _table(records: Sequence[Record], targets: Targets) -> Iterator[str]:
    yield "| scenario | figure | unit | median | min | max | target | met |"
    yield "| --- | --- | --- | ---: | ---: | ---: | --- | --- |"
    for record in records:
        for name, one in record.result.figures.items():
            target = targets.get((record.scenario, record.model), {}).get(name)
            yield _row(record.name, name, one, target)
    yield ""


def _row(scenario: str, name: str, one: Figure, target: Target | None) -> str:
    cells = [scenario, name, one.unit, number(one.median), number(one.min), number(one.max)]
    aim = [target.words, "yes" if target.is_met_by(one) else "**no**"] if target else ["", ""]
    return f"| {' | '.join([*cells, *aim])} |"


def _missed(records: Sequence[Record], targets: Targets) -> Iterator[str]:
    yield "## Targets missed or not measured"
    yield ""
    for (scenario, model), aims in targets.items():
        of = [record for record in records if (record.scenario, record.model) == (scenario, model)]
        for name, target in aims.items():
            found = {record.name: record.result.figures[name] for record in of if name in record.result.figures}
            if not found:
                yield f"- {scenario}-{model}, {name}: not measured."
            for where, one in found.items():
                if not target.is_met_by(one):
                    needs = f" {target.needs}" if target.needs else ""
                    yield f"- {where}, {name}: {number(one.median)} {one.unit}, {target.words} wanted.{needs}"
    yield ""


def _rest(records: Sequence[Record], plots_at: str) -> Iterator[str]:
    remarks = [f"- {record.name}: {remark}." for record in records for remark in _remarks(record)]
    if remarks:
        yield from ("## Remarks", "", *remarks, "")
    for record in records:
        for kind in record.result.series:
            yield f"![{record.name}: {kind}]({plots_at}/{plots.file_of(record, kind)})"
            yield ""


def _remarks(record: Record) -> list[str]:
    peers = ", ".join(f"{name} {version}" for name, version in record.result.peers.items())
    return [*([f"peers are {peers}"] if peers else []), *record.result.remarks]
