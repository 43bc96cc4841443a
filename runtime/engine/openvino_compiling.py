"""OpenVINO's graphs from a draft to what is called: compiled here, or imported from what one was exported to."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runtime.bundles import let_go
from runtime.engine.machine import sums_bytes
from runtime.engine.openvino_fit import GROUP
from runtime.engine.parts import RowGraph
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
class CompiledDraft:
    """A graph that is still to be compiled."""

    model: ov.Model
    shape: Shape
    compiling: Compiling

    def in_memory(self) -> Graph:
        """OpenVINO keeps its constants beside what its kernels pack of them."""
        return Graph(self._compiled(), self.shape, self.compiling)

    def exported(self) -> tuple[memoryview, Mapping[str, Any]]:
        shape = self.shape
        return self._compiled().export_model().getbuffer(), {"widths": shape.widths, "groups": shape.groups}

    def _compiled(self) -> ov.CompiledModel:
        return _core().compile_model(self.model, "CPU", self.compiling.properties(self.shape.group))


class Graph(RowGraph):
    """A compiled graph. Its next call overwrites what it returned."""

    def __init__(
        self, compiled: ov.CompiledModel, shape: Shape, compiling: Compiling, mapped: mmap.mmap | None = None
    ) -> None:
        """`mapped` is what its constants lie in."""
        super().__init__(shape.widths, tuple(shape.groups), compiling.row_counts.start)
        self.is_imported = mapped is not None
        self._mapped = mapped
        self._compiled = compiled
        self._request = compiled.create_infer_request()
        self._outputs = len(compiled.outputs)

    @classmethod
    def imported(cls, mapped: mmap.mmap, facts: Mapping[str, Any], compiling: Compiling) -> Graph:
        """The graph that was exported to `mapped`, of which what its kernels pack stays in memory alone.

        They pack weights at their first product in each layout, and read them no more.

        Raises LookupError, TypeError or RuntimeError where it is no such graph.
        """
        shape = Shape(tuple(facts["widths"]), facts["groups"])
        exported = ov.Tensor(np.frombuffer(mapped, np.uint8), shared_memory=True)
        graph = cls(_core().import_model(exported, "CPU", compiling.properties(shape.group)), shape, compiling, mapped)
        for count in compiling.layouts:
            graph.of_rows(torch.zeros(count, sum(shape.widths)))
        let_go(mapped)
        return graph

    def run(self, *given: ov.Tensor) -> list[ov.Tensor]:
        for place, tensor in enumerate(given):
            self._request.set_input_tensor(place, tensor)
        self._request.infer()
        return [self._request.get_output_tensor(place) for place in range(self._outputs)]

    @staticmethod
    def given(rows: Tensor) -> ov.Tensor:
        return ov.Tensor(rows.numpy(), shared_memory=True)

    @staticmethod
    def taken(returned: ov.Tensor) -> Tensor:
        return torch.from_numpy(returned.data)

    def release(self) -> None:
        self._compiled.release_memory()


@cache
def _core() -> ov.Core:
    """One for all graphs: a new one reads again what devices there are."""
    return ov.Core()
