"""A model's parts for OpenVINO, kept in a bundle: a load but the first reads no checkpoint, rounds nothing and compiles nothing.

A bundle holds graphs as OpenVINO exports them, and the embedding where there is no GGUF file to look it up in. Graphs lie in
mapped files, whose pages are handed back once kernels have packed what they read, so that memory holds weights once.
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
from runtime.engine.openvino_compiling import Compiling, Draft, Graph, Graphs, Shape
from runtime.engine.openvino_graphs import MOST_AT_ONCE
from runtime.engine.openvino_parts import DenseRows, InMemory, Parts, Rows, make_parts
from runtime.engine.rotary import ExactRotary, KnownRotary
from runtime.gguf_file import GgufFile, StoredRows
from runtime.model_files import file_identity, one_line

_EMBEDDING = "embedding"
# Graphs of one version of each of these are not another's.
_LIBRARIES = ("openvino", "torch", "transformers", "gguf", "numpy")
_SOURCES = (
    *("checkpoints.py", "gguf_file.py", "gguf_model.py", "foreign/gguf.py"),
    *(f"engine/{name}.py" for name in ("blocks", "configuration", "rotary", "stored")),
    *(f"engine/openvino_{name}.py" for name in ("bundle", "compiling", "graphs", "parts")),
)
_MODEL_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json")
# Weights of two bytes have four in a graph that is exported, and few kinds in a GGUF file grow by more.
_MOST_TIMES = 2

_log = logging.getLogger("perennial.engine")


def bundled_bytes(directory: Path, compiling: Compiling) -> int | None:
    """What weights take in memory that come from a bundle, or None where there is none for this model."""
    try:
        bundle = (folder := _folder()) and Bundle.open(folder / str(_name(directory, compiling)))
    except (OSError, BundleDamaged):
        return None
    return int(bundle.facts["held_bytes"]) if bundle else None


def find_parts(directory: Path, compiling: Compiling) -> Parts:
    """The parts of a model from its bundle, or made of its files and kept in one. Raises ModelUnavailable."""
    folder = _folder()
    try:
        # What is read later may be of a newer state, which is looked for under another name.
        name = _name(directory, compiling)
    except OSError:
        # What it lacks is for who reads it to say.
        folder = None
    if folder is None:
        return make_parts(directory, compiling, InMemory(compiling))
    try:
        if bundle := Bundle.open(folder / str(name)):
            return _read(bundle, directory, compiling)
    except BundleDamaged as error:
        _log.warning("%s: it is made anew", error)
        remove_bundle(folder / str(name))
    parts: Parts | None = None
    try:
        most_bytes = _MOST_TIMES * sum(file.stat().st_size for file in _model_files(directory))
        with new_bundle(folder, most_bytes, _is_of_use) as writer:
            keeper = _InBundle(writer, compiling)
            parts = make_parts(directory, compiling, keeper)
            keeper.finish(name, parts, directory)
        parts = replace(parts, held=Bundle.open(folder / str(name)))
    except (OSError, BundleDamaged) as error:
        _log.warning(
            "no compiled graphs are kept in %s (%s): each load makes them again, and memory holds weights twice",
            folder,
            one_line(error),
        )
    return parts or make_parts(directory, compiling, InMemory(compiling))


class _InBundle:
    """Holds parts in the files of a bundle, until one cannot be written; from then on in memory."""

    def __init__(self, writer: BundleWriter, compiling: Compiling) -> None:
        self._writer, self._compiling = writer, compiling
        self._memory = InMemory(compiling)
        self._graphs: dict[str, Mapping[str, Any]] = {}
        self._embedding: Mapping[str, Any] | None = None
        self._failure: OSError | None = None

    def graph(self, name: str, draft: Draft) -> Graph:
        if self._failure:
            return self._memory.graph(name, draft)
        compiled = draft.compiled(self._compiling)
        exported = compiled.export_model().getbuffer()
        try:
            mapped = self._writer.add(name, exported)
        except OSError as error:
            self._failure = error
            return Graph(compiled, draft.shape, self._compiling)
        shape = draft.shape
        self._graphs[name] = {"widths": shape.widths, "groups": shape.groups, "bytes": exported.nbytes}
        # Otherwise a head would be in memory three times.
        del compiled, exported
        return Graph.imported(mapped, shape, self._compiling)

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
        # Kernels pack weights in the type that they compute in, where those are not quantised.
        is_plain = self._compiling.weights == "none"
        return exported * self._compiling.dtype.itemsize // torch.float32.itemsize if is_plain else exported


def _read(bundle: Bundle, directory: Path, compiling: Compiling) -> Parts:
    """Raises BundleDamaged, or ModelUnavailable."""
    facts = bundle.facts
    try:
        graphs = _graphs(bundle, compiling)
        embedding = _embedding(bundle, directory)
        rotary = ExactRotary(KnownRotary(torch.tensor(facts["frequencies"], dtype=torch.float64), facts["scaling"]))
        return Parts(graphs, embedding, rotary, facts["weights_bytes"], tuple(facts["tensors"]), held=bundle)
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise BundleDamaged(f"what is kept of {directory} cannot be read ({one_line(error)})") from error


def _graphs(bundle: Bundle, compiling: Compiling) -> Graphs:
    graphs: Mapping[str, Any] = bundle.facts["graphs"]

    def imported(name: str) -> Graph:
        shape = Shape(tuple(graphs[name]["widths"]), graphs[name]["groups"])
        return Graph.imported(bundle.part(name), shape, compiling)

    # Each packs its weights on one core, and often waits for memory or for OpenVINO's locks.
    with ThreadPoolExecutor(MOST_AT_ONCE) as pool:
        return Graphs.of(dict(zip(graphs, pool.map(imported, graphs), strict=True)))


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


def _name(directory: Path, compiling: Compiling) -> BundleName:
    """Raises OSError where the model lacks a file."""
    form = compiling.weights if compiling.weights != "none" else name_of(compiling.dtype)
    return BundleName(
        _digest(directory.resolve()),
        _digest(_identities(directory), _makers()),
        f"{form}-{_digest(cpu_flags(), features())}",
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
