"""Results as files: one JSON a scenario, model and kind of machine, beside the plots."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.figures import Figure
from bench.scenario import Result

_INNERMOST = re.compile(r"[\[{][^\[\]{}]*[\]}]")
DIRECTORY = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Record:
    """A result, and what it is of. Of each `kind` of machine, named by its instructions, the latest is kept."""

    scenario: str
    model: str
    kind: str
    date: str
    machine: str
    versions: dict[str, str]
    result: Result

    @property
    def name(self) -> str:
        return f"{self.scenario}-{self.model}-{self.kind}"


def write(record: Record, directory: Path = DIRECTORY) -> None:
    """Lists and figures take a line each; of a series four digits are kept, for a plot shows no more."""
    directory.mkdir(exist_ok=True)
    said = dataclasses.asdict(record)
    for lines in said["result"]["series"].values():
        for label, values in lines.items():
            lines[label] = [float(f"{value:.4g}") for value in values]
    text = _INNERMOST.sub(lambda found: " ".join(found[0].split()), json.dumps(said, indent=1))
    (directory / f"{record.name}.json").write_text(f"{text}\n")


def read_all(directory: Path = DIRECTORY) -> list[Record]:
    """Every record there, by name."""
    return [_record(json.loads(file.read_text())) for file in sorted(directory.glob("*.json"))]


def _record(said: dict[str, Any]) -> Record:
    result = said.pop("result")
    figures = {name: Figure(**one) for name, one in result.pop("figures").items()}
    return Record(**said, result=Result(figures=figures, **result))
