"""What a model is made of: what runs between the attention of two layers, an embedding and a rotation; not attention itself."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from runtime.bundles import Bundle
from runtime.engine.exact import Claim
from runtime.engine.rotary import ExactRotary
from runtime.engine.row_attention import RowAttention, RowPlan
from runtime.slab_spec import SlabSpec


class RowGraph:
    """A part of a model that takes rows of these `widths` and returns rows, in float32.

    Its next call may overwrite what it returned. `forms` are those of its weights that come from a GGUF file.
    """

    is_imported = False

    def __init__(self, widths: Sequence[int], forms: Sequence[str], least_rows: int) -> None:
        """A call of fewer than `least_rows` is filled up with copies of its last row."""
        self.widths, self.forms, self._least_rows = tuple(widths), tuple(forms), least_rows

    def run(self, *given: Any) -> list[Any]:
        """As calling it, for what is `given` to several graphs, or goes from one to the next. It has to be enough rows."""
        raise NotImplementedError

    @staticmethod
    def given(rows: Tensor) -> Any:
        """Rows as `run` takes them, in their own memory, which has to outlive the call."""
        raise NotImplementedError

    @staticmethod
    def taken(returned: Any) -> Tensor:
        """What `run` returned, where it lies."""
        raise NotImplementedError

    def release(self) -> None:
        """Frees what its calls have taken beside its weights, and with it what they returned."""

    def __call__(self, *rows: Tensor) -> list[Tensor]:
        returned = self.run(*(self.given(lengthened(one, self._least_rows)) for one in rows))
        return [self.taken(one)[: len(rows[0])] for one in returned]

    def of_rows(self, rows: Tensor) -> Tensor:
        """All that it returns for `rows` that hold all that it takes, one beside the other."""
        taken = [part.contiguous() for part in rows.split(self.widths, dim=1)]
        return torch.cat([one.flatten(1) for one in self(*taken)], dim=1)


def lengthened(rows: Tensor, least: int) -> Tensor:
    """Rows, of which there are as many as `least` or more: the last one again where some are missing."""
    missing = least - len(rows)
    return rows if missing <= 0 else torch.cat([rows, *[rows[-1:]] * missing])


@dataclass(frozen=True, slots=True)
class Graphs:
    """`first` takes hidden rows; each of `between`, and `last`, what a layer attended to and the hidden rows before it."""

    first: RowGraph
    between: tuple[RowGraph, ...]
    last: RowGraph
    head: RowGraph

    @classmethod
    def of(cls, named: Mapping[str, RowGraph]) -> Graphs:
        """Of those that `graph_names` names."""
        between = tuple(named[f"between-{number}"] for number in range(len(named) - 3))
        return cls(named["first"], between, named["last"], named["head"])

    def project(
        self, embedded: Tensor, angles: Sequence[Tensor], attend: RowAttention, plan: RowPlan, layers: int
    ) -> list[Tensor]:
        """Hidden rows [N, hidden] before the last attention of `layers` layers; its query [N, G*Q, D], keys and values [N, G, D].

        `attend` reads and writes slabs for the layers before. The next call of a graph may overwrite what is returned.
        """
        given, taken = self.first.given, self.first.taken
        hidden, turn = given(embedded), [given(one) for one in angles]
        projected = self.first.run(hidden, *turn)
        for layer, graph in enumerate(self.between[: layers - 1]):
            query, key, value = map(taken, projected)
            attended = attend(layer, query, key, value, plan)
            hidden, *projected = graph.run(given(attended), hidden, *turn)
        return [taken(one) for one in (hidden, *projected)]

    def release(self) -> None:
        """Frees what graphs have taken beside their weights, and with it what they returned."""
        for graph in (self.first, *self.between, self.last, self.head):
            graph.release()


def graph_names(layers: int) -> Iterator[str]:
    """What the graphs of a model of so many layers are called, the head first, which takes longest."""
    yield from ("head", "first", *(f"between-{number}" for number in range(layers - 1)), "last")


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
    """All that a model is beside attention. `tensors` says of each kind in a GGUF file what became of it.

    For as long as `held` is, files that parts lie in are not cleared away.
    """

    graphs: Graphs
    embedding: Rows
    rotary: ExactRotary
    weights_bytes: int
    tensors: tuple[str, ...]
    held: Bundle | None = None


class Draft(Protocol):
    """A graph that is still to be made."""

    def in_memory(self) -> RowGraph: ...

    def exported(self) -> tuple[memoryview, Mapping[str, Any]]:
        """Bytes of which `Making.imported` makes the graph, with facts in JSON."""
        ...


class Keeper(Protocol):
    """Where a model's parts are held. Threads call it side by side."""

    def graph(self, name: str, draft: Draft) -> RowGraph:
        """What is called, made of a draft."""
        ...

    def embedding(self, weight: Tensor) -> Tensor:
        """The same values, where they may stay when the file is gone that they were mapped from."""
        ...


class InMemory:
    """Holds all parts in memory."""

    def graph(self, name: str, draft: Draft) -> RowGraph:
        return draft.in_memory()

    def embedding(self, weight: Tensor) -> Tensor:
        return weight.detach().clone()


class Making(Protocol):
    """A way to make a model's parts."""

    @property
    def library(self) -> str:
        """What computes the products, with its version: two of them may compute other bits."""
        ...

    @property
    def way(self) -> str:
        """The library, and how it is called."""
        ...

    @property
    def form(self) -> str:
        """What tells its parts from those of other ways, in a word."""
        ...

    @property
    def row_counts(self) -> range:
        """How many rows graphs may be called with, so that a row gets the same bits in each call."""
        ...

    @property
    def claims(self) -> tuple[Claim, ...]:
        """Why a row's bits do not depend on the rows beside it."""
        ...

    def needed_bytes(self, directory: Path, weights: int) -> int:
        """What a load that makes the parts of a model with so many weights takes for them."""
        ...

    @property
    def held_share(self) -> float:
        """What imported graphs take of memory, of the bytes that they are imported from."""
        ...

    @property
    def unkept(self) -> str:
        """What it costs that parts are kept in memory alone."""
        ...

    def prepare(self, spec: SlabSpec) -> None:
        """Has kernels of ours compiled for slabs of `spec`, or found in the user's cache."""
        ...

    def parts(self, directory: Path, keeper: Keeper) -> Parts:
        """Makes the parts of the model in `directory`, or in a GGUF file. Raises ModelUnavailable."""
        ...

    def graphs(self, named: Mapping[str, RowGraph]) -> Graphs:
        """Those that `graph_names` names."""
        ...

    def imported(self, mapped: mmap.mmap, facts: Mapping[str, Any]) -> RowGraph:
        """The graph that was exported to `mapped`. Raises LookupError, TypeError, ValueError or RuntimeError where it is none."""
        ...
