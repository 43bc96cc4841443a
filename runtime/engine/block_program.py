"""Graphs as programs: steps on rows that all threads run together, with the weights that they need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from runtime.engine.block_kernel import CLAIMED, STEP, Operation, run_program
from runtime.engine.block_lanes import SMALL_GROUP, side_by_side
from runtime.engine.block_tile import SIDE_BY_SIDE
from runtime.engine.crew import Crew
from runtime.engine.parts import RowGraph
from runtime.engine.stored import Tally
from runtime.gguf_file import StoredTensor

_FORMS = {
    Kind.Q8_0: "8 bits with a scale in float16 for each 32",
    Kind.Q4_0: "4 bits with a scale in float16 for each 32",
    Kind.Q4_1: "4 bits with a scale in float16 and an offset for each 32",
    Kind.Q5_0: "5 bits with a scale in float16 for each 32",
    Kind.Q5_1: "5 bits with a scale in float16 and an offset for each 32",
    Kind.Q4_K: "4 bits with a scale of 6 bits and an offset for each 32",
    Kind.Q5_K: "5 bits with a scale of 6 bits and an offset for each 32",
    Kind.Q6_K: "6 bits with a scale of 8 bits for each 16",
}


@dataclass(frozen=True, slots=True)
class Columns:
    """Columns of the space that rows lie in: one vector, or one for each of some heads. The last few may be `filling`."""

    at: int
    width: int
    heads: int = 0
    filling: int = 0

    @property
    def vectors(self) -> int:
        return self.heads or 1

    def of(self, memory: Any, count: int) -> Any:
        """What these are of so many rows, [count, width - filling], or [count, heads, width of each]."""
        lying = memory[self.at * count : (self.at + self.width) * count]
        return (
            lying.reshape(count, self.heads, -1)
            if self.heads
            else lying.reshape(count, -1)[:, : self.width - self.filling]
        )


class Space:
    """Memory for rows while a graph works on them, that of one graph at a time, and the threads that do."""

    def __init__(self, threads: int) -> None:
        self.crew, self.threads = Crew(threads), threads
        self.release()

    def release(self) -> None:
        self._rows = np.empty(0, np.float32)
        self._rounded = memory_for_rounded(0)

    def memory(self, count: int, columns: int) -> Any:
        """[count * columns] float32, which may have what was there before."""
        if self._rows.size < count * columns:
            self._rows = np.empty(count * columns, np.float32)
        return self._rows

    def rounded(self, numbers: int) -> tuple[Any, ...]:
        """Memory for so many numbers of rows, as `round_row` writes them."""
        if self._rounded[0].size < numbers:
            self._rounded = memory_for_rounded(numbers)
        return self._rounded


def memory_for_rounded(numbers: int) -> tuple[Any, ...]:
    """Memory for so many numbers of rows, as `round_row` writes them."""
    kinds = (np.int8, 1), (np.float32, SMALL_GROUP), (np.int16, 16), (np.int32, SMALL_GROUP), (np.float32, SMALL_GROUP)
    return tuple(np.empty(numbers // each, kind) for kind, each in kinds)


class ProgramWriter:
    """A graph's program while it is written down."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._steps: list[dict[str, Any]] = []
        self._blocks: list[Any] = []
        self._constants: list[Any] = []
        self._columns = self._bytes = self._numbers = 0
        self._kinds: set[str] = set()

    def columns(self, width: int, heads: int = 0, filling: int = 0) -> Columns:
        at = self._columns
        self._columns += width
        return Columns(at, width, heads, filling)

    def norm(self, source: Columns, norm: Any, target: Columns | None = None) -> Columns:
        """The root mean square norm of each vector."""
        target = target or self.columns(source.width, source.heads)
        weight = self._constant(norm.weight)
        places = {"source": source.at, "target": target.at, "weight": weight}
        self._step(Operation.NORM, source.width, **places, epsilon=norm.variance_epsilon, count=source.vectors)
        return target

    def multiply(
        self, source: Columns, linears: Sequence[Any], targets: Sequence[Columns | None] | None = None
    ) -> list[Columns]:
        """What linears that take the same rows make of them."""
        made = []
        rounded_for = 0
        for linear, target in zip(linears, targets or [None] * len(linears), strict=True):
            group = GGML_QUANT_SIZES[linear.stored.kind][0]
            if group != rounded_for:
                self._step(Operation.ROUND, source.width, source=source.at, group=group)
                rounded_for = group
            made.append(self._multiply(source, linear, target))
        return made

    def _multiply(self, source: Columns, linear: Any, target: Columns | None) -> Columns:
        stored: StoredTensor = linear.stored
        outputs = stored.shape[0]
        if target is None:
            filling = -outputs % SIDE_BY_SIDE
            target = self.columns(outputs + filling, filling=filling)
        self._tally.add(stored, _FORMS[stored.kind], stored.nbytes)
        self._kinds.add(stored.kind.name)
        row_bytes = stored.nbytes // outputs
        where = {"kind": int(stored.kind), "weight": self._bytes, "row_bytes": row_bytes}
        self._step(Operation.MULTIPLY, source.width, target=target.at, **where, outputs=target.width)
        self._blocks.append(side_by_side(stored.kind, stored.read()))
        self._bytes += row_bytes * target.width
        if linear.bias is not None:
            # Rows of constants are added 16 numbers at a time.
            assert not target.filling
            self._step(Operation.BIAS, target.width, target=target.at, weight=self._constant(linear.bias))
        return target

    def add(self, target: Columns, source: Columns) -> None:
        self._step(Operation.ADD, target.width, source=source.at, target=target.at)

    def gate(self, target: Columns, other: Columns) -> None:
        self._step(Operation.GATE, target.width, target=target.at, other=other.at)

    def turn(self, target: Columns, cosines: Columns, sines: Columns) -> None:
        angles = {"source": cosines.at, "other": sines.at}
        self._step(Operation.TURN, target.width, target=target.at, **angles, count=target.vectors)

    def finished(self, space: Space, inputs: Sequence[Columns], outputs: Sequence[Columns]) -> BlockDraft:
        program = np.zeros(len(self._steps), STEP)
        for number, step in enumerate(self._steps):
            for name, value in step.items():
                program[number][name] = value
        parts = [*self._blocks, *(one.view(np.uint8) for one in self._constants)]
        facts = {
            "program": program.tolist(),
            "blocks": self._bytes,
            "columns": self._columns,
            "inputs": [astuple(one) for one in inputs],
            "outputs": [astuple(one) for one in outputs],
            "kinds": sorted(self._kinds),
        }
        return BlockDraft(space, np.concatenate(parts), facts)

    def _constant(self, values: Tensor) -> int:
        at = self._numbers
        self._constants.append(values.detach().float().numpy().reshape(-1))
        self._numbers += values.numel()
        return at

    def _step(self, operation: Operation, width: int, **more: Any) -> None:
        self._steps.append({"operation": operation, "width": width, **more})


