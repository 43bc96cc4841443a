"""Finds out whether the files that run are those that were installed. Our packages have common names, so others may run."""

from __future__ import annotations

import csv
import json
import os
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from hashlib import sha256
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

PACKAGES = ("actors", "api", "proto.kakeya", "runtime")
DISTRIBUTION = "perennial"
# The folder of the packages that run.
HOME = Path(__file__).resolve().parents[1]


def describe_installation() -> str:
    """The installed version and where it was installed from."""
    installed = _installed_distribution()
    if installed is None:
        return f"not installed: run from {HOME}"
    source = _source(installed)
    return (
        f"{DISTRIBUTION} {installed.version} in {source or installed.locate_file('')}{' (editable)' if source else ''}"
    )


def intruders() -> list[str]:
    """Packages and files that have taken the place of ours, a line each. With any of them, we do not know what runs."""
    return [*_packages_from_elsewhere(), *_files_not_as_installed()]


def rivals() -> list[str]:
    """What runs, or would run, instead of the installed files, a line each; it may be intended."""
    found = []
    if installed := _installed_distribution():
        home = _source(installed) or Path(str(installed.locate_file(""))).resolve()
        if home != HOME:
            found.append(
                f"what runs is in {HOME}, not what is installed in {home}: PYTHONPATH or the folder comes first"
            )
    here = Path.cwd().resolve()
    if here != HOME:
        found += [
            f"{path} takes the place of ours in what is started in this folder as `hypercorn api.http:app` or "
            "`python -m`: start it elsewhere"
            for path in _importable(here)
        ]
    return found


def _importable(folder: Path) -> Iterator[Path]:
    for name in PACKAGES:
        base = folder / name.replace(".", "/")
        yield from (path for path in (base / "__init__.py", base.with_suffix(".py")) if path.is_file())


def _packages_from_elsewhere() -> Iterator[str]:
    for name in PACKAGES:
        try:
            spec = find_spec(name)
        except ImportError:
            spec = None
        origin = spec.origin if spec else None
        if origin is None or Path(origin).resolve().parent != HOME / name.replace(".", "/"):
            yield f"{name} comes from {origin or 'nowhere'}, not from {HOME}: another distribution or folder shadows ours"


def _files_not_as_installed() -> Iterator[str]:
    """Files that are missing or have other contents than the distribution's RECORD says."""
    installed = _installed_distribution()
    if installed is None or _source(installed):
        return
    tops = {name.partition(".")[0] for name in PACKAGES}
    for name, recorded in _records(installed):
        file = Path(str(installed.locate_file(name)))
        if name.split("/")[0] in tops and recorded and _digest(file) != recorded:
            by = ", ".join(_others_with(file)) or "something"
            yield f"{file} was changed by {by}: pip install --force-reinstall --no-deps {DISTRIBUTION}"


def _records(installed: Distribution) -> Iterator[tuple[str, str]]:
    """Each file's path and digest in RECORD; from Python 3.12 on `Distribution.files` leaves out files that are missing."""
    for name, digest, *_ in csv.reader((installed.read_text("RECORD") or "").splitlines()):
        yield name, digest.partition("=")[2]


def _digest(file: Path) -> str | None:
    """A file's digest in RECORD's form; None if the file is missing."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return None
    return urlsafe_b64encode(sha256(content).digest()).rstrip(b"=").decode()


def _others_with(file: Path) -> Iterator[str]:
    """Other distributions that installed a file at the same path."""
    place = os.path.realpath(file)
    for other in distributions():
        if other.name != DISTRIBUTION and any(
            each.name == file.name and os.path.realpath(str(each.locate())) == place for each in other.files or ()
        ):
            yield other.name


def _installed_distribution() -> Distribution | None:
    try:
        return distribution(DISTRIBUTION)
    except PackageNotFoundError:
        return None


def _source(installed: Distribution) -> Path | None:
    """The folder of an editable installation."""
    origin = json.loads(installed.read_text("direct_url.json") or "{}")
    if not origin.get("dir_info", {}).get("editable"):
        return None
    url: str = origin["url"]
    return Path(unquote(url.removeprefix("file://"))).resolve()
