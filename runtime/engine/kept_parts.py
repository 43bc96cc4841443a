"""A model's parts, kept in a bundle: a load but the first reads no checkpoint, rounds nothing and compiles nothing.

A bundle holds graphs as they are exported, and the embedding where there is no GGUF file to look it up in. Graphs lie in mapped
files. Memory holds weights once: kernels of ours read them there, and OpenVINO's pack what they read and hand its pages back.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import runtime
from runtime.bundles import Bundle, BundleDamaged, BundleName, BundleWriter, let_go, new_bundle, remove_bundle
from runtime.caches import cache_folder
from runtime.dtypes import dtype_named, name_of
from runtime.engine.machine import cpu_flags, features
from runtime.engine.parts import DenseRows, Draft, Graphs, InMemory, Making, Parts, RowGraph, Rows
from runtime.engine.rotary import ExactRotary, KnownRotary
from runtime.gguf_file import GgufFile, StoredRows
from runtime.model_files import file_identity, one_line

_EMBEDDING = "embedding"
# Graphs of one version of each of these are not another's.
_LIBRARIES = ("openvino", "torch", "transformers", "gguf", "numpy")
_SOURCES = (
    *("checkpoints.py", "gguf_file.py", "gguf_model.py", "foreign/gguf.py"),
    *(f"engine/{name}.py" for name in ("blocks", "configuration", "kept_parts", "parts", "rotary", "stored")),
    *(f"engine/openvino_{name}.py" for name in ("compiling", "graphs", "parts")),
    *(f"engine/block_{name}.py" for name in ("graphs", "kernel", "lanes", "program", "tile")),
)
_MODEL_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json")
# Weights of two bytes have four in a graph that is exported, and few kinds in a GGUF file grow by more.
_MOST_TIMES = 2

_READ_AT_ONCE = 4

_log = logging.getLogger("perennial.engine")


def held_bytes(directory: Path, making: Making) -> int | None:
    """What weights take in memory that come from a bundle, or None where there is none for this model."""
    try:
        bundle = (folder := _folder()) and Bundle.open(folder / str(_name(directory, making)))
    except (OSError, BundleDamaged):
        return None
    return int(bundle.facts["held_bytes"]) if bundle else None


def find_parts(directory: Path, making: Making) -> Parts:
    """The parts of a model from its bundle, or made of its files and kept in one. Raises ModelUnavailable."""
    folder = _folder()
    try:
        # What is read later may be of a newer state, which is looked for under another name.
        name = _name(directory, making)
    except OSError:
        # What it lacks is for who reads it to say.
        folder = None
    if folder is None:
        return making.parts(directory, InMemory())
    try:
        if bundle := Bundle.open(folder / str(name)):
            return _read(bundle, directory, making)
    except BundleDamaged as error:
        _log.warning("%s: it is made anew", error)
        remove_bundle(folder / str(name))
    parts: Parts | None = None
    try:
        most_bytes = _MOST_TIMES * sum(file.stat().st_size for file in _model_files(directory))
        with new_bundle(folder, most_bytes, _is_of_use) as writer:
            keeper = _InBundle(writer, making)
            parts = making.parts(directory, keeper)
            keeper.finish(name, parts, directory)
        parts = replace(parts, held=Bundle.open(folder / str(name)))
    except (OSError, BundleDamaged) as error:
        _log.warning("no graphs are kept in %s (%s): %s", folder, one_line(error), making.unkept)
    return parts or making.parts(directory, InMemory())


class _InBundle:
    """Holds parts in the files of a bundle, until one cannot be written; from then on in memory."""

    def __init__(self, writer: BundleWriter, making: Making) -> None:
        self._writer, self._making = writer, making
        self._memory = InMemory()
        self._graphs: dict[str, Mapping[str, Any]] = {}
        self._embedding: Mapping[str, Any] | None = None
        self._failure: OSError | None = None

    def graph(self, name: str, draft: Draft) -> RowGraph:
        if self._failure:
            return self._memory.graph(name, draft)
        exported, facts = draft.exported()
        try:
            mapped = self._writer.add(name, exported)
        except OSError as error:
            self._failure = error
            del exported
            return self._memory.graph(name, draft)
        self._graphs[name] = {"facts": facts, "bytes": exported.nbytes}
        # Otherwise a head would be in memory three times.
        del exported
        return self._making.imported(mapped, facts)

    def embedding(self, weight: Tensor) -> Tensor:
        weight = weight.detach().contiguous()
        try:
            mapped = self._writer.add(_EMBEDDING, weight.view(torch.uint8).flatten().numpy().data)
        except OSError as error:
            self._failure = error
            return self._memory.embedding(weight)
        self._embedding = {"dtype": name_of(weight.dtype), "shape": weight.shape}
        return torch.frombuffer(mapped, dtype=weight.dtype).view(weight.shape)

    def finish(self, name: BundleName, parts: Parts, directory: Path) -> None:
        """Has the bundle appear. Raises OSError, also where a part could not be written."""
        if self._failure:
            raise self._failure
        self._writer.finish(
            name,
            {
                "model": str(directory.resolve()),
                "graphs": self._graphs,
                "held_bytes": self._held_bytes(),
                "embedding": self._embedding,
                "frequencies": parts.rotary.frequencies.tolist(),
                "scaling": parts.rotary.scaling,
                "weights_bytes": parts.weights_bytes,
                "tensors": parts.tensors,
            },
        )

    def _held_bytes(self) -> int:
        exported: int = sum(one["bytes"] for one in self._graphs.values())
        return int(exported * self._making.held_share)


def _read(bundle: Bundle, directory: Path, making: Making) -> Parts:
    """Raises BundleDamaged, or ModelUnavailable."""
    facts = bundle.facts
    try:
        graphs = _graphs(bundle, making)
        embedding = _embedding(bundle, directory)
        rotary = ExactRotary(KnownRotary(torch.tensor(facts["frequencies"], dtype=torch.float64), facts["scaling"]))
        return Parts(graphs, embedding, rotary, facts["weights_bytes"], tuple(facts["tensors"]), held=bundle)
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise BundleDamaged(f"what is kept of {directory} cannot be read ({one_line(error)})") from error


def _graphs(bundle: Bundle, making: Making) -> Graphs:
    graphs: Mapping[str, Any] = bundle.facts["graphs"]

    def imported(name: str) -> RowGraph:
        return making.imported(bundle.part(name), graphs[name]["facts"])

    # Each packs its weights on one core, and often waits for memory or for OpenVINO's locks.
    with ThreadPoolExecutor(_READ_AT_ONCE) as pool:
        return making.graphs(dict(zip(graphs, pool.map(imported, graphs), strict=True)))


def _embedding(bundle: Bundle, directory: Path) -> Rows:
    kept = bundle.facts["embedding"]
    if kept is None:
        return StoredRows(GgufFile.read(directory).embedding)
    mapped = bundle.part(_EMBEDDING)
    # Rows are read one by one from now on.
    let_go(mapped)
    return DenseRows(torch.frombuffer(mapped, dtype=dtype_named(kept["dtype"])).view(kept["shape"]))


def _is_of_use(facts: Mapping[str, Any]) -> bool:
    """Whether the model that a bundle was made of may still be there."""
    try:
        return Path(str(facts.get("model"))).exists()
    except OSError:
        return True


def _folder() -> Path | None:
    """Where bundles are, or would be; a user without a home has none."""
    folder = cache_folder()
    return folder and folder / "graphs"


def _name(directory: Path, making: Making) -> BundleName:
    """Raises OSError where the model lacks a file."""
    return BundleName(
        _digest(directory.resolve()),
        _digest(_identities(directory), _makers()),
        f"{making.form}-{_digest(cpu_flags(), features())}",
    )


def _identities(directory: Path) -> list[tuple[object, ...]]:
    return [(file.name, file_identity(file)) for file in _model_files(directory)]


def _model_files(directory: Path) -> list[Path]:
    if directory.is_file():
        return [directory]
    return sorted(file for pattern in _MODEL_FILES for file in directory.glob(pattern))


@cache
def _makers() -> tuple[object, ...]:
    here = Path(runtime.__file__).parent
    return *map(version, _LIBRARIES), *((here / name).read_bytes() for name in _SOURCES)


def _digest(*things: object) -> str:
    return hashlib.sha256(repr(things).encode()).hexdigest()[:24]
