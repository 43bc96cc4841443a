"""What the probe found on this machine, kept in a file: large models take it seconds."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch

from runtime.engine.probe import RowSizes
from runtime.slab import SlabSpec

_PROBED_LAYERS = 1


def first_proven(
    specs: Sequence[SlabSpec], model: str, find: Callable[[SlabSpec], RowSizes | None]
) -> tuple[SlabSpec, RowSizes] | None:
    """The first of `specs` for which row sizes are proven here, for a `model` of this description, and the sizes.

    `find` looks for the sizes of slabs with the first layers alone.
    """
    for spec in specs:
        # All layers of our architectures have the same shapes, and so the same kernels: more would show nothing more.
        if sizes := proven(model, replace(spec, layers=min(spec.layers, _PROBED_LAYERS)), find):
            return spec, sizes
    return None


def proven(model: str, spec: SlabSpec, find: Callable[[SlabSpec], RowSizes | None]) -> RowSizes | None:
    """What `find` finds for a `model` of this description here, from the file if it was found before."""
    key = _key(model, spec)
    found = _read().get(key)
    if found is not None:
        return RowSizes(*map(tuple, found.values()))
    sizes = find(spec)
    if sizes is not None:
        _write(_read() | {key: asdict(sizes)})
    return sizes


def _key(model: str, spec: SlabSpec) -> str:
    """A digest of all on which the choice of a kernel may depend."""
    machine = (platform.node(), _cpu(), torch.__version__, torch.__config__.show(), torch.get_num_threads())
    return hashlib.sha256(repr((machine, model, spec)).encode()).hexdigest()


def _cpu() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.processor()


def _file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "perennial" / "proven.json"


def _read() -> dict[str, dict[str, list[int]]]:
    # Whatever is wrong with it, the probe can tell anew.
    with suppress(OSError, ValueError):
        content = json.loads(_file().read_text())
        if isinstance(content, dict):
            return content
    return {}


def _write(content: dict[str, dict[str, object]]) -> None:
    file = _file()
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile("w", dir=file.parent, delete=False) as fresh:
            json.dump(content, fresh)
        Path(fresh.name).replace(file)
