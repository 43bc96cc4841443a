"""`docs/endurance.md`: what the soak tests tried and what held. A test writes its row as it ends; the others' rows stay."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from pathlib import Path

import pytest

from bench.machine import describe_machine

PAGE = Path(__file__).parents[2] / "docs" / "endurance.md"
_HEAD = """# What was tried against the server, and what held

`just soak` runs these tests, tens of minutes in all, and writes this page: a test that passes writes its row, with what it
counted, the day and the machine.

| what was tried | what held | when, and where |
| --- | --- | --- |
"""


@pytest.fixture
def record() -> Callable[[str, str], None]:
    """Writes a row: what was `tried`, and what `held`, with counts. For the last line of a test."""

    def write(tried: str, held: str) -> None:
        page = PAGE.read_text() if PAGE.exists() else ""
        rows = dict(_split(line) for line in page.splitlines() if line.startswith("| ") and line not in _HEAD)
        rows[tried] = f"{held} | {date.today()}, {describe_machine()}"
        PAGE.write_text(_HEAD + "".join(f"| {tried} | {rest} |\n" for tried, rest in sorted(rows.items())))

    return write


def _split(row: str) -> tuple[str, str]:
    tried, _, rest = row.removeprefix("| ").removesuffix(" |").partition(" | ")
    return tried, rest
