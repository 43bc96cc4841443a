"""Attention of a row batch over slabs, in the place where transformers calls its attention function.

Every token attends to the `sink` first tokens and the `window` most recent, itself included, as of its own position
(attention sinks: arXiv 2309.17453). The distance to a sink never exceeds `sink + window - 1`, the longest inside the
window, so the model meets no distance that the window does not have. A layer with a window of its own sees, of all this,
what is nearer than that window.

Queries go to torch's flash attention in blocks of one fixed size. On a CPU it computes each block of each kv head by
itself, on one thread, over runs of 512 slots (FlashAttentionKernel.cpp), so that a block's bits depend on its own queries
and slots alone: as long as these, and what its thread writes in between, lie alike in lines of 64 bytes, by which MKL
chooses an order of sums. So each head's blocks go to the same thread in every call, or, where heads cannot be shared out
evenly, blocks are so large that every thread's buffers lie alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from runtime.engine.attention_plan import ForwardPlan, Stack, pad_rows
from runtime.engine.exact import Claim, Ground
from runtime.engine.rotary import rotate
from runtime.engine.softmax import Scoring, attend_blocks
from runtime.engine.torch_slab import as_torch

ATTENTION_NAME = "perennial_slab"

CLAIMS = (
    Claim("attention", "flash attention of torch, in blocks of as many queries", Ground.FIXED_ROWS),
    Claim("norms", "torch's sums over a row", Ground.ROW_BY_ROW),
    Claim("activations, rotation", "torch's vectors, no row's end left over", Ground.ROW_BY_ROW),
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
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """`attend` as transformers calls it: `query` [1, G*Q, rows, D], `key` and `value` [1, G, rows, D] to [1, rows, G*Q, D]."""
    layer = module.layer_idx
    assert isinstance(layer, int)
    scoring = Scoring(scaling, softcap, s_aux)
    return attend(layer, query[0], key[0], value[0], scoring=scoring, plan=plan).unsqueeze(0), None


def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, *, scoring: Scoring, plan: ForwardPlan) -> Tensor:
    """Writes `key`, `value` [G, rows, D] into the slabs of `plan`, then attends `query` [G*Q, rows, D] over them.

    Returns [rows, G*Q, D].
    """
    for stretch_plan in plan.stretches:
        stretch = stretch_plan.stretch
        inside = slice(stretch.start, stretch.stop)
        as_torch(stretch.slab).write(layer, stretch_plan.slots, stretch_plan.end, key[:, inside], value[:, inside])
    queries = query.index_select(1, plan.rows)
    kind = plan.kinds[layer]
    turn = plan.sink_turns.get(kind.rotary)
    # In float32, because the difference is small beside the queries.
    reach = rotate(queries.float(), *turn) - queries.float() if turn else None
    parts = [
        _attend_stack(queries, reach, layer, stack, stack.hidden[kind.window], plan.lasting_sinks[kind.window], scoring)
        for stack in plan.stacks
    ]
    attended = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return attended.index_select(1, plan.places).transpose(0, 1)


def _attend_stack(
    queries: Tensor, reach: Tensor | None, layer: int, stack: Stack, hidden: Tensor, sinks: slice, scoring: Scoring
) -> Tensor:
    """Softmax attention of a stack's `queries` [G*Q, queries, D] over its extent, in which some slots are `hidden`.

    Past the window, `reach` is added to a query for its scores with the `sinks`, which brings them within the window's
    distance. Returns [G*Q, the stack's queries, D].
    """
    heads, _, head_dim = queries.shape
    keys, values = (held.transpose(0, 1) for held in stack.store.stacked(layer, stack.slabs, stack.extent))
    groups, size = len(keys), hidden.shape[-2]
    each = heads // groups

    def fold(some: Tensor) -> Tensor:  # [G, blocks, M, columns]
        in_blocks = some[:, stack.queries].reshape(groups, each, stack.blocks, -1, some.shape[-1])
        return pad_rows(in_blocks.transpose(1, 2).flatten(2, 3), size)

    if stack.is_past_window and sinks.start < sinks.stop:
        # What `reach` adds to the scores: nothing if the layer has no rotary embedding. It is summed over a row, since the
        # kernel of a matrix product would depend on the blocks.
        beyond = 0 if reach is None else (fold(reach).unsqueeze(3) * keys[:, :, None, sinks].float()).sum(dim=-1)
        hidden[..., sinks] = beyond * scoring.scaling
    learned = None if scoring.sinks is None else scoring.sinks.view(-1, 1, 1).expand(-1, queries.shape[1], -1)
    attended = attend_blocks(fold(queries), keys, values, hidden, scoring, None if learned is None else fold(learned))
    used = each * (stack.queries.stop - stack.queries.start) // stack.blocks
    apart: Tensor = attended[:, :, :used].unflatten(2, (each, -1))
    return apart.transpose(1, 2).reshape(heads, -1, head_dim)
