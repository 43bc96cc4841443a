"""Attention of a row batch over slabs, in the place where transformers calls its attention function.

Every token attends to the `sink` first tokens and the `window` most recent, itself included, as of its own position
(attention sinks: arXiv 2309.17453). The distance to a sink never exceeds `sink + window - 1`, the longest inside the
window, so the model meets no distance that the window does not have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from runtime.engine.probe import padded
from runtime.engine.rotary import ExactRotary, rotate
from runtime.engine.torch_slab import SlabStore, as_torch, torch_pool
from runtime.rows import Piece, RowBatch
from runtime.slab import SlabPool, SlabSpec

ATTENTION_NAME = "perennial_slab"


@dataclass(frozen=True, slots=True)
class PiecePlan:
    """Where the keys and values of one piece go."""

    piece: Piece
    end: int
    slots: Tensor  # [N]


@dataclass(frozen=True, slots=True)
class Stack:
    """Pieces over slabs that lie side by side, alike in all that shapes a product: one serves them all."""

    store: SlabStore
    slabs: slice
    extent: int
    sink: int
    size: int  # queries of each piece; its last row is repeated up to a proven size
    queries: slice  # of the forward's queries, one piece's behind the other's
    hidden: Tensor  # [Q * size, extent] of one slab, or [slabs * G, Q * size, extent]: 0 where a query sees a slot, else -inf
    is_past_window: bool


@dataclass(frozen=True, slots=True)
class ForwardPlan:
    """The pieces and stacks, and what is done for the queries of all of them at once: worked out once a forward."""

    pieces: tuple[PiecePlan, ...]
    stacks: tuple[Stack, ...]
    rows: Tensor  # [queries], the row of the batch that each query is
    places: Tensor  # [rows], a query that is the row
    sink_turn: tuple[Tensor, Tensor] | None  # cosines and sines [queries, D] that bring a query within reach


def plan_forward(batch: RowBatch, sizes: tuple[int, ...], rotary: ExactRotary, heads: int) -> ForwardPlan:
    """The plan of a batch, for a model of that many query `heads`.

    Queries of a piece are padded to the next of `sizes`, for which kernels agree in bits.
    """
    pieces = batch.pieces()
    spec = batch.rows[0].slab.spec
    positions = torch.tensor([row.position for row in batch.rows], device=spec.device)
    visible = spec.visible_slots(positions, max(piece.extent for piece in pieces))
    hidden = torch.zeros(visible.shape, dtype=spec.dtype, device=spec.device).masked_fill_(~visible, float("-inf"))
    row_of: list[int] = []
    place_of = [0] * len(batch.rows)
    stacks = []
    for members in _stacked(pieces, sizes):
        begin, first, lead = len(row_of), members[0], as_torch(members[0].slab)
        size = padded(first.stop - first.start, sizes)
        for piece in members:
            for row in range(piece.start, piece.stop):
                place_of[row] = len(row_of) + row - piece.start
            count = piece.stop - piece.start
            row_of += [*range(piece.start, piece.stop), *[piece.stop - 1] * (size - count)]
        mine = hidden[row_of[begin:], : first.extent].view(len(members), 1, 1, size, first.extent)
        repeated = (1 if len(members) == 1 else spec.kv_heads, heads // spec.kv_heads)
        stacks.append(
            Stack(
                store=lead.store,
                slabs=slice(lead.index, lead.index + len(members)),
                extent=first.extent,
                sink=spec.sink,
                size=size,
                queries=slice(begin, len(row_of)),
                hidden=mine.expand(-1, *repeated, -1, -1).flatten(2, 3).flatten(0, 1),
                is_past_window=first.is_past_window,
            )
        )
    rows = torch.tensor(row_of, device=spec.device)
    slots = torch.tensor([spec.slot(row.position) for row in batch.rows], device=spec.device)
    sink_turn = None
    if spec.sink and any(piece.is_past_window for piece in pieces):
        cosines, sines = rotary.turn((spec.visible - 1 - positions.index_select(0, rows)).clamp(max=0))
        sink_turn = cosines.to(spec.dtype), sines.to(spec.dtype)
    return ForwardPlan(
        pieces=tuple(
            PiecePlan(piece, batch.rows[piece.stop - 1].position + 1, slots[piece.start : piece.stop])
            for piece in pieces
        ),
        stacks=tuple(stacks),
        rows=rows,
        places=torch.tensor(place_of, device=spec.device),
        sink_turn=sink_turn,
    )


def _stacked(pieces: tuple[Piece, ...], sizes: tuple[int, ...]) -> list[list[Piece]]:
    """The pieces in runs of slabs that follow each other in one store, of one extent, size and side of the window's edge."""

    def kind(piece: Piece) -> tuple[int, int, bool, int]:
        return (
            id(as_torch(piece.slab).store),
            piece.extent,
            piece.is_past_window,
            padded(piece.stop - piece.start, sizes),
        )

    runs: list[list[Piece]] = []
    for piece in sorted(pieces, key=lambda piece: (*kind(piece), as_torch(piece.slab).index)):
        before = runs[-1][-1] if runs else None
        if (
            before is not None
            and kind(before) == kind(piece)
            and as_torch(before.slab).index + 1 == as_torch(piece.slab).index
        ):
            runs[-1].append(piece)
        else:
            runs.append([piece])
    return runs


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

    def new_pool(self, count: int) -> SlabPool:
        return torch_pool(self._spec, count)

    @torch.inference_mode()
    def logits(self, batch: RowBatch) -> Tensor:
        """What each row with `draw` attends to, [rows, Q*G*D]."""
        plan = plan_forward(batch, self._sizes, self._rotary, self._heads)
        parts = self._table[[row.token_id for row in batch.rows]].transpose(0, 1).unsqueeze(0)
        query, key, value = parts.split((self._heads, self._spec.kv_heads, self._spec.kv_heads), dim=1)
        attended, _ = slab_attention(self._layer, query, key, value, None, scaling=self._spec.head_dim**-0.5, plan=plan)
        return attended[0].flatten(1)[[index for index, row in enumerate(batch.rows) if row.draw is not None]]


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
    for piece_plan in plan.pieces:
        piece = piece_plan.piece
        inside = slice(piece.start, piece.stop)
        as_torch(piece.slab).write(layer, piece_plan.slots, piece_plan.end, key[0, :, inside], value[0, :, inside])
    queries = query[0].index_select(1, plan.rows)
    turned = rotate(queries, *plan.sink_turn) if plan.sink_turn else None
    attended = torch.cat(
        [_attend(queries, turned, layer, stack, key.shape[1], scaling) for stack in plan.stacks], dim=1
    )
    filler = query.new_zeros(heads, rows - len(plan.places), head_dim)
    return torch.cat((attended.index_select(1, plan.places), filler), dim=1).transpose(0, 1).unsqueeze(0), None


