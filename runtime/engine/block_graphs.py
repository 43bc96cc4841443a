"""What lies between the attention of two layers, by kernels of ours over the blocks of a GGUF file.

For CPUs whose instructions OpenVINO multiplies only floats with. Rows are rounded to 8 bits in groups of 32, or of 256 where
weights come in blocks of 256, as llama.cpp rounds them.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from runtime.engine.block_lanes import KINDS
from runtime.engine.block_layers import BlockGraphs, prepare_layers
from runtime.engine.block_program import BlockDraft, BlockGraph, Columns, ProgramWriter, Space
from runtime.engine.configuration import attention_shape
from runtime.engine.exact import Claim, Ground
from runtime.engine.parts import Graphs, Keeper, Parts, RowGraph, graph_names
from runtime.engine.rotary import ExactRotary
from runtime.engine.row_attention import prepare_kernels
from runtime.engine.stored import Tally
from runtime.gguf_file import GgufFile, StoredRows
from runtime.gguf_model import stored_model
from runtime.slab_spec import SlabSpec

# The most rows in one call, so that a probe can try every count.
_MOST_ROWS = 128


class _ModelWriter:
    """Writes down the graphs of a model."""

    def __init__(self, model: Any, space: Space) -> None:
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
        draft = ProgramWriter(self.tally)
        # First, and alike in each graph: what one returns lies where the next finds it.
        hidden = draft.columns(self._config.hidden_size)
        attended = draft.columns(self._heads * self._head_dim)
        turn = [draft.columns(self._head_dim) for _ in range(2)]
        projected = [draft.columns(heads * self._head_dim, heads) for heads in (self._heads, *[self._kv_heads] * 2)]
        inputs, outputs = [hidden], [hidden]
        if before:
            inputs.insert(0, attended)
            self._mix(draft, before, attended, hidden)
        if after:
            inputs += turn
            self._project(draft, after, hidden, turn, projected)
            outputs = [*outputs, *projected] if before else projected
        else:
            outputs = [draft.norm(hidden, self._decoder.norm)]
        return draft.finished(self._space, inputs, outputs)

    def _mix(self, draft: ProgramWriter, layer: Any, attended: Columns, hidden: Columns) -> None:
        mlp = layer.mlp
        draft.add(hidden, *draft.multiply(attended, [layer.self_attn.o_proj]))
        normed = draft.norm(hidden, layer.post_attention_layernorm)
        gate, up = draft.multiply(normed, [mlp.gate_proj, mlp.up_proj])
        draft.gate(gate, up)
        draft.add(hidden, *draft.multiply(gate, [mlp.down_proj]))

    def _project(
        self, draft: ProgramWriter, layer: Any, hidden: Columns, turn: Sequence[Columns], projected: Sequence[Columns]
    ) -> None:
        attention = layer.self_attn
        normed = draft.norm(hidden, layer.input_layernorm)
        linears = [attention.q_proj, attention.k_proj, attention.v_proj]
        query, key, _ = draft.multiply(normed, linears, projected)
        for vectors, name in ((query, "q_norm"), (key, "k_norm")):
            if hasattr(attention, name):
                draft.norm(vectors, getattr(attention, name), vectors)
            draft.turn(vectors, *turn)

    def _logits(self) -> BlockDraft:
        draft = ProgramWriter(self.tally)
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
        self._space = Space(threads)

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

    def prepare(self, spec: SlabSpec) -> None:
        prepare_kernels(spec)
        prepare_layers(spec)

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
            self.graphs(graphs), embedding, ExactRotary(decoder.rotary_emb), weights_bytes, writing.tally.lines()
        )

    def graphs(self, named: Mapping[str, RowGraph]) -> Graphs:
        return BlockGraphs.of(named)

    def imported(self, mapped: mmap.mmap, facts: Mapping[str, Any]) -> BlockGraph:
        return BlockGraph(self._space, np.frombuffer(mapped, np.uint8), facts)


def knows_blocks(directory: Path) -> bool:
    """Whether there are kernels for every matrix of this GGUF file that rows are multiplied with. Raises ModelUnavailable."""
    return all(stored.kind in KINDS for stored in GgufFile.read(directory).matrices())
