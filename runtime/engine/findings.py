"""Results of probes on this machine, kept in a file; failures too, because either takes seconds to find."""

from __future__ import annotations

import fcntl
import hashlib
import json
import platform
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from tempfile import mkstemp

import torch

from runtime.caches import cache_folder
from runtime.engine.machine import cpu_flags, kernel_class


def find_or_probe(subject: str, probe: Callable[[], bool]) -> bool:
    """The result of `probe` for the subject described by `subject`; taken from the file if it was found before."""
    key = _key(subject)
    before = _read().get(key)
    if isinstance(before, bool):
        return before
    holds = probe()
    _add({key: holds})
    return holds


def _key(subject: str) -> str:
    """A digest of everything that the choice of a kernel may depend on, and of the code that calls and tries it."""
    gpu = kernel_class(torch.device("cuda")) if torch.cuda.is_available() else ""
    machine = (platform.node(), cpu_flags(), kernel_class(), gpu, torch.__version__, torch.__config__.show())
    compilers = [version(name) for name in ("numba", "llvmlite")]
    return hashlib.sha256(repr((_code(), machine, compilers, subject)).encode()).hexdigest()


@cache
def _code() -> str:
    here = Path(__file__).parent
    # Slabs and their shape make the slots and masks that a probe tries.
    sources = [*sorted(here.glob("*.py")), *(here.parent / name for name in ("slab.py", "slab_spec.py"))]
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


def _file() -> Path | None:
    """The file of results; None for a user without a home."""
    folder = cache_folder()
    return folder and folder / "findings.json"


def _read() -> dict[str, object]:
    file = _file()
    # Whatever is wrong with the file, the probe can run again.
    with suppress(OSError, ValueError, RecursionError):
        content = json.loads(file.read_text()) if file else {}
        if isinstance(content, dict):
            return content
    return {}


def _add(found: dict[str, object]) -> None:
    file = _file()
    if file is None:
        return
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with _locked(file.with_suffix(".lock")):
            _write(file, _read() | found)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keeps other servers from adding to the file meanwhile. Where nothing can be locked, theirs may be lost."""
    with ExitStack() as stack:
        with suppress(OSError):
            fcntl.flock(stack.enter_context(path.open("ab")), fcntl.LOCK_EX)
        yield


def _write(file: Path, content: dict[str, object]) -> None:
    """Raises OSError."""
    number, name = mkstemp(dir=file.parent)
    fresh = Path(name)
    try:
        with open(number, "w") as opened:
            json.dump(content, opened)
        fresh.replace(file)
    finally:
        fresh.unlink(missing_ok=True)
