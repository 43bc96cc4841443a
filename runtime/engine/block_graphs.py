"""What lies between the attention of two layers, by kernels of ours over the blocks of a GGUF file.

For CPUs whose instructions OpenVINO multiplies only floats with. Rows are rounded to 8 bits in groups of 32, or of 256 where
weights come in blocks of 256, as llama.cpp rounds them.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from runtime.engine.block_kernel import CLAIMED, STEP, Operation, run_program
from runtime.engine.block_lanes import KINDS, SIDE_BY_SIDE, SMALL_GROUP, side_by_side
from runtime.engine.configuration import attention_shape
from runtime.engine.crew import Crew
from runtime.engine.exact import Claim, Ground
from runtime.engine.parts import Graphs, Keeper, Parts, RowGraph, graph_names
from runtime.engine.rotary import ExactRotary
from runtime.engine.stored import Tally
from runtime.gguf_file import GgufFile, StoredRows, StoredTensor
from runtime.gguf_model import stored_model

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
# The most rows in one call, so that a probe can try every count.
_MOST_ROWS = 128


@dataclass(frozen=True, slots=True)
class _Columns:
    """Columns of the space that rows lie in: one vector, or one for each of some heads."""

    at: int
    width: int
    heads: int = 0

    @property
    def vectors(self) -> int:
        return self.heads or 1


class _Space:
    """Memory for rows while a graph works on them, that of one graph at a time, and the threads that do."""

    def __init__(self, threads: int) -> None:
        self._crew = Crew(threads)
        self.release()

    def release(self) -> None:
        self._rows = np.empty(0, np.float32)
        self._rounded = memory_for_rounded(0)

    def rows(self, count: int, columns: int) -> Any:
        """[count * columns] float32, which may have what was there before."""
        if self._rows.size < count * columns:
            self._rows = np.empty(count * columns, np.float32)
        return self._rows

    def run(self, program: Any, blocks: Any, constants: Any, rows: int, widest: int, threads: int) -> None:
        """Runs a program on `rows`, in none of whose steps more than `widest` numbers of a row are rounded."""
        if self._rounded[0].size < rows * widest:
            self._rounded = memory_for_rounded(rows * widest)
        counters = np.zeros(2 * len(program), np.int64)
        work = partial(run_program, program, blocks, constants, self._rows, self._rounded, rows, counters)
        self._crew.run(work, threads)


def memory_for_rounded(numbers: int) -> tuple[Any, ...]:
    """Memory for so many numbers of rows, as `round_row` writes them."""
    kinds = (np.int8, 1), (np.float32, SMALL_GROUP), (np.int16, 16), (np.int32, SMALL_GROUP), (np.float32, SMALL_GROUP)
    return tuple(np.empty(numbers // each, kind) for kind, each in kinds)


class _ProgramWriter:
    """A graph's program while it is written down."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._steps: list[dict[str, Any]] = []
        self._blocks: list[Any] = []
        self._constants: list[Any] = []
        self._columns = self._bytes = self._numbers = 0
        self._kinds: set[str] = set()

    def columns(self, width: int, heads: int = 0) -> _Columns:
        at = self._columns
        self._columns += width
        return _Columns(at, width, heads)

    def norm(self, source: _Columns, norm: Any, target: _Columns | None = None) -> _Columns:
        """The root mean square norm of each vector."""
        target = target or self.columns(source.width, source.heads)
        weight = self._constant(norm.weight)
        places = {"source": source.at, "target": target.at, "weight": weight}
        self._step(Operation.NORM, source.width, **places, epsilon=norm.variance_epsilon, count=source.vectors)
        return target

    def multiply(self, source: _Columns, linears: Sequence[Any], heads: Sequence[int] = ()) -> list[_Columns]:
        """What linears that take the same rows make of them."""
        targets = []
        rounded_for = 0
        for linear, count in zip(linears, heads or [0] * len(linears), strict=True):
            group = GGML_QUANT_SIZES[linear.stored.kind][0]
            if group != rounded_for:
                self._step(Operation.ROUND, source.width, source=source.at, group=group)
                rounded_for = group
            targets.append(self._multiply(source, linear, count))
        return targets

    def _multiply(self, source: _Columns, linear: Any, heads: int) -> _Columns:
        stored: StoredTensor = linear.stored
        self._tally.add(stored, _FORMS[stored.kind], stored.nbytes)
        self._kinds.add(stored.kind.name)
        target = self.columns(stored.shape[0], heads)
        row_bytes = stored.nbytes // target.width
        where = {"kind": int(stored.kind), "weight": self._bytes, "row_bytes": row_bytes}
        self._step(Operation.MULTIPLY, source.width, target=target.at, **where, outputs=target.width)
        self._blocks.append(side_by_side(stored.kind, stored.read()))
        self._bytes += stored.nbytes
        if linear.bias is not None:
            self._step(Operation.BIAS, target.width, target=target.at, weight=self._constant(linear.bias))
        return target

    def add(self, target: _Columns, source: _Columns) -> None:
        self._step(Operation.ADD, target.width, source=source.at, target=target.at)

    def gate(self, target: _Columns, other: _Columns) -> None:
        self._step(Operation.GATE, target.width, target=target.at, other=other.at)

    def turn(self, target: _Columns, cosines: _Columns, sines: _Columns) -> None:
        angles = {"source": cosines.at, "other": sines.at}
        self._step(Operation.TURN, target.width, target=target.at, **angles, count=target.vectors)

    def finished(self, space: _Space, inputs: Sequence[_Columns], outputs: Sequence[_Columns]) -> BlockDraft:
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

    space: _Space
    weights: Any
    facts: Mapping[str, Any]

    def in_memory(self) -> BlockGraph:
        return BlockGraph(self.space, self.weights, self.facts)

    def exported(self) -> tuple[memoryview, Mapping[str, Any]]:
        return self.weights.data, self.facts