def _attend(queries: Tensor, turned: Tensor | None, layer: int, stack: Stack, groups: int, scaling: float) -> Tensor:
    """Softmax attention of a stack's queries over its extent, in explicit steps: fused kernels tile by count.

    Of `queries` [G*Q, queries, D]; `turned` is as the sinks' keys are to meet them. Returns [G*Q, the stack's queries, D].
    """
    heads, _, head_dim = queries.shape
    shape = (groups, heads // groups, -1, stack.size, head_dim)

    def grouped(some: Tensor) -> Tensor:  # [slabs * G, Q * size, D]
        apart = some[:, stack.queries].reshape(shape).permute(2, 0, 1, 3, 4)
        return apart.reshape(-1, apart.shape[2] * stack.size, head_dim)

    keys, values = stack.store.stacked(layer, stack.slabs, stack.extent)
    scores = torch.baddbmm(stack.hidden, grouped(queries), keys.transpose(1, 2), alpha=scaling)
    if turned is not None and stack.is_past_window:
        sinks = keys[:, : stack.sink]
        scores[..., : stack.sink] = torch.baddbmm(
            stack.hidden[..., : stack.sink], grouped(turned), sinks.transpose(1, 2), alpha=scaling
        )
    shares = torch.softmax(scores, dim=-1, dtype=torch.float32).to(queries.dtype)
    attended = torch.bmm(shares, values).view(-1, groups, heads // groups, stack.size, head_dim)
    return attended.permute(1, 2, 0, 3, 4).reshape(heads, -1, head_dim)
