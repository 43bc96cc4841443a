"""What a scenario gets and gives: `async def run(setup: Setup) -> Result`."""

from __future__ import annotations

from dataclasses import dataclass, field

from bench.figures import Figure
from runtime.settings import Settings


@dataclass(frozen=True, slots=True)
class Setup:
    """A model by its name in `bench.models`, settings with its directory, and the interpreter that has the peers."""

    model: str
    settings: Settings
    peers: str


@dataclass(slots=True)
class Result:
    """What one run found.

    `window` is that of the sessions; `figures` are the rows of the table; `series` are drawn, each plot by what is plotted
    and each line by whose it is; `remarks` say what was not run, and why; `peers` are the versions of those that took part.
    """

    window: int
    figures: dict[str, Figure] = field(default_factory=dict)
    series: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    peers: dict[str, str] = field(default_factory=dict)