class BlockGraph(RowGraph):
    """A program for rows, with its weights: blocks, and then constants."""

    def __init__(self, space: _Space, weights: Any, facts: Mapping[str, Any]) -> None:
        """Raises LookupError, TypeError or ValueError for facts of something else."""
        self._inputs, self._outputs = ([_Columns(*one) for one in facts[name]] for name in ("inputs", "outputs"))
        super().__init__([one.width for one in self._inputs], facts["kinds"], 1)
        self._space, self._columns = space, facts["columns"]
        self._program = np.array([tuple(step) for step in facts["program"]], STEP)
        self._blocks, self._constants = weights[: facts["blocks"]], weights[facts["blocks"] :].view(np.float32)
        self._widest, self._outputs_at_most = (int(self._program[name].max()) for name in ("width", "outputs"))

    def run(self, *given: Any) -> list[Any]:
        count = len(given[0])
        rows = self._space.rows(count, self._columns)

        def lying(columns: _Columns) -> Any:
            return rows[columns.at * count : (columns.at + columns.width) * count]

        for columns, one in zip(self._inputs, given, strict=True):
            lying(columns)[:] = one.reshape(-1)
        threads = max(count, self._outputs_at_most // CLAIMED)
        self._space.run(self._program, self._blocks, self._constants, count, self._widest, threads)
        return [lying(one).reshape((count, one.heads, -1) if one.heads else (count, -1)) for one in self._outputs]

    def release(self) -> None:
        self._space.release()

    @staticmethod
    def given(rows: Tensor) -> Any:
        return rows.contiguous().numpy()

    @staticmethod
    def taken(returned: Any) -> Tensor:
        return torch.from_numpy(returned)


class _ModelWriter:
    """Writes down the graphs of a model."""

    def __init__(self, model: Any, space: _Space) -> None:
        self._config, self._decoder, self._head = model.config, model.get_decoder(), model.get_output_embeddings()
        self._heads, self._kv_heads, self._head_dim = attention_shape(model.config)
        self._space = space
        self.tally = Tally()

    def drafts(self) -> Iterator[BlockDraft]:
        """Those of the graphs that `graph_names` names, in that order."""
        layers = list(self._decoder.layers)
        yield self._logits()
        for pair in pairwise([None, *layers, None]):
            yield self._graph(*pair)

    def _graph(self, before: Any, after: Any) -> BlockDraft:
        """What follows the attention of one layer, up to that of the next."""
        draft = _ProgramWriter(self.tally)
        # First in each graph: those that the last graph returned lie here, and what else is given must not be written over them.
        hidden = draft.columns(self._config.hidden_size)
        inputs, outputs = [hidden], [hidden]
        if before:
            attended = draft.columns(self._heads * self._head_dim)
            inputs.insert(0, attended)
            self._mix(draft, before, attended, hidden)
        if after:
            turn = draft.columns(self._head_dim), draft.columns(self._head_dim)
            inputs += turn
            projected = self._project(draft, after, hidden, turn)
            outputs = [*outputs, *projected] if before else projected
        else:
            outputs = [draft.norm(hidden, self._decoder.norm)]
        return draft.finished(self._space, inputs, outputs)

    def _mix(self, draft: _ProgramWriter, layer: Any, attended: _Columns, hidden: _Columns) -> None:
        mlp = layer.mlp
        draft.add(hidden, *draft.multiply(attended, [layer.self_attn.o_proj]))
        normed = draft.norm(hidden, layer.post_attention_layernorm)
        gate, up = draft.multiply(normed, [mlp.gate_proj, mlp.up_proj])
        draft.gate(gate, up)
        draft.add(hidden, *draft.multiply(gate, [mlp.down_proj]))

    def _project(
        self, draft: _ProgramWriter, layer: Any, hidden: _Columns, turn: tuple[_Columns, _Columns]
    ) -> list[_Columns]:
        attention = layer.self_attn
        normed = draft.norm(hidden, layer.input_layernorm)
        linears = [attention.q_proj, attention.k_proj, attention.v_proj]
        query, key, value = draft.multiply(normed, linears, (self._heads, self._kv_heads, self._kv_heads))
        for vectors, name in ((query, "q_norm"), (key, "k_norm")):
            if hasattr(attention, name):
                draft.norm(vectors, getattr(attention, name), vectors)
            draft.turn(vectors, *turn)
        return [query, key, value]

    def _logits(self) -> BlockDraft:
        draft = _ProgramWriter(self.tally)
        rows = draft.columns(self._config.hidden_size)
        return draft.finished(self._space, [rows], draft.multiply(rows, [self._head]))


class InBlocks:
    """Parts whose weights stay in the blocks of a GGUF file."""

    # The number is another one whenever bits are others.
    library = "rows by blocks 1"
    form = "blocks"
    row_counts = range(1, _MOST_ROWS + 1)
    held_share = 1.0
    unkept = "each load lays out the weights again"

    def __init__(self, threads: int) -> None:
        self.way = f"{self.library}, {threads} threads"
        self._space = _Space(threads)

    @property
    def claims(self) -> tuple[Claim, ...]:
        rest = (
            Claim(part, "kernels of ours, a row at a time", Ground.ROW_BY_ROW)
            for part in ("norms", "activations, rotation")
        )
        form = "kernels of ours, rows in 8 bits, groups added in order"
        return Claim("linears", form, Ground.WHOLE_NUMBERS), *rest

    def needed_bytes(self, directory: Path, weights: int) -> int:
        return directory.stat().st_size

    def parts(self, directory: Path, keeper: Keeper) -> Parts:
        model = stored_model(directory)
        decoder = model.get_decoder()
        writing = _ModelWriter(model, self._space)
        names = graph_names(len(decoder.layers))
        graphs: dict[str, RowGraph] = {}
        weights_bytes = 0
        for name, draft in zip(names, writing.drafts(), strict=True):
            graphs[name] = keeper.graph(name, draft)
            weights_bytes += draft.weights.nbytes
            # Otherwise a head would be in memory while the next graph is written down.
            del draft
        embedding = StoredRows(decoder.embed_tokens.stored)
        weights_bytes += embedding.nbytes
        return Parts(
            Graphs.of(graphs), embedding, ExactRotary(decoder.rotary_emb), weights_bytes, writing.tally.lines()
        )

    def imported(self, mapped: mmap.mmap, facts: Mapping[str, Any]) -> BlockGraph:
        return BlockGraph(self._space, np.frombuffer(mapped, np.uint8), facts)


def knows_blocks(directory: Path) -> bool:
    """Whether there are kernels for every matrix of this GGUF file. Raises ModelUnavailable."""
    matrices = (stored for stored in GgufFile.read(directory).weights().values() if len(stored.shape) > 1)
    return all(stored.kind in KINDS and stored.shape[0] % SIDE_BY_SIDE == 0 for stored in matrices)
