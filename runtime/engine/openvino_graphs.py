"""A decoder's layers as compiled OpenVINO graphs, cut at attention over slabs.

Between the attention of one layer and that of the next lies one graph: the output projection, the MLP, and the projections,
norms and rotation of the next layer's queries and keys. All take rows, and any number of them.

Weights of 8 and 4 bits have a scale for each group of 32 in a row. Where the CPU sums products of bytes, OpenVINO rounds the
rows to 8 bits in the same groups, sums whole numbers inside a group, and adds the groups in order, which is what Q8_0 and Q4_0
of GGUF mean. Elsewhere it multiplies in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from runtime.engine.configuration import KEPT, attention_shape
from runtime.engine.openvino_compiling import CompiledDraft, Compiling, Shape
from runtime.engine.openvino_fit import GROUP
from runtime.engine.parts import Draft, Graphs, Keeper, RowGraph, graph_names
from runtime.engine.stored import Matrix, Tally, form_of, join, matrix_of, quantise
from runtime.foreign.openvino import ops, ov
from runtime.foreign.pages import page_out

_FLOAT = ov.Type.f32
# This many weights, and what is computed from them, fit into a core's cache.
_ROUNDED_AT_ONCE = 2**18
# So many layers at once are held twice.
MOST_AT_ONCE = 4
_TURN = ("cosines", "sines")
_OV_TYPES = {torch.bfloat16: ov.Type.bf16, torch.float16: ov.Type.f16, torch.float32: ov.Type.f32}


@contextmanager
def _on_one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True, slots=True)
class Built:
    """The graphs of a model, the bytes of their weights, and of each kind in a GGUF file what became of it."""

    graphs: Graphs
    weights_bytes: int
    tensors: tuple[str, ...]


def build(model: Any, compiling: Compiling, keeper: Keeper) -> Built:
    """The graphs of a model of transformers, whose layers are taken from it one by one, so that memory holds a few twice."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    layers = list(decoder.layers)
    decoder.layers = nn.ModuleList()
    makers: list[Callable[[_Builder], Draft]] = [
        lambda builder: builder.head(head),
        lambda builder: builder.first(layers[0]),
        *(partial(_between, layers, number) for number in range(len(layers) - 1)),
        lambda builder: builder.last(layers[-1], decoder.norm),
    ]

    def made(name: str, make: Callable[[_Builder], Draft]) -> tuple[RowGraph, _Builder]:
        builder = _Builder(model.config, compiling)
        return keeper.graph(name, make(builder)), builder

    graphs: dict[str, RowGraph] = {}
    weights_bytes, tally = 0, Tally()
    names = list(graph_names(len(layers)))
    # In parts that stay in its cache one core rounds weights as fast as memory gives them; several would wait for each other
    # after each of a dozen small steps.
    with _on_one_thread(), ThreadPoolExecutor(min(compiling.threads, MOST_AT_ONCE)) as pool:
        for number, (graph, builder) in enumerate(pool.map(made, names, makers)):
            graphs[names[number]] = graph
            weights_bytes += builder.weights_bytes
            tally.add_all(builder.tally)
            if number > 1:
                # The second graph of each layer, and its last.
                page_out(layers[number - 2].parameters())
                layers[number - 2] = None
    return Built(Graphs.of(graphs), weights_bytes, tally.lines())


def _between(layers: Sequence[Any], number: int, builder: _Builder) -> Draft:
    return builder.between(layers[number], layers[number + 1])


