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

ATTENTION_NAME = "perennial_slab"


@dataclass(frozen=True, slots=True)
class PiecePlan:
    """What one piece needs in every layer, worked out once a forward."""

    piece: Piece
    end: int
    slots: Tensor  # [N], where the piece's own keys and values go
    queries: Tensor  # [size], rows of the batch, the last one repeated up to a proven size
    hidden: Tensor  # [size, extent], 0 where the query sees the slot, else -inf
    sink_turn: tuple[Tensor, Tensor] | None  # cosines and sines [size, D] that bring the query within reach


@dataclass(frozen=True, slots=True)
class ForwardPlan:
    pieces: tuple[PiecePlan, ...]


def plan_forward(batch: RowBatch, sizes: tuple[int, ...], rotary: ExactRotary) -> ForwardPlan:
    """The plan of a batch. Queries of a piece are padded to the next of `sizes`, for which kernels agree in bits."""
    return ForwardPlan(tuple(_plan_piece(piece, batch, sizes, rotary) for piece in batch.pieces()))


def padded(count: int, sizes: tuple[int, ...]) -> int:
    """The least of the ascending `sizes` that is `count` or more."""
    return sizes[bisect_left(sizes, count)]


def _plan_piece(piece: Piece, batch: RowBatch, sizes: tuple[int, ...], rotary: ExactRotary) -> PiecePlan:
    spec = piece.slab.spec
    rows = batch.rows[piece.start : piece.stop]
    filler = padded(len(rows), sizes) - len(rows)
    positions = [row.position for row in rows]
    query_positions = torch.tensor(positions + positions[-1:] * filler, device=spec.device)
    visible = spec.visible_slots(query_positions, piece.extent)
    hidden = torch.zeros(visible.shape, device=spec.device).masked_fill_(~visible, float("-inf"))
    sink_turn = None
    if piece.is_past_window and spec.sink:
        cosines, sines = rotary.turn(spec.visible - 1 - query_positions)
        sink_turn = cosines.to(spec.dtype), sines.to(spec.dtype)
    return PiecePlan(
        piece=piece,
        end=positions[-1] + 1,
        slots=torch.tensor([spec.slot(position) for position in positions], device=spec.device),
        queries=torch.tensor([*range(piece.start, piece.stop), *[piece.stop - 1] * filler], device=spec.device),
        hidden=hidden,
        sink_turn=sink_turn,
    )


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
    attended = query.new_zeros(rows, heads, head_dim)
    for piece_plan in plan.pieces:
        piece = piece_plan.piece
        inside = slice(piece.start, piece.stop)
        piece.slab.write(layer, piece_plan.slots, piece_plan.end, key[0, :, inside], value[0, :, inside])
        output = _attend(query[0].index_select(1, piece_plan.queries), layer, piece_plan, scaling)
        attended[inside] = output[:, : piece.stop - piece.start].transpose(0, 1)
    return attended.unsqueeze(0), None


def _attend(query: Tensor, layer: int, plan: PiecePlan, scaling: float) -> Tensor:
    """Softmax attention of `query` [G*Q, size, D] over the piece's extent, in explicit steps: fused kernels tile by count."""
    slab, extent = plan.piece.slab, plan.piece.extent
    spec = slab.spec
    heads, size, head_dim = query.shape
    keys, values = slab.keys[layer, :, :extent], slab.values[layer, :, :extent]  # [G, extent, D]

    def scores_over(queries: Tensor, some_keys: Tensor) -> Tensor:
        grouped = queries.reshape(spec.kv_heads, -1, head_dim)
        return torch.bmm(grouped, some_keys.transpose(1, 2)).view(heads, size, -1)

    scores = scores_over(query, keys).float()
    if plan.sink_turn is not None:
        scores[..., : spec.sink] = scores_over(rotate(query, *plan.sink_turn), keys[:, : spec.sink]).float()
    shares = torch.softmax(scores.mul_(scaling).add_(plan.hidden), dim=-1).to(query.dtype)
    return torch.bmm(shares.view(spec.kv_heads, -1, extent), values).view(heads, size, head_dim)
