"""Reports what is installed, how a model runs on this machine, and why its forwards are bit-exact."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

import psutil
import trio

from api import installation
from runtime.settings import Settings

if TYPE_CHECKING:
    from actors import Runtime


def doctor(settings: Settings) -> int:
    """Prints what is installed, loads the model and prints its facts. Returns the exit status: 0 if all is well."""
    _print("installed", installation.describe_installation())
    for rival in installation.rivals():
        _print("note", rival)
    intruders = installation.intruders()
    for intruder in intruders:
        _print("warning", intruder)
    if intruders:
        return 1
    # Imported here: this fails if another package has taken the place of one of ours, which is to be reported first.
    from actors import open_runtime

    async def report() -> None:
        async with open_runtime(settings) as runtime:
            for name, value in _report(runtime):
                _print(name, value)

    trio.run(report)
    return 0


def _print(name: str, value: str) -> None:
    print(f"{name:<14}{value}")


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
        ("dtype", f"{facts.dtype}, keys and values in {slab.dtype}"),
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


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"
