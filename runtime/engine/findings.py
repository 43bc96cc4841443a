"""What probes found on this machine, kept in a file: what fails as well as what holds, since either takes seconds to find."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch

from runtime.caches import cache_folder
from runtime.engine.machine import cpu_flags, kernel_class

# Raised when a probe tries more than before, so that what an older one found is not believed.
_PROBE_VERSION = 2


def found(subject: str, probe: Callable[[], bool]) -> bool:
    """What `probe` finds of a `subject` of this description here, from the file if it was found before."""
    key = _key(subject)
    before = _read().get(key)
    if isinstance(before, bool):
        return before
    holds = probe()
    _write(_read() | {key: holds})
    return holds


def _key(subject: str) -> str:
    """A digest of all on which the choice of a kernel may depend."""
    gpu = kernel_class(torch.device("cuda")) if torch.cuda.is_available() else ""
    machine = (platform.node(), cpu_flags(), kernel_class(), gpu, torch.__version__, torch.__config__.show())
    return hashlib.sha256(repr((_PROBE_VERSION, machine, subject)).encode()).hexdigest()


def _file() -> Path | None:
    """Where findings are kept; a user without a home has no such place."""
    folder = cache_folder()
    return folder and folder / "findings.json"


def _read() -> dict[str, object]:
    file = _file()
    # Whatever is wrong with it, the probe can tell anew.
    with suppress(OSError, ValueError, RecursionError):
        content = json.loads(file.read_text()) if file else {}
        if isinstance(content, dict):
            return content
    return {}


def _write(content: dict[str, object]) -> None:
    file = _file()
    if file is None:
        return
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile("w", dir=file.parent, delete=False) as fresh:
            json.dump(content, fresh)
        Path(fresh.name).replace(file)
