"""What this machine gives for a model, and why its forwards are bit-exact."""

from __future__ import annotations

import platform
from importlib.util import find_spec
from pathlib import Path

import psutil

from actors import Runtime, open_runtime
from runtime.settings import Settings

_ROOT = Path(__file__).parents[1]


async def doctor(settings: Settings) -> int:
    """Loads the model, prints what there is, and returns the exit status: 0 when all is well."""
    strangers = [f"{name} comes from {origin}" for name, origin in _foreign_packages()]
    async with open_runtime(settings) as runtime:
        for name, value in _report(runtime):
            print(f"{name:<14}{value}")
    for stranger in strangers:
        print(f"{'warning':<14}{stranger}, not from {_ROOT}: another distribution shadows ours")
    return 1 if strangers else 0


def _report(runtime: Runtime) -> list[tuple[str, str]]:
    settings, facts = runtime.settings, runtime.facts
    slab = facts.slab
    slabs = settings.capacity + settings.max_concurrent
    memory = psutil.virtual_memory()
    chosen = f" ({facts.form_reason})" if facts.form_reason else ""
    return [
        ("machine", f"{platform.machine()}, {psutil.cpu_count()} CPUs, Python {platform.python_version()}"),
        ("CPU features", facts.cpu_features),
        ("kernel class", facts.kernel_class),
        ("memory", f"{_size(memory.available)} available of {_size(memory.total)}"),
        ("model", f"{settings.model} ({facts.architecture}, vocabulary {facts.vocabulary})"),
        ("backend", f"{facts.backend} on {facts.device}"),
        ("dtype", facts.dtype),
        ("weights", f"{facts.weights}, {_size(facts.weights_bytes)}{chosen}"),
        *(("", line) for line in facts.tensors),
        ("sink, window", f"{slab.sink}, {slab.window} tokens"),
        ("slabs", f"{slabs} of at most {_size(slab.ceiling_bytes)}, all at most {_size(slabs * slab.ceiling_bytes)}"),
        ("row tile", f"at most {facts.row_tile} rows of any sessions a forward"),
        *_exactness(runtime),
    ]


def _exactness(runtime: Runtime) -> list[tuple[str, str]]:
    facts = runtime.facts
    if not facts.is_bit_exact:
        return [("bit-exactness", "not claimed: determinism=fast")]
    return [
        ("bit-exactness", "a row's logits are the same bits in every forward, for its kernels allow nothing else:"),
        *(("", claim) for claim in facts.claims),
        ("tried here", facts.tried),
    ]


def _foreign_packages() -> list[tuple[str, str]]:
    """Our top-level packages that were not loaded from beside this one: their names are common words."""
    found = []
    for name in ("runtime", "actors", "proto"):
        spec = find_spec(name)
        origin = spec.origin if spec else None
        if origin is None or Path(origin).parents[1] != _ROOT:
            found.append((name, str(origin)))
    return found


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"
