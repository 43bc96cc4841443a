"""Builds the documentation as a site: `python -m tools.site` leaves it in `build/site`, with a reference made from the code.

Pages lie on the site where they lie in the repository, so that links between them hold. Links to code become plain text.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from runtime.metrics import Metrics
from runtime.settings import ENVIRONMENT_PREFIX, Settings

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build"
# In the order in which the site has them, with what it calls them.
PAGES = {
    "README.md": "Perennial",
    "docs/guide.md": "Using it",
    "docs/agents.md": "With agents",
    "docs/sharing.md": "More than one server",
    "docs/ray.md": "On Ray Serve",
    "docs/simulation.md": "A thousand servers, simulated",
    "docs/recordings.md": "What recorded agents cost",
    "docs/structure.md": "How it is built",
    "docs/loop.md": "Where a token's time goes",
    "docs/deprecation.md": "What is public",
    "docs/architectures.md": "Architectures",
    "docs/mlx.md": "On Apple silicon",
    "docs/cuda.md": "On an NVIDIA card",
    "docs/endurance.md": "What was tried against it",
    "bench/RESULTS.md": "Results",
    "runtime/seedling/README.md": "seedling",
    "CONTRIBUTING.md": "Contributing",
    "SECURITY.md": "Security",
    "CHANGELOG.md": "Changes",
}
# What others may rely on, by module.
PUBLIC = {
    "actors": ("open_runtime", "Runtime", "SessionHandle", "Events"),
    "api": ("serve", "Addresses"),
    "api.client": ("connect", "Client", "ClientSession", "ClientEvents"),
    "api.client_sync": ("connect_sync", "SyncClient", "SyncSession"),
    "runtime": ("Settings", "Sampling", "HistoryTruncated", "Token", "Done", "StopReason", "Overflow"),
    "runtime.sessions": ("Appended", "SessionInfo", "SessionSummary", "Saved", "Snapshot"),
    "runtime.text": ("Text",),
    "runtime.errors": (),
}
CONFIG = """\
[project]
site_name = "Perennial"
site_description = "A server for long-lived LLM sessions: hour four is as fast and as small as minute zero"
docs_dir = "pages"
site_dir = "site"
nav = {nav}

[project.plugins.mkdocstrings.handlers.python]
paths = [{root}]

[project.plugins.mkdocstrings.handlers.python.options]
show_source = false
show_root_heading = true
heading_level = 3
merge_init_into_class = true
members_order = "source"
"""
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def settings_page() -> str:
    rows = ["# Settings", "", "| setting | default | accepts | meaning |", "| --- | --- | --- | --- |"]
    for field in dataclasses.fields(Settings):
        default = ", ".join(field.default) if isinstance(field.default, tuple) else field.default
        accepts = field.metadata["accepts"].words.replace("|", "\\|")
        shown = f"`{default}`" if default != "" else "empty"
        rows.append(f"| `{field.name}` | {shown} | {accepts} | {field.metadata['help']} |")
    rows += ["", f"Each is a flag of `perennial serve`, `--<name>`, and a variable, `{ENVIRONMENT_PREFIX}<NAME>`."]
    return "\n".join(rows) + "\n"


def metrics_page() -> str:
    rows = ["# Metrics", "", "| metric | kind | what it counts |", "| --- | --- | --- |"]
    for family in Metrics().registry.collect():
        suffix = "_total" if family.type == "counter" else ""
        rows.append(f"| `{family.name}{suffix}` | {family.type} | {family.documentation} |")
    return "\n".join(rows) + "\n\n`GET /metrics` gives them as Prometheus reads them.\n"


def api_page() -> str:
    parts = ["# API"]
    for module, names in PUBLIC.items():
        parts.append(f"## `{module}`")
        parts += [f"::: {module}.{name}" for name in names] or [f"::: {module}"]
    return "\n\n".join(parts) + "\n"


REFERENCE = {"api": ("API", api_page), "settings": ("Settings", settings_page), "metrics": ("Metrics", metrics_page)}


def place(page: Path) -> Path:
    """Where a page of the repository, by its path there, lies on the site."""
    return Path("index.md") if page == Path("README.md") else page


def linked(text: str, page: Path, pages: Iterable[Path]) -> str:
    """The text of `page` with its links to other `pages` and to pictures; those to anything else in the repository are words."""
    known = set(pages)

    def kept(found: re.Match[str]) -> str:
        mark, words, target = found.groups()
        path, _, anchor = target.partition("#")
        if "://" in target or not path:
            return found[0]
        to = (ROOT / page.parent / path).resolve().relative_to(ROOT)
        if mark:
            return found[0]
        if to not in known:
            return words
        up = "../" * (len(place(page).parts) - 1)
        return f"[{words}]({up}{place(to)}{'#' if anchor else ''}{anchor})"

    return _LINK.sub(kept, text)


def pictures(text: str, page: Path) -> Iterator[Path]:
    """The pictures that `page` shows, by their paths in the repository."""
    for mark, _, target in _LINK.findall(text):
        if mark and "://" not in target:
            yield (ROOT / page.parent / target).resolve().relative_to(ROOT)


def gather(folder: Path) -> dict[str, list[str]]:
    """Writes all pages into `folder`; returns the site's chapters with the titles and places of their pages."""
    decisions = sorted(path.relative_to(ROOT) for path in (ROOT / "docs" / "adr").glob("*.md"))
    pages = [*map(Path, PAGES), *decisions]
    for page in pages:
        text = (ROOT / page).read_text(encoding="utf-8")
        write(folder / place(page), linked(text, page, pages))
        for picture in pictures(text, page):
            target = folder / picture
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / picture, target)
    for name, (_, made) in REFERENCE.items():
        write(folder / "reference" / f"{name}.md", made())
    return {
        "": [str(place(Path(page))) for page in PAGES],
        "Reference": [f"reference/{name}.md" for name in REFERENCE],
        "Decisions": [str(page) for page in decisions],
    }


def navigation(chapters: dict[str, list[str]]) -> str:
    """The chapters as the configuration has them: a list of pages, and of lists under a title."""
    titles = {str(place(Path(page))): title for page, title in PAGES.items()}
    titles |= {f"reference/{name}.md": title for name, (title, _) in REFERENCE.items()}

    def entry(page: str) -> str:
        return f"{{ {json.dumps(titles[page])} = {json.dumps(page)} }}" if page in titles else json.dumps(page)

    parts = []
    for title, pages in chapters.items():
        entries = ", ".join(map(entry, pages))
        parts.append(f"{{ {json.dumps(title)} = [{entries}] }}" if title else entries)
    return f"[{', '.join(parts)}]"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def main() -> None:
    """Exits with zensical's status, which is not 0 where a link leads nowhere."""
    shutil.rmtree(BUILD / "pages", ignore_errors=True)
    chapters = gather(BUILD / "pages")
    write(BUILD / "zensical.toml", CONFIG.format(nav=navigation(chapters), root=json.dumps(str(ROOT))))
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "-f", str(BUILD / "zensical.toml")]
    sys.exit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
