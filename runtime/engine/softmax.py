"""Softmax attention of blocks of queries over slots, by torch's flash attention or, for what that cannot do, by matrix products.

Letters are those of runtime/slab.py; B counts blocks and M the queries in each.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from runtime.engine.exact import row_by_row


@dataclass(frozen=True, slots=True)
class Scoring:
    """How a layer scores: `scaling`, a soft `cap` if it has one, and a learned score for each head if it has them.

    The learned scores, `sinks` [G*Q], take a share in the softmax and add no value.
    """

    scaling: float
    cap: float | None = None
    sinks: Tensor | None = None


def attend_blocks(
    queries: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, scoring: Scoring, sinks: Tensor | None
) -> Tensor:
    """Softmax attention of `queries` [G, B, M, D] over `keys` and `values` [G, 1 or B, S, D], where `hidden` is added to scores.

    `sinks` [G, B, M, 1] are those of the scoring, for each query. Returns [G, B, M, D] in the queries' type. A block's bits
    depend on its own queries, keys and values alone.
    """
    is_on_cpu = queries.device.type == "cpu"
    if scoring.cap is not None or (sinks is not None and not is_on_cpu):
        return _by_products(queries, keys, values, hidden, scoring, sinks)
    keys, values = (held.expand(-1, queries.shape[1], -1, -1) for held in (keys, values))
    if not is_on_cpu:
        attend = nn.functional.scaled_dot_product_attention
        return attend(queries, keys, values, attn_mask=hidden, scale=scoring.scaling)
    # Called by its name, so that torch chooses no other kernel. The logarithms [G, B, M] are those of the sums of
    # exponentials.
    flash: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001
    attended: Tensor
    logs: Tensor
    attended, logs = flash(queries, keys, values, attn_mask=hidden, scale=scoring.scaling)
    if sinks is None:
        return attended
    excess = (logs.unsqueeze(-1) - sinks.float()).expand(attended.shape).contiguous()
    return (attended * row_by_row(torch.sigmoid, excess)).to(queries.dtype)


def _by_products(
    queries: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, scoring: Scoring, sinks: Tensor | None
) -> Tensor:
    """As `attend_blocks`, in float32, with a matrix product for each block, so that all products have one shape."""
    groups, blocks, _, _ = queries.shape
    keys, values = keys.float(), values.float()
    slabs = range(keys.shape[1])

    def times(some: Tensor, held: Tensor) -> Tensor:
        pairs = ((group, block) for group, block in product(range(groups), range(blocks)))
        found = [some[group, block] @ held[group, block if block in slabs else 0] for group, block in pairs]
        return torch.stack(found).view(groups, blocks, *found[0].shape)

    scores = times(queries.float(), keys.transpose(2, 3)) * scoring.scaling + hidden
    if scoring.cap is not None:
        capped = row_by_row(torch.tanh, scores / scoring.cap) * scoring.cap
        scores = capped.masked_fill(hidden.isneginf(), float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks.float()), dim=-1)
    shares = scores.softmax(dim=-1)[..., : keys.shape[2]].contiguous()
    return times(shares, values).to(queries.dtype)
