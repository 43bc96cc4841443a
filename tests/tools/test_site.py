"""The pages of the documentation, and those that are made of the code."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.settings import Settings
from tools import site

CODE = ("api", "actors", "runtime", "proto")
PROTOCOL = site.ROOT / "proto" / "kakeya" / "v1" / "runtime.proto"
NO_NAMES = {*CODE, "perennial", "runtime.proto", "__init__.py"}
DECISIONS = [str(path.relative_to(site.ROOT)) for path in sorted((site.ROOT / "docs" / "adr").glob("*.md"))]


def test_the_site_has_every_page_of_the_documentation() -> None:
    assert {f"docs/{path.name}" for path in (site.ROOT / "docs").glob("*.md")} <= set(site.PAGES)


@pytest.mark.parametrize("page", [*site.PAGES, *DECISIONS, "client/README.md"])
def test_every_link_of_a_page_leads_to_something(page: str) -> None:
    text = (site.ROOT / page).read_text()

    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    assert [target for target in targets if not (site.ROOT / page).parent.joinpath(target).exists()] == []


def test_every_name_in_how_it_is_built_is_in_the_code_and_in_the_file_beside_it() -> None:
    page = site.ROOT / "docs" / "structure.md"
    names = {file: {*names_in(file)} for folder in CODE for file in (site.ROOT / folder).rglob("*.py")}
    known = {*re.findall(r"rpc (\w+)", PROTOCOL.read_text())}.union(*names.values())
    sentences = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)

    # `previous_response_id`, `Session.run`, `Server.call()`
    named = re.findall(r"`(\w+(?:\.\w+)?)(?:\(\))?`", sentences)
    assert [name for name in named if name not in known | NO_NAMES] == []
    beside = re.findall(r"`(\w+(?:\.\w+)?)` in\s+\[[^]]+\]\(([^)]+\.py)\)", sentences)
    assert len(beside) > 20
    assert [(name, file) for name, file in beside if name not in names[(page.parent / file).resolve()]] == []


def names_in(file: Path) -> Iterator[str]:
    """Classes and their members, functions, and what else is given a value or is a parameter, in a file of Python."""
    for node in ast.walk(ast.parse(file.read_text())):
        match node:
            case ast.ClassDef(name, body=body):
                yield name
                yield from (f"{name}.{member}" for one in body for member in names_given(one))
            case _:
                yield from names_given(node)


def names_given(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.FunctionDef(name) | ast.AsyncFunctionDef(name):
            yield name
        case ast.AnnAssign(target=ast.Name(name)) | ast.Assign(targets=[ast.Name(name)]) | ast.arg(name):
            yield name


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
