"""Tries attention by itself, because the linears after it would round small differences away."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from runtime.dtypes import dtype_named
from runtime.engine import findings
from runtime.engine.architectures import ONE_ROTARY, LayerKind
from runtime.engine.attention import attend
from runtime.engine.attention_plan import plan_forward
from runtime.engine.probe import is_exact_at_every_count, tried_attention
from runtime.engine.rotary import ExactRotary
from runtime.engine.softmax import Scoring
from runtime.engine.torch_slab import torch_pool
from runtime.rows import RowBatch
from runtime.slab import SlabPool
from runtime.slab_spec import SlabSpec

_log = logging.getLogger("perennial.engine")


class Manner(NamedTuple):
    """A manner of attending: the kind of layer, a soft cap on scores, and whether the softmax has learned sinks."""

    kind: LayerKind
    cap: float | None = None
    has_sinks: bool = False


PLAIN = Manner(LayerKind(None, ONE_ROTARY))


class AttentionAlone:
    """A model that consists of attention over slabs alone: query, keys and values of each token come from a `table`."""

    def __init__(
        self, spec: SlabSpec, heads: int, rotaries: Mapping[str, ExactRotary], table: Tensor, manner: Manner = PLAIN
    ) -> None:
        """`table` is [tokens, heads + 2 G, D], on the device that attends."""
        self._spec, self._heads, self._rotaries, self._manner = spec, heads, rotaries, manner
        self._table = table

    def new_pool(self, count: int) -> SlabPool:
        return torch_pool(self._spec, count, self._table.device)

    @torch.inference_mode()
    def logits(self, batch: RowBatch) -> Tensor:
        """The attention's output for each row with `draw`, [rows, Q*G*D]."""
        kind, cap, has_sinks = self._manner
        plan = plan_forward(batch, self._rotaries, self._heads, (kind,))
        parts = self._table[[row.token_id for row in batch.rows]].transpose(0, 1)
        query, key, value = parts.split((self._heads, self._spec.kv_heads, self._spec.kv_heads))
        sinks = torch.linspace(-2, 2, self._heads, device=self._table.device) if has_sinks else None
        attended = attend(0, query, key, value, scoring=Scoring(self._spec.head_dim**-0.5, cap, sinks), plan=plan)
        return attended.flatten(1)[[index for index, row in enumerate(batch.rows) if row.draw is not None]]


def attention_is_exact(
    spec: SlabSpec, heads: int, rotaries: Mapping[str, ExactRotary], manners: Iterable[Manner], device: torch.device
) -> bool:
    """Whether attention of `heads` over such slabs, in each manner, gives a row the same bits in every batch on `device`."""
    tried, table = tried_attention(spec, heads, dtype_named(spec.dtype))
    for manner in manners:
        alone = AttentionAlone(tried, heads, rotaries, table.to(device), manner)
        described = f"attention of {heads} heads over {tried} on {device}{'' if manner == PLAIN else f' {manner}'}"
        if not findings.find_or_probe(described, partial(is_exact_at_every_count, alone, tried, len(table))):
            _log.warning("a row gets other bits in other batches of %s", described)
            return False
    return True
