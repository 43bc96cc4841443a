"""The pages of the documentation, and those that are made of the code."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from runtime.settings import Settings
from tools import site

DECISIONS = [str(path.relative_to(site.ROOT)) for path in sorted((site.ROOT / "docs" / "adr").glob("*.md"))]


def test_the_site_has_every_page_of_the_documentation() -> None:
    assert {f"docs/{path.name}" for path in (site.ROOT / "docs").glob("*.md")} <= set(site.PAGES)


@pytest.mark.parametrize("page", [*site.PAGES, *DECISIONS, "client/README.md"])
def test_every_link_of_a_page_leads_to_something(page: str) -> None:
    text = (site.ROOT / page).read_text()

    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    assert [target for target in targets if not (site.ROOT / page).parent.joinpath(target).exists()] == []


def test_the_settings_page_has_each_setting_with_its_default() -> None:
    rows = site.settings_page().splitlines()

    for field in dataclasses.fields(Settings):
        (row,) = [row for row in rows if row.startswith(f"| `{field.name}` |")]
        assert len(re.split(r"(?<!\\)\|", row)) == 6
    assert any(row.startswith("| `window` | `4092` |") for row in rows)


def test_the_metrics_page_has_counters_by_the_names_of_their_samples() -> None:
    assert "| `perennial_generated_tokens_total` | counter | Tokens generated |" in site.metrics_page()


def test_what_the_api_page_promises_is_there() -> None:
    for module, names in site.PUBLIC.items():
        found = __import__(module, fromlist=["*"])
        assert [name for name in names if not hasattr(found, name)] == []


def test_links_to_pages_stay_and_those_to_code_are_words(tmp_path: Path) -> None:
    site.gather(tmp_path)

    guide, front = (tmp_path / "docs" / "guide.md").read_text(), (tmp_path / "index.md").read_text()
    assert "[bench/RESULTS.md](../bench/RESULTS.md)" in guide
    assert "](docs/guide.md)" in front
    assert "](api/client.py)" not in front
    assert (tmp_path / "docs" / "page.png").is_file()
