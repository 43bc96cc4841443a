"""What a model is on OpenVINO: its graphs, its embedding and its rotation, made of its files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from runtime.bundles import Bundle
from runtime.checkpoints import load_weights
from runtime.engine.openvino_compiling import Compiling, Draft, Graph, Graphs
from runtime.engine.openvino_graphs import build
from runtime.engine.rotary import ExactRotary
from runtime.gguf_file import StoredRows
from runtime.gguf_model import StoredEmbedding, stored_model


class Rows(Protocol):
    """An embedding."""

    @property
    def nbytes(self) -> int: ...

    def rows(self, indices: Sequence[int]) -> Tensor:
        """[indices, hidden] float32."""
        ...


class DenseRows:
    """Rows of a matrix that is not quantised."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    @property
    def nbytes(self) -> int:
        return self._weight.nbytes

    def rows(self, indices: Sequence[int]) -> Tensor:
        return self._weight[indices].float()


@dataclass(frozen=True, slots=True)
class Parts:
    """All that a model is on OpenVINO. `tensors` says of each kind in a GGUF file what became of it.

    For as long as `held` is, files that parts lie in are not cleared away.
    """

    graphs: Graphs
    embedding: Rows
    rotary: ExactRotary
    weights_bytes: int
    tensors: tuple[str, ...]
    held: Bundle | None = None


class Keeper(Protocol):
    """Where a model's parts are held. Threads call it side by side."""

    def graph(self, name: str, draft: Draft) -> Graph:
        """What is called, made of a draft."""
        ...

    def embedding(self, weight: Tensor) -> Tensor:
        """The same values, where they may stay when the file is gone that they were mapped from."""
        ...


class InMemory:
    """Holds graphs as they are compiled: OpenVINO keeps their constants beside what its kernels pack of them."""

    def __init__(self, compiling: Compiling) -> None:
        self._compiling = compiling

    def graph(self, name: str, draft: Draft) -> Graph:
        return Graph(draft.compiled(self._compiling), draft.shape, self._compiling)

    def embedding(self, weight: Tensor) -> Tensor:
        return weight.detach().clone()


def make_parts(directory: Path, compiling: Compiling, keeper: Keeper) -> Parts:
    """The parts of the model in `directory`, or in a GGUF file. Raises ModelUnavailable."""
    model = stored_model(directory) if directory.is_file() else _loaded(directory, compiling)
    decoder = model.get_decoder()
    rotary = ExactRotary(decoder.rotary_emb)
    table = decoder.embed_tokens
    embedding: Rows = (
        StoredRows(table.stored) if isinstance(table, StoredEmbedding) else DenseRows(keeper.embedding(table.weight))
    )
    built = build(model, compiling, keeper.graph)
    return Parts(built.graphs, embedding, rotary, built.weights_bytes + embedding.nbytes, built.tensors)


def _loaded(directory: Path, compiling: Compiling) -> Any:
    # What is rounded to fewer bits is rounded from the checkpoint's own.
    dtype: torch.dtype | Literal["auto"] = compiling.dtype if compiling.weights == "none" else "auto"
    return load_weights(AutoModelForCausalLM, directory, dtype, f"the weights in {directory} cannot be loaded")
