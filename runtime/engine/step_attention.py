"""Attention of a step over slabs, where transformers calls its attention function: every shape is the same in every step.

What a token attends to, and how far the sinks are, is as in `attention`. Letters are those of runtime/slab.py; N is the
number of rows that every step has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from runtime.engine.rotary import ExactRotary, rotate
from runtime.engine.step_inputs import StepInputs, write
from runtime.engine.torch_slab import SlabStore
from runtime.slab import visible_slots
from runtime.slab_spec import SlabSpec

STEP_ATTENTION_NAME = "perennial_step"

# Attends queries [G*Q, N, D] over one layer's keys and values [B, G, S, D]; returns [N, G*Q, D], zeros for unused rows.
Attend = Callable[[Tensor, Tensor, Tensor, "Step"], Tensor]


@dataclass(frozen=True, slots=True)
class Step:
    """What the layers of a step share: its inputs, the slabs, and the angles for the sinks past the window."""

    spec: SlabSpec
    store: SlabStore
    inputs: StepInputs
    attend: Attend
    sink_turn: tuple[Tensor, Tensor]  # cosines and sines [N, D] float32
    seen: Tensor  # bool [N, S]

    @classmethod
    def of(cls, spec: SlabSpec, store: SlabStore, inputs: StepInputs, attend: Attend, rotary: ExactRotary) -> Step:
        """The Step for the inputs as they are now."""
        cosines, sines = rotary.turn((spec.visible - 1 - inputs.positions).clamp(max=0))
        seen = visible_slots(spec, inputs.positions, spec.slots)
        return cls(spec, store, inputs, attend, (cosines.float(), sines.float()), seen)


def step_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, step: Step, **_: Any
) -> tuple[Tensor, None]:
    """Writes `key`, `value` [1, G, N, D] into the slabs, then attends `query` [1, G*Q, N, D]; returns [1, N, G*Q, D]."""
    layer = module.layer_idx
    assert isinstance(layer, int)
    keys, values = step.store.keys[layer], step.store.values[layer]
    write(keys, key[0], step.inputs)
    write(values, value[0], step.inputs)
    return step.attend(query[0], keys, values, step).unsqueeze(0), None


def attend_by_products(query: Tensor, keys: Tensor, values: Tensor, step: Step) -> Tensor:
    """Attends in float32 by torch's products, over a copy of each row's slab, for devices without a kernel of ours."""
    heads, rows, width = query.shape
    sink, groups = step.spec.sink, keys.shape[1]
    of_rows_keys, of_rows_values = (held.index_select(0, step.inputs.slabs).float() for held in (keys, values))
    queries = query.transpose(0, 1).reshape(rows, groups, heads // groups, width).float()
    at_sinks = rotate(queries, *(part[:, None, None] for part in step.sink_turn))
    scores = torch.cat(
        (
            at_sinks @ of_rows_keys[:, :, :sink].transpose(2, 3),
            queries @ of_rows_keys[:, :, sink:].transpose(2, 3),
        ),
        dim=-1,
    )
    hidden = ~step.seen[:, None, None]
    shares = (scores * width**-0.5).masked_fill(hidden, float("-inf")).softmax(dim=-1).masked_fill(hidden, 0)
    attended: Tensor = shares @ of_rows_values
    return attended.reshape(rows, heads, width).to(query.dtype)
