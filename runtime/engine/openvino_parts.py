"""A model's parts on OpenVINO, made of its files."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM

from runtime.checkpoints import load_weights
from runtime.dtypes import name_of
from runtime.engine.exact import Claim, Ground
from runtime.engine.openvino_compiling import Compiling, Graph
from runtime.engine.openvino_fit import GROUP
from runtime.engine.openvino_graphs import build
from runtime.engine.parts import DenseRows, Graphs, Keeper, Parts, RowGraph, Rows
from runtime.engine.rotary import ExactRotary
from runtime.engine.row_attention import prepare_kernels
from runtime.gguf_file import StoredRows
from runtime.gguf_model import StoredEmbedding, stored_model
from runtime.slab_spec import SlabSpec


@dataclass(frozen=True, slots=True)
class InGraphs:
    """Parts as OpenVINO compiles them."""

    compiling: Compiling

    @property
    def library(self) -> str:
        return f"openvino {version('openvino')}"

    @property
    def way(self) -> str:
        return f"{self.library} {self.compiling.properties(GROUP)}"

    @property
    def form(self) -> str:
        compiling = self.compiling
        return compiling.weights if compiling.weights != "none" else name_of(compiling.dtype)

    @property
    def row_counts(self) -> range:
        return self.compiling.row_counts

    @property
    def claims(self) -> tuple[Claim, ...]:
        compiling = self.compiling
        if compiling.rounds_rows:
            form, ground = "OpenVINO, rows in 8 bits, groups of 32 added in order", Ground.WHOLE_NUMBERS
        else:
            dtype = name_of(compiling.dtype if compiling.weights == "none" else torch.float32)
            counts = compiling.row_counts
            form, ground = f"OpenVINO, in {dtype}, {counts[0]} to {counts[-1]} rows", Ground.ROW_BY_ROW
        rest = (
            Claim(part, "OpenVINO's vectors, a row at a time", Ground.ROW_BY_ROW)
            for part in ("norms", "activations, rotation")
        )
        return Claim("linears", form, ground), *rest

    def needed_bytes(self, directory: Path, weights: int) -> int:
        # What is rounded is read in 16 bits first, and what is not is kept twice: as it was, and as OpenVINO's kernels read it.
        return weights * (2 * self.compiling.dtype.itemsize if self.compiling.weights == "none" else 2)

    @property
    def held_share(self) -> float:
        # Kernels pack weights in the type that they compute in, where those are not quantised.
        compiling = self.compiling
        return compiling.dtype.itemsize / torch.float32.itemsize if compiling.weights == "none" else 1

    @property
    def unkept(self) -> str:
        return "each load makes them again, and memory holds weights twice"

    def prepare(self, spec: SlabSpec) -> None:
        prepare_kernels(spec)

    def parts(self, directory: Path, keeper: Keeper) -> Parts:
        model = stored_model(directory) if directory.is_file() else _loaded(directory, self.compiling)
        decoder = model.get_decoder()
        rotary = ExactRotary(decoder.rotary_emb)
        table = decoder.embed_tokens
        embedding: Rows = (
            StoredRows(table.stored)
            if isinstance(table, StoredEmbedding)
            else DenseRows(keeper.embedding(table.weight))
        )
        built = build(model, self.compiling, keeper)
        return Parts(built.graphs, embedding, rotary, built.weights_bytes + embedding.nbytes, built.tensors)

    def graphs(self, named: Mapping[str, RowGraph]) -> Graphs:
        return Graphs.of(named)

    def imported(self, mapped: mmap.mmap, facts: Mapping[str, Any]) -> Graph:
        return Graph.imported(mapped, facts, self.compiling)


def _loaded(directory: Path, compiling: Compiling) -> Any:
    # What is rounded to fewer bits is rounded from the checkpoint's own.
    dtype: torch.dtype | Literal["auto"] = compiling.dtype if compiling.weights == "none" else "auto"
    return load_weights(AutoModelForCausalLM, directory, dtype, f"the weights in {directory} cannot be loaded")
