"""OpenVINO's graphs from a draft to what is called: compiled here, or imported from what one was exported to."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from runtime.bundles import let_go
from runtime.engine.machine import sums_bytes
from runtime.engine.openvino_fit import GROUP
from runtime.foreign.openvino import ov

# Up to so many rows oneDNN multiplies float32 by kernels with narrower blocks of outputs.
_FEW_ROWS = 6


@dataclass(frozen=True, slots=True)
class Compiling:
    """How graphs are compiled: the type that they compute in, how they hold weights, and on how many threads."""

    dtype: torch.dtype
    weights: str
    threads: int

    @property
    def rounds_rows(self) -> bool:
        """Whether products are of whole numbers, for which rows are rounded to 8 bits."""
        return self.weights != "none" and sums_bytes()

    @property
    def row_counts(self) -> range:
        """How many rows a graph may be called with, so that a row gets the same bits in each call.

        Without instructions for bytes products are of float32. Up to 64 rows are one block, which goes over all columns in order
        (jit_brgemm_inner_product_utils.cpp of oneDNN); more are cut, and the columns with them. For one row of weights that have
        to be widened there is another kernel, which keeps several sums.
        """
        if sums_bytes():
            return range(1, 129)
        return range(1 if self.weights == "none" else 2, 65)

    @property
    def layouts(self) -> tuple[int, ...]:
        """Counts of rows for each of which kernels may pack weights in another layout, where all others find theirs."""
        fewest = self.row_counts.start
        return (fewest,) if sums_bytes() else (fewest, _FEW_ROWS + 1)

    def properties(self, group: int) -> dict[str, Any]:
        """For OpenVINO, of a graph whose weights have a scale for each `group` of them, or larger groups."""
        return {
            "INFERENCE_PRECISION_HINT": "bf16" if self.dtype == torch.bfloat16 and self.weights == "none" else "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(group if self.rounds_rows else 0),
            "INFERENCE_NUM_THREADS": self.threads,
            "NUM_STREAMS": 1,
            # Threads that are tied to a core stand in the way of torch's own.
            "ENABLE_CPU_PINNING": False,
            # Graphs share the caller's arena of TBB. In an arena of its own a short graph ends before a worker comes, and what
            # was left for the worker (a task_proxy for each split of a loop) stays in memory; hour after hour it adds up.
            "EXCLUSIVE_ASYNC_REQUESTS": "YES",
        }


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a graph: how wide the rows are that it takes, and the groups of its weights by their forms in a GGUF file."""

    widths: tuple[int, ...]
    groups: Mapping[str, int]

    @property
    def group(self) -> int:
        """Rows that are rounded in larger groups than the weights have are not rounded at all."""
        return min(self.groups.values(), default=GROUP)


@dataclass(frozen=True, slots=True)
class Draft:
    """A graph that is still to be compiled."""

    model: ov.Model
    shape: Shape

    def compiled(self, compiling: Compiling) -> ov.CompiledModel:
        return _core().compile_model(self.model, "CPU", compiling.properties(self.shape.group))


class Graph:
    """A compiled graph. Takes rows of these `widths` and returns rows, in float32; its next call overwrites what it returned.

    `forms` are those of its weights that come from a GGUF file.
    """

    def __init__(
        self, compiled: ov.CompiledModel, shape: Shape, compiling: Compiling, mapped: mmap.mmap | None = None
    ) -> None:
        """`mapped` is what its constants lie in."""
        self._least_rows = compiling.row_counts.start
        self.widths, self.forms = shape.widths, tuple(shape.groups)
        self._mapped = mapped
        self._compiled = compiled
        self._request = compiled.create_infer_request()
        self._outputs = len(compiled.outputs)

    @classmethod
    def imported(cls, mapped: mmap.mmap, shape: Shape, compiling: Compiling) -> Graph:
        """The graph that was exported to `mapped`, of which what its kernels pack stays in memory alone.

        They pack weights at their first product in each layout, and read them no more.

        Raises RuntimeError where it is no such graph.
        """
        exported = ov.Tensor(np.frombuffer(mapped, np.uint8), shared_memory=True)
        graph = cls(_core().import_model(exported, "CPU", compiling.properties(shape.group)), shape, compiling, mapped)
        for count in compiling.layouts:
            graph.of_rows(torch.zeros(count, sum(shape.widths)))
        let_go(mapped)
        return graph

    @property
    def is_imported(self) -> bool:
        return self._mapped is not None

    def __call__(self, *rows: Tensor) -> list[Tensor]:
        returned = self.run(*(as_given(lengthened(one, self._least_rows)) for one in rows))
        return [as_rows(one)[: len(rows[0])] for one in returned]

    def run(self, *given: ov.Tensor) -> list[ov.Tensor]:
        """As calling it, for what is given to several graphs, or goes from one to the next.

        It has to be as many rows as `Compiling.row_counts` allows.
        """
        for place, tensor in enumerate(given):
            self._request.set_input_tensor(place, tensor)
        self._request.infer()
        return [self._request.get_output_tensor(place) for place in range(self._outputs)]

    def release(self) -> None:
        """Frees what its calls have taken beside its weights, and with it what they returned."""
        self._compiled.release_memory()

    def of_rows(self, rows: Tensor) -> Tensor:
        """All that it returns for `rows` that hold all that it takes, one beside the other."""
        taken = [part.contiguous() for part in rows.split(self.widths, dim=1)]
        return torch.cat([one.flatten(1) for one in self(*taken)], dim=1)


def lengthened(rows: Tensor, least: int) -> Tensor:
    """Rows, of which there are as many as `least` or more: the last one again where some are missing."""
    missing = least - len(rows)
    return rows if missing <= 0 else torch.cat([rows, *[rows[-1:]] * missing])


def as_given(rows: Tensor) -> ov.Tensor:
    """Rows as graphs take them, in their own memory, which has to outlive the call."""
    return ov.Tensor(rows.numpy(), shared_memory=True)


def as_rows(returned: ov.Tensor) -> Tensor:
    """What a graph returned, where it lies."""
    return torch.from_numpy(returned.data)


@dataclass(frozen=True, slots=True)
class Graphs:
    """`first` takes hidden rows; each of `between`, and `last`, what a layer attended to and the hidden rows before it."""

    first: Graph
    between: tuple[Graph, ...]
    last: Graph
    head: Graph

    @classmethod
    def of(cls, named: Mapping[str, Graph]) -> Graphs:
        """Of those that `names` names."""
        between = tuple(named[f"between-{number}"] for number in range(len(named) - 3))
        return cls(named["first"], between, named["last"], named["head"])

    def release(self) -> None:
        """Frees what graphs have taken beside their weights, and with it what they returned."""
        for graph in (self.first, *self.between, self.last, self.head):
            graph.release()


def graph_names(layers: int) -> Iterator[str]:
    """What the graphs of a model of so many layers are called, the head first, which takes longest."""
    yield from ("head", "first", *(f"between-{number}" for number in range(layers - 1)), "last")


@cache
def _core() -> ov.Core:
    """One for all graphs: a new one reads again what devices there are."""
    return ov.Core()


class Realise(Protocol):
    """Makes of a draft what is called. Threads call it side by side."""

    def __call__(self, name: str, draft: Draft) -> Graph: ...