class _Builder:
    """Drafts one graph of a model, and counts the bytes of the weights that go into it."""

    def __init__(self, config: Any, compiling: Compiling) -> None:
        self._compiling = compiling
        self._heads, self._kv_heads, self._head_dim = attention_shape(config)
        self._widths = {
            "hidden": config.hidden_size,
            "attended": self._heads * self._head_dim,
            **dict.fromkeys(_TURN, self._head_dim),
        }
        self._groups: dict[str, int] = {}
        self.weights_bytes = 0
        self.tally = Tally()

    def first(self, layer: Any) -> Draft:
        def make(hidden: ov.Output, *turn: ov.Output) -> list[ov.Output]:
            return self._project(layer, hidden, turn)

        return self._graph(make, ["hidden", *_TURN])

    def between(self, before: Any, after: Any) -> Draft:
        def make(attended: ov.Output, hidden: ov.Output, *turn: ov.Output) -> list[ov.Output]:
            hidden = self._mix(before, attended, hidden)
            return [hidden, *self._project(after, hidden, turn)]

        return self._graph(make, ["attended", "hidden", *_TURN])

    def last(self, layer: Any, norm: Any) -> Draft:
        def make(attended: ov.Output, hidden: ov.Output) -> list[ov.Output]:
            return [self._norm(norm, self._mix(layer, attended, hidden))]

        return self._graph(make, ["attended", "hidden"])

    def head(self, linear: nn.Linear) -> Draft:
        """The head is held in 8 bits if the layers are in 4, because it decides between tokens."""
        weights = "int8" if self._compiling.weights == "int4" else self._compiling.weights
        return self._graph(lambda hidden: [self._times([linear], hidden, weights)], ["hidden"])

    def _graph(self, make: Callable[..., list[ov.Output]], names: Sequence[str]) -> Draft:
        widths = [self._widths[name] for name in names]
        inputs = [_out(ops.parameter(ov.PartialShape([-1, width]), _FLOAT)) for width in widths]
        outputs = make(*inputs)
        return CompiledDraft(
            ov.Model(outputs, [one.get_node() for one in inputs]), Shape(tuple(widths), self._groups), self._compiling
        )

    def _project(self, layer: Any, hidden: ov.Output, turn: Sequence[ov.Output]) -> list[ov.Output]:
        """Queries, keys and values [rows, heads, D] of a layer; queries and keys have been turned by their angles."""
        attention = layer.self_attn
        linears = [attention.q_proj, attention.k_proj, attention.v_proj]
        together = self._times(linears, self._norm(layer.input_layernorm, hidden))
        counts = (self._heads, self._kv_heads, self._kv_heads)
        lengths = _constant(np.array([count * self._head_dim for count in counts]))
        parts = ops.variadic_split(together, _constant(np.array(1)), lengths).outputs()
        query, key, value = (
            _out(ops.reshape(part, _constant(np.array([0, count, self._head_dim])), True))
            for part, count in zip(parts, counts, strict=True)
        )
        if hasattr(attention, "q_norm"):
            query, key = self._norm(attention.q_norm, query), self._norm(attention.k_norm, key)
        return [self._turn(query, turn), self._turn(key, turn), value]

    def _mix(self, layer: Any, attended: ov.Output, hidden: ov.Output) -> ov.Output:
        """The hidden rows after a layer, from its attention's output."""
        hidden = _out(ops.add(hidden, self._times([layer.self_attn.o_proj], attended)))
        mlp = layer.mlp
        normed = self._norm(layer.post_attention_layernorm, hidden)
        # Two products, for to split one takes as long as a tenth of it.
        gate, up = self._times([mlp.gate_proj], normed), self._times([mlp.up_proj], normed)
        return _out(ops.add(hidden, self._times([mlp.down_proj], _out(ops.multiply(ops.swish(gate), up)))))

    def _norm(self, norm: Any, rows: ov.Output) -> ov.Output:
        """The root mean square norm of the last axis (arXiv 1910.07467)."""
        mean = ops.reduce_mean(ops.multiply(rows, rows), _constant(np.array([-1])), True)
        root = ops.sqrt(ops.add(mean, _constant(np.array([norm.variance_epsilon], dtype=np.float32))))
        scale = norm.weight.detach().float().numpy()
        self.weights_bytes += norm.weight.numel() * norm.weight.itemsize
        return _out(
            ops.multiply(
                ops.multiply(rows, ops.divide(_constant(np.ones(1, dtype=np.float32)), root)), _constant(scale)
            )
        )

    def _times(self, linears: Sequence[nn.Linear], rows: ov.Output, weights: str | None = None) -> ov.Output:
        """The rows times several linears with the same input, as one product; the outputs lie side by side."""
        weights = weights or self._compiling.weights
        if weights == KEPT:
            product = self._times_stored(linears, rows)
        else:
            each = [linear.weight.detach() for linear in linears]
            weight = each[0] if len(each) == 1 else torch.cat(each)
            product = ops.matmul(rows, self._hold(weight, weights), False, True)
        biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
        self.weights_bytes += sum(bias.numel() * bias.itemsize for bias in biases)
        return _out(ops.add(product, _constant(torch.cat(biases).float().numpy())) if biases else product)

    def _times_stored(self, linears: Sequence[Any], rows: ov.Output) -> ov.Output:
        """The rows times linears whose weights stay as a GGUF file has them; those of one form as one product."""
        matrices: list[Matrix] = []
        for linear in linears:
            one = matrix_of(linear.stored, self.tally)
            if matrices and form_of(matrices[-1]) == form_of(one):
                matrices[-1] = join(matrices[-1], one)
            else:
                matrices.append(one)
        products = [self._times_matrix(one, rows) for one in matrices]
        return products[0] if len(products) == 1 else _out(ops.concat(products, 1))

    def _times_matrix(self, matrix: Matrix, rows: ov.Output) -> ov.Output:
        if isinstance(matrix, Tensor):
            return _out(ops.matmul(rows, self._plain(matrix), False, True))
        self._groups[form_of(matrix)] = matrix.group
        outputs, groups, group = matrix.steps.shape
        whole, scales = _room(outputs, groups, group, matrix.bits, _OV_TYPES[matrix.scales.dtype])
        _bytes_of(whole, outputs)[:] = _pack(matrix.steps, matrix.bits)
        scales.data[:] = matrix.scales.numpy()
        product = _out(ops.matmul(rows, self._scale(whole, scales), False, True))
        if matrix.offsets is None:
            return product
        self.weights_bytes += matrix.offsets.nbytes
        # The offset that a group's weights share is multiplied with the sum of the values that they meet.
        grouped = ops.reshape(rows, _constant(np.array([0, -1, matrix.group])), True)
        sums = ops.reduce_sum(grouped, _constant(np.array([2])), False)
        return _out(ops.add(product, ops.matmul(sums, _constant(matrix.offsets.numpy()), False, True)))

    def _turn(self, vectors: ov.Output, turn: Sequence[ov.Output]) -> ov.Output:
        """Vectors [rows, heads, D] turned by angles given as cosines and sines [rows, D]."""
        cosines, sines = (ops.unsqueeze(one, _constant(np.array(1))) for one in turn)
        low, high = ops.split(vectors, _constant(np.array(2)), 2).outputs()
        across = ops.concat([ops.negative(high), low], 2)
        return _out(ops.add(ops.multiply(vectors, cosines), ops.multiply(across, sines)))

    def _hold(self, weight: Tensor, weights: str) -> ov.Output:
        """A constant [outputs, inputs], as the graph reads it."""
        if weights == "none":
            return self._plain(weight.to(self._compiling.dtype))
        outputs, inputs = weight.shape
        bits = 8 if weights == "int8" else 4
        whole, scales = _room(outputs, inputs // GROUP, GROUP, bits, ov.Type.f16)
        at = 0
        # A whole head in float32, together with the result, would take several times the memory of the result.
        for part in weight.split(max(1, _ROUNDED_AT_ONCE // inputs)):
            steps, kept = quantise(part, weights)
            rows = slice(at, at + len(part))
            _bytes_of(whole, outputs)[rows] = _pack(steps, bits)
            scales.data[rows] = kept.numpy()
            at += len(part)
        return self._scale(whole, scales)

    def _plain(self, weight: Tensor) -> ov.Output:
        self.weights_bytes += weight.nbytes
        held = ov.Tensor(_OV_TYPES[weight.dtype], ov.Shape(weight.shape))
        _bytes_of(held, len(weight))[:] = weight.contiguous().view(torch.uint8).numpy()
        return _out(ops.convert(_share(held), _FLOAT))

    def _scale(self, whole: ov.Tensor, scales: ov.Tensor) -> ov.Output:
        """Weights [outputs, inputs] of whole numbers [outputs, groups, group], each times the scale of its group."""
        self.weights_bytes += whole.byte_size + scales.byte_size
        outputs, groups, group = whole.shape
        scaled = ops.multiply(ops.convert(_share(whole), scales.element_type), _share(scales))
        flat = ops.reshape(scaled, _constant(np.array([outputs, groups * group])), False)
        return _out(ops.convert(flat, _FLOAT))


def _room(outputs: int, groups: int, group: int, bits: int, kind: ov.Type) -> tuple[ov.Tensor, ov.Tensor]:
    """Memory for whole numbers of `bits` bits, and for the scales of their groups."""
    whole = ov.Tensor(ov.Type.i8 if bits == 8 else ov.Type.i4, ov.Shape([outputs, groups, group]))
    return whole, ov.Tensor(kind, ov.Shape([outputs, groups, 1]))


def _pack(steps: Tensor, bits: int) -> Any:
    """Whole numbers as a graph holds them, bytes [outputs, any]: as they are, or two of 4 bits in each."""
    whole = steps.flatten(1).view(torch.uint8)
    if bits == 8:
        return whole.numpy()
    pairs = whole.bitwise_and(0xF).unflatten(1, (-1, 2))
    return (pairs[..., 0] | (pairs[..., 1] << 4)).numpy()


def _bytes_of(tensor: ov.Tensor, rows: int) -> Any:
    """The memory of a tensor, whatever its type, as bytes [rows, any]."""
    return tensor.data.reshape(-1).view(np.uint8).reshape(rows, -1)


def _share(tensor: ov.Tensor) -> Any:
    return ops.constant(tensor, shared_memory=True)


def _constant(values: Any) -> Any:
    return ops.constant(values)


def _out(node: Any) -> ov.Output:
    return node if isinstance(node, ov.Output) else node.output(0)
