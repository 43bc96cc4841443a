"""Attention of a row batch over slabs, in the place where transformers calls its attention function.

Every token attends to the `sink` first tokens and the `window` most recent, itself included, as of its own position
(attention sinks: arXiv 2309.17453). The distance to a sink never exceeds `sink + window - 1`, the longest inside the
window, so the model meets no distance that the window does not have.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from runtime.engine.rotary import ExactRotary, rotate
from runtime.rows import Piece, RowBatch
from runtime.slab import SlabSpec

ATTENTION_NAME = "perennial_slab"


@dataclass(frozen=True, slots=True)
class PiecePlan:
    """What one piece needs in every layer, worked out once a forward."""

    piece: Piece
    end: int
    slots: Tensor  # [N], where the piece's own keys and values go
    queries: slice  # of the forward's queries; the piece's last row is repeated up to a proven size
    hidden: Tensor  # [Q * size, extent], 0 where the query sees the slot, else -inf


@dataclass(frozen=True, slots=True)
class ForwardPlan:
    """The pieces, and what is done for the queries of all of them at once."""

    pieces: tuple[PiecePlan, ...]
    rows: Tensor  # [queries], the row of the batch that each query is
    sink_turn: tuple[Tensor, Tensor] | None  # cosines and sines [queries, D] that bring a query within reach


def plan_forward(batch: RowBatch, sizes: tuple[int, ...], rotary: ExactRotary, heads: int) -> ForwardPlan:
    """The plan of a batch, for a model of that many query `heads`.

    Queries of a piece are padded to the next of `sizes`, for which kernels agree in bits.
    """
    pieces = batch.pieces()
    spec = batch.rows[0].slab.spec
    row_of: list[int] = []
    queries = []
    for piece in pieces:
        begin, count = len(row_of), piece.stop - piece.start
        row_of += [*range(piece.start, piece.stop), *[piece.stop - 1] * (padded(count, sizes) - count)]
        queries.append(slice(begin, len(row_of)))
    rows = torch.tensor(row_of, device=spec.device)
    positions = torch.tensor([row.position for row in batch.rows], device=spec.device)
    visible = spec.visible_slots(positions, max(piece.extent for piece in pieces))
    hidden = torch.zeros(visible.shape, dtype=spec.dtype, device=spec.device).masked_fill_(~visible, float("-inf"))
    hidden = hidden.index_select(0, rows)
    slots = torch.tensor([spec.slot(row.position) for row in batch.rows], device=spec.device)
    sink_turn = None
    if spec.sink and any(piece.is_past_window for piece in pieces):
        cosines, sines = rotary.turn((spec.visible - 1 - positions.index_select(0, rows)).clamp(max=0))
        sink_turn = cosines.to(spec.dtype), sines.to(spec.dtype)
    return ForwardPlan(
        pieces=tuple(
            PiecePlan(
                piece=piece,
                end=batch.rows[piece.stop - 1].position + 1,
                slots=slots[piece.start : piece.stop],
                queries=mine,
                hidden=hidden[mine, : piece.extent].repeat(heads // spec.kv_heads, 1),
            )
            for piece, mine in zip(pieces, queries, strict=True)
        ),
        rows=rows,
        sink_turn=sink_turn,
    )


class AttentionAlone:
    """A model that is nothing but attention over slabs, of random queries, keys and values for each token.

    What linears round away, its output still shows.
    """

    tokens = 64

    def __init__(self, spec: SlabSpec, heads: int, rotary: ExactRotary, sizes: tuple[int, ...]) -> None:
        self._spec, self._heads, self._rotary, self._sizes = spec, heads, rotary, sizes
        generator = torch.Generator().manual_seed(1)
        parts = heads + 2 * spec.kv_heads
        self._table = torch.randn(self.tokens, parts, spec.head_dim, generator=generator).to(spec.device, spec.dtype)
        self._layer = nn.Module()
        self._layer.layer_idx = 0  # type: ignore[assignment]

    @torch.inference_mode()
    def logits(self, batch: RowBatch) -> Tensor:
        """What each row with `draw` attends to, [rows, Q*G*D]."""
        plan = plan_forward(batch, self._sizes, self._rotary, self._heads)
        parts = self._table[[row.token_id for row in batch.rows]].transpose(0, 1).unsqueeze(0)
        query, key, value = parts.split((self._heads, self._spec.kv_heads, self._spec.kv_heads), dim=1)
        attended, _ = slab_attention(self._layer, query, key, value, None, scaling=self._spec.head_dim**-0.5, plan=plan)
        return attended[0].flatten(1)[[index for index, row in enumerate(batch.rows) if row.draw is not None]]


def padded(count: int, sizes: tuple[int, ...]) -> int:
    """The least of the ascending `sizes` that is `count` or more."""
    return sizes[bisect_left(sizes, count)]


def slab_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    plan: ForwardPlan,
    **_: Any,
) -> tuple[Tensor, None]:
    """Writes `key`, `value` [1, G, rows, D] into the slabs of `plan`, then attends `query` [1, G*Q, rows, D] over them.

    Returns [1, rows, G*Q, D]; rows that belong to no piece come back as zeros.
    """
    layer = module.layer_idx
    assert isinstance(layer, int)
    heads, rows, head_dim = query.shape[1:]
    groups = key.shape[1]
    queries = query[0].index_select(1, plan.rows)
    turned = rotate(queries, *plan.sink_turn) if plan.sink_turn else None

    def grouped(some: Tensor, piece_plan: PiecePlan) -> Tensor:
        return some[:, piece_plan.queries].reshape(groups, -1, head_dim)

    attended = []
    for piece_plan in plan.pieces:
        piece = piece_plan.piece
        inside = slice(piece.start, piece.stop)
        piece.slab.write(layer, piece_plan.slots, piece_plan.end, key[0, :, inside], value[0, :, inside])
        to_sink = None if turned is None or not piece.is_past_window else grouped(turned, piece_plan)
        output = _attend(grouped(queries, piece_plan), to_sink, layer, piece_plan, scaling)
        attended.append(output.view(heads, -1, head_dim)[:, : piece.stop - piece.start])
    attended.append(query.new_zeros(heads, rows - plan.pieces[-1].piece.stop, head_dim))
    return torch.cat(attended, dim=1).transpose(0, 1).unsqueeze(0), None


def _attend(query: Tensor, to_sink: Tensor | None, layer: int, plan: PiecePlan, scaling: float) -> Tensor:
    """Softmax attention of `query` [G, Q*size, D] over the piece's extent, in explicit steps: fused kernels tile by count.

    `to_sink` is the query as the sink's keys are to meet it, where that is not the same.
    """
    slab, extent, hidden = plan.piece.slab, plan.piece.extent, plan.hidden
    sink = slab.spec.sink
    keys, values = slab.keys[layer, :, :extent], slab.values[layer, :, :extent]  # [G, extent, D]
    scores = torch.baddbmm(hidden, query, keys.transpose(1, 2), alpha=scaling)
    if to_sink is not None:
        scores[..., :sink] = torch.baddbmm(hidden[:, :sink], to_sink, keys[:, :sink].transpose(1, 2), alpha=scaling)
    shares = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.bmm(shares, values)
