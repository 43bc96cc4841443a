"""Attention of a row batch over slabs, in the place where transformers calls its attention function.

Every token attends to the `sink` first tokens and the `window` most recent, itself included, as of its own position
(attention sinks: arXiv 2309.17453). The distance to a sink never exceeds `sink + window - 1`, the longest inside the
window, so the model meets no distance that the window does not have.

Queries go to torch's flash attention in blocks of one fixed size. On a CPU it computes each block of each kv head by
itself, on one thread, over runs of 512 slots (FlashAttentionKernel.cpp), so that a block's bits depend on its own queries
and slots alone: as long as these, and what its thread writes in between, lie alike in lines of 64 bytes, by which MKL
chooses an order of sums. So each head's blocks go to the same thread in every call, or, where heads cannot be shared out
evenly, blocks are so large that every thread's buffers lie alike.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from runtime.engine.exact import Claim, Ground
from runtime.engine.findings import found
from runtime.engine.probe import hard_rows, is_exact_at_every_count
from runtime.engine.rotary import ExactRotary, rotate
from runtime.engine.torch_slab import SlabStore, as_torch, torch_pool
from runtime.rows import Piece, RowBatch
from runtime.slab import SlabPool, SlabSpec

ATTENTION_NAME = "perennial_slab"

CLAIMS = (
    Claim("attention", "flash attention of torch, in blocks of as many queries", Ground.FIXED_ROWS),
    Claim("norms", "torch's sums over a row", Ground.ROW_BY_ROW),
    Claim("activations, rotation", "torch's vectors, no row's end left over", Ground.ROW_BY_ROW),
)

# Attention is tried over no longer windows: more runs of slots are the same product again.
_PROBED_WINDOW = 1020
_PROBED_TOKENS = 64

_log = logging.getLogger("perennial.engine")

_LINE_BYTES = 64
# Fewer queries in a block cost a lone row nothing less.
_LEAST_QUERIES = 4
# Each thread's share of flash attention's buffers is a whole number of lines where a block has a multiple of so many.
_QUERY_STEP = 8


@dataclass(frozen=True, slots=True)
class PiecePlan:
    """Where the keys and values of one piece go."""

    piece: Piece
    end: int
    slots: Tensor  # [N]


@dataclass(frozen=True, slots=True)
class Stack:
    """Blocks that one call serves: those of one piece, or one each of pieces over slabs that lie side by side."""

    store: SlabStore
    slabs: slice
    extent: int
    sink: int
    blocks: int
    queries: slice  # of the forward's queries, one block's behind the other's
    # [1 or G, blocks, M, extent], 0 where a query sees a slot, else -inf. Past the window each layer writes into its first
    # columns what brings the sinks within reach.
    hidden: Tensor
    is_past_window: bool


@dataclass(frozen=True, slots=True)
class ForwardPlan:
    """The pieces and stacks, and what is done for the queries of all of them at once: worked out once a forward."""

    pieces: tuple[PiecePlan, ...]
    stacks: tuple[Stack, ...]
    rows: Tensor  # [queries], the row of the batch that each query is
    places: Tensor  # [rows], a query that is the row
    sink_turn: tuple[Tensor, Tensor] | None  # cosines and sines [queries, D] that bring a query within reach


def block_shape(spec: SlabSpec, heads: int, threads: int) -> tuple[int, int]:
    """How many rows R make a block, and how many queries M it has: those of all Q heads of a group, and padding.

    Blocks come to threads head by head, so that a head's are one thread's where threads share the heads out evenly.
    """
    heads_a_group = heads // spec.kv_heads
    rows = max(1, _LEAST_QUERIES // heads_a_group)
    block_bytes = rows * heads_a_group * spec.head_dim * spec.dtype.itemsize
    if spec.kv_heads % threads == 0 and block_bytes % _LINE_BYTES == 0:
        return rows, rows * heads_a_group
    rows = max(1, _QUERY_STEP // heads_a_group)
    return rows, -(-rows * heads_a_group // _QUERY_STEP) * _QUERY_STEP


def plan_forward(batch: RowBatch, rotary: ExactRotary, heads: int) -> ForwardPlan:
    """The plan of a batch, for a model of that many query `heads`."""
    pieces = batch.pieces()
    spec = batch.rows[0].slab.spec
    size, queries = block_shape(spec, heads, torch.get_num_threads())
    positions = torch.tensor([row.position for row in batch.rows], device=spec.device)
    visible = spec.visible_slots(positions, max(piece.extent for piece in pieces))
    # Other devices than CPUs take a mask of the queries' own type alone.
    kind = torch.float32 if spec.device.type == "cpu" else spec.dtype
    hidden = torch.zeros(visible.shape, dtype=kind, device=spec.device).masked_fill_(~visible, float("-inf"))
    row_of: list[int] = []
    place_of = [0] * len(batch.rows)
    stacks = []
    for members in _stacked(pieces, size):
        begin, first, lead = len(row_of), members[0], as_torch(members[0].slab)
        for piece in members:
            count = piece.stop - piece.start
            place_of[piece.start : piece.stop] = range(len(row_of), len(row_of) + count)
            row_of += [*range(piece.start, piece.stop), *[piece.stop - 1] * (-count % size)]
        if spec.kv_heads == 1 and len(row_of) - begin == size:
            # A call for a single block would run outside torch's threads, where the product inside it has threads of its own.
            row_of += [row_of[-1]] * size
        blocks = (len(row_of) - begin) // size
        seen = hidden[row_of[begin:], : first.extent].view(1, blocks, 1, size, first.extent)
        of_each_head = spec.kv_heads if first.is_past_window and spec.sink else 1
        stacks.append(
            Stack(
                store=lead.store,
                slabs=slice(lead.index, lead.index + len(members)),
                extent=first.extent,
                sink=spec.sink,
                blocks=blocks,
                queries=slice(begin, len(row_of)),
                hidden=_padded(
                    seen.expand(of_each_head, -1, heads // spec.kv_heads, -1, -1).flatten(2, 3), queries
                ).contiguous(),
                is_past_window=first.is_past_window,
            )
        )
    rows = torch.tensor(row_of, device=spec.device)
    slots = torch.tensor([spec.slot(row.position) for row in batch.rows], device=spec.device)
    sink_turn = None
    if spec.sink and any(piece.is_past_window for piece in pieces):
        cosines, sines = rotary.turn((spec.visible - 1 - positions.index_select(0, rows)).clamp(max=0))
        sink_turn = cosines.float(), sines.float()
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


def _padded(blocks: Tensor, queries: int) -> Tensor:
    """Blocks [..., queries so far, columns] with rows of zeros behind them, up to so many."""
    missing = queries - blocks.shape[-2]
    return nn.functional.pad(blocks, (0, 0, 0, missing)) if missing else blocks


def _stacked(pieces: tuple[Piece, ...], size: int) -> list[list[Piece]]:
    """The pieces of one block each in runs of slabs that follow each other in one store, of one extent and side of the
    window's edge; each longer piece by itself.
    """

    def kind(piece: Piece) -> tuple[int, int, bool]:
        return id(as_torch(piece.slab).store), piece.extent, piece.is_past_window

    runs: list[list[Piece]] = []
    for piece in sorted(pieces, key=lambda piece: (*kind(piece), as_torch(piece.slab).index)):
        before = runs[-1][-1] if runs else None
        if (
            before is not None
            and kind(before) == kind(piece)
            and as_torch(before.slab).index + 1 == as_torch(piece.slab).index
            and max(before.stop - before.start, piece.stop - piece.start) <= size
        ):
            runs[-1].append(piece)
        else:
            runs.append([piece])
    return runs


class AttentionAlone:
    """A model that is nothing but attention over slabs, of a query, keys and values for each token of a `table`.

    What linears round away, its output still shows.
    """

    def __init__(self, spec: SlabSpec, heads: int, rotary: ExactRotary, table: Tensor) -> None:
        """`table` is [tokens, heads + 2 G, D]."""
        self._spec, self._heads, self._rotary = spec, heads, rotary
        self._table = table.to(spec.device, spec.dtype)

    def new_pool(self, count: int) -> SlabPool:
        return torch_pool(self._spec, count)

    @torch.inference_mode()
    def logits(self, batch: RowBatch) -> Tensor:
        """What each row with `draw` attends to, [rows, Q*G*D]."""
        plan = plan_forward(batch, self._rotary, self._heads)
        parts = self._table[[row.token_id for row in batch.rows]].transpose(0, 1)
        query, key, value = parts.split((self._heads, self._spec.kv_heads, self._spec.kv_heads))
        attended = attend(0, query, key, value, scaling=self._spec.head_dim**-0.5, plan=plan)
        return attended.flatten(1)[[index for index, row in enumerate(batch.rows) if row.draw is not None]]


def attention_is_exact(spec: SlabSpec, heads: int, rotary: ExactRotary) -> bool:
    """Whether attention of `heads` over slabs of this shape gives a row the same bits in every batch here."""
    tried = replace(spec, layers=1, window=min(spec.window, _PROBED_WINDOW))
    parts = heads + 2 * spec.kv_heads
    generator = torch.Generator().manual_seed(1)
    table = hard_rows(_PROBED_TOKENS * parts, spec.head_dim, spec.dtype, generator).view(_PROBED_TOKENS, parts, -1)
    alone = AttentionAlone(tried, heads, rotary, table)
    kind = f"attention of {heads} heads over {tried}"
    holds = found(kind, partial(is_exact_at_every_count, alone, tried, _PROBED_TOKENS))
    if not holds:
        _log.warning("a row gets other bits in other batches of %s", kind)
    return holds


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
    """`attend` as transformers calls it: `query` [1, G*Q, rows, D], `key` and `value` [1, G, rows, D] to [1, rows, G*Q, D]."""
    layer = module.layer_idx
    assert isinstance(layer, int)
    attended = attend(layer, query[0], key[0], value[0], scaling=scaling, plan=plan)
    return attended.unsqueeze(0), None


def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, plan: ForwardPlan) -> Tensor:
    """Writes `key`, `value` [G, rows, D] into the slabs of `plan`, then attends `query` [G*Q, rows, D] over them.

    Returns [rows, G*Q, D].
    """
    for piece_plan in plan.pieces:
        piece = piece_plan.piece
        inside = slice(piece.start, piece.stop)
        as_torch(piece.slab).write(layer, piece_plan.slots, piece_plan.end, key[:, inside], value[:, inside])
    queries = query.index_select(1, plan.rows)
    # In float32, for their difference is small beside them.
    reach = rotate(queries.float(), *plan.sink_turn) - queries.float() if plan.sink_turn else None
    parts = [_attend_stack(queries, reach, layer, stack, key.shape[0], scaling) for stack in plan.stacks]
    attended = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return attended.index_select(1, plan.places).transpose(0, 1)


def _attend_stack(
    queries: Tensor, reach: Tensor | None, layer: int, stack: Stack, groups: int, scaling: float
) -> Tensor:
    """Softmax attention of a stack's `queries` [G*Q, queries, D] over its extent.

    `reach` is what to add to a query for it to meet the sinks within the window. Returns [G*Q, the stack's queries, D].
    """
    heads, _, head_dim = queries.shape
    size, each = stack.hidden.shape[-2], heads // groups
    in_blocks = (groups, each, stack.blocks, -1, head_dim)

    def folded(some: Tensor) -> Tensor:  # [G, blocks, M, D]
        return _padded(some[:, stack.queries].reshape(in_blocks).transpose(1, 2).flatten(2, 3), size)

    keys, values = (held.transpose(0, 1) for held in stack.store.stacked(layer, stack.slabs, stack.extent))
    if reach is not None and stack.is_past_window:
        sinks = keys[:, :, None, : stack.sink].float()
        # Scores beyond those of the query itself. A sum over a row, not a product, whose kernel would depend on the blocks.
        stack.hidden[..., : stack.sink] = (folded(reach).unsqueeze(3) * sinks).sum(dim=-1) * scaling
    blocks = folded(queries)
    keys, values = (held.expand(-1, stack.blocks, -1, -1) for held in (keys, values))
    attended = _flash(blocks, keys, values, stack.hidden, scaling)
    used = each * (stack.queries.stop - stack.queries.start) // stack.blocks
    apart: Tensor = attended[:, :, :used].unflatten(2, (each, -1))
    return apart.transpose(1, 2).reshape(heads, -1, head_dim)


def _flash(queries: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, scaling: float) -> Tensor:
    """Softmax attention of `queries` [G, B, M, D] over `keys` and `values` [G, B, S, D], of the same shape as the queries."""
    attend = nn.functional.scaled_dot_product_attention
    if queries.device.type == "cpu":
        # By name, so that no other kernel is chosen.
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001
    found: Any = attend(queries, keys, values, attn_mask=hidden, scale=scaling)
    attended: Tensor = found if isinstance(found, Tensor) else found[0]
    return attended