@dataclass(frozen=True, slots=True)
class BlockDraft:
    """A graph's weights, and all else of it as facts."""

    space: Space
    weights: Any
    facts: Mapping[str, Any]

    def in_memory(self) -> BlockGraph:
        return BlockGraph(self.space, self.weights, self.facts)

    def exported(self) -> tuple[memoryview, Mapping[str, Any]]:
        return self.weights.data, self.facts


class BlockGraph(RowGraph):
    """A program for rows, with its weights: blocks, and then constants."""

    def __init__(self, space: Space, weights: Any, facts: Mapping[str, Any]) -> None:
        """Raises LookupError, TypeError or ValueError for facts of something else."""
        self.inputs, self.outputs = ([Columns(*one) for one in facts[name]] for name in ("inputs", "outputs"))
        super().__init__([one.width for one in self.inputs], facts["kinds"], 1)
        self.space, self.columns = space, facts["columns"]
        self.program = np.array([tuple(step) for step in facts["program"]], STEP)
        # Both lie in here, and only as long as this does.
        self._weights = weights
        blocks, constants = weights[: facts["blocks"]], weights[facts["blocks"] :].view(np.float32)
        places = (blocks.ctypes.data, blocks.size, constants.ctypes.data, constants.size)
        self.places = np.array(places, np.int64)
        self.widest, self._outputs_at_most = (int(self.program[name].max()) for name in ("width", "outputs"))

    def run(self, *given: Any) -> list[Any]:
        count = len(given[0])
        memory = self.space.memory(count, self.columns)
        for columns, one in zip(self.inputs, given, strict=True):
            columns.of(memory, count)[:] = one
        rounded = self.space.rounded(count * self.widest)
        steps = len(self.program)
        where = (self.program, 0, steps, self.places, memory, rounded, count, np.zeros(2 * steps, np.int64))
        self.space.crew.run(partial(run_program, *where), max(count, self._outputs_at_most // CLAIMED))
        return [columns.of(memory, count) for columns in self.outputs]

    def release(self) -> None:
        self.space.release()

    @staticmethod
    def given(rows: Tensor) -> Any:
        return rows.contiguous().numpy()

    @staticmethod
    def taken(returned: Any) -> Tensor:
        return torch.from_numpy(returned)
