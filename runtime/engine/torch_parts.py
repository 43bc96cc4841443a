"""Replacements for parts of transformers' models, so that a row's bits depend on the row alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from runtime.engine.architectures import ARCHITECTURES, ONE_ROTARY, Part, layer_kinds
from runtime.engine.exact import Claim, Ground, RowByRow, RowByRowCalls, row_by_row
from runtime.engine.recurrent import DeltaRule, ShortConvolution
from runtime.engine.rotary import ExactRotary, RotaryByLayer
from runtime.slab_spec import CHUNK

CLAIMS_OF_PARTS = {
    Part.SOFT_CAPS: Claim("capped attention", "torch's products, of one block of queries each", Ground.FIXED_ROWS),
    Part.SHORT_CONVOLUTIONS: Claim("convolutions", "products and sums of columns by themselves", Ground.ROW_BY_ROW),
    Part.DELTA_RULE: Claim("delta rule", f"chunks of {CHUNK} positions from multiples of it", Ground.FIXED_ROWS),
    Part.EXPERTS: Claim("routers and experts", "each row's outputs added in the order of experts", Ground.ROW_BY_ROW),
}

# A router is small, and costs the same for this many rows as for one.
_ROUTED_ROWS = 32
# The names of activation functions in transformers' layers.
_ACTIVATIONS = ("act_fn", "activation_fn")
# Modules that call activation functions instead of holding them.
_CALLING_BY_NAME = ("Lfm2MLP", "Qwen3_5Attention", "Qwen3_5MoeAttention", "Qwen3_5MoeSparseMoeBlock")
# Recurrent layers, by their names in transformers' layers.
_RECURRENT: Mapping[str, Callable[[Any, int], nn.Module]] = {"conv": ShortConvolution, "linear_attn": DeltaRule}


class FixedRows(nn.Module):
    """A module of rows [N, columns] that is always called with the same number of rows; it may return several tensors."""

    def __init__(self, module: nn.Module, rows: int) -> None:
        super().__init__()
        self.module, self.rows = module, rows

    def forward(self, rows: Tensor) -> tuple[Tensor, ...]:
        missing = -len(rows) % self.rows
        padded = nn.functional.pad(rows, (0, 0, 0, missing))
        parts = [self.module(part) for part in padded.split(self.rows)]
        return tuple(torch.cat(of_all)[: len(rows)] for of_all in zip(*parts, strict=True))


class RoutedExperts(nn.Module):
    """Experts as separate linears: a row goes through those that it was routed to, and their outputs are added in that order."""

    def __init__(self, up: list[nn.Linear], down: list[nn.Linear], gated: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Each of `up` returns the gate's input beside the values that pass it; `gated` combines both."""
        super().__init__()
        self.up, self.down, self.gated = nn.ModuleList(up), nn.ModuleList(down), gated

    def forward(self, rows: Tensor, experts: Tensor, shares: Tensor) -> Tensor:
        """The outputs for `rows` [N, columns], each through its `experts` [N, K], weighted by `shares` [N, K]."""
        summed = torch.zeros_like(rows)
        for expert in experts.unique().tolist():
            theirs, place = (experts == expert).nonzero(as_tuple=True)
            gate, up = self.up[expert](rows[theirs]).chunk(2, dim=-1)
            through = self.down[expert](self.gated(gate, up)) * shares[theirs, place, None]
            summed.index_add_(0, theirs, through.to(summed.dtype))
        return summed


def take_over(model: Any) -> dict[str, ExactRotary]:
    """Puts our parts into a model of one of `ARCHITECTURES`; returns its new rotary embeddings by name.

    Raises ModelUnavailable if their frequencies change with the input's length.
    """
    decoder, architecture = model.get_decoder(), ARCHITECTURES[model.config.model_type]
    # Layer by layer, so that memory holds the experts of only one layer twice.
    for parent in (part for layer in decoder.layers for part in list(layer.modules())):
        for name, child in list(parent.named_children()):
            if name in _ACTIVATIONS:
                setattr(parent, name, RowByRow(child))
            elif name == "experts":
                setattr(parent, name, _experts(child))
            elif type(child).__name__.endswith("TopKRouter"):
                setattr(parent, name, FixedRows(child, _ROUTED_ROWS))
            elif type(child).__name__ in _CALLING_BY_NAME:
                setattr(parent, name, RowByRowCalls(child))
    _number_layers(decoder, model.config)
    names = sorted({kind.rotary for kind in layer_kinds(model.config) if kind.rotary})
    if names == [ONE_ROTARY]:
        decoder.rotary_emb = ExactRotary(decoder.rotary_emb, has_half_angles=architecture.has_half_angles)
        return {ONE_ROTARY: decoder.rotary_emb}
    by_layer = decoder.rotary_emb = RotaryByLayer(decoder.rotary_emb, names)
    return by_layer.by_kind


def _number_layers(decoder: Any, config: PreTrainedConfig) -> None:
    """Puts our recurrent layers into a model. These are numbered separately from layers that attend, as in a slab."""
    counts: Counter[bool] = Counter()
    for layer, kind in zip(decoder.layers, layer_kinds(config), strict=True):
        number = counts[kind.is_recurrent]
        counts[kind.is_recurrent] += 1
        if kind.is_recurrent:
            name = next(name for name in _RECURRENT if hasattr(layer, name))
            setattr(layer, name, _RECURRENT[name](getattr(layer, name), number))
        else:
            attention = layer.self_attn
            (attention.module if isinstance(attention, RowByRowCalls) else attention).layer_idx = number


def soft_cap(logits: Tensor, cap: float | None) -> Tensor:
    """Logits [rows, vocabulary] that approach `cap` instead of passing it, if there is one."""
    return logits if cap is None else row_by_row(torch.tanh, logits / cap) * cap


def _experts(experts: Any) -> RoutedExperts:
    if hasattr(experts, "alpha"):
        return _experts_of_gpt_oss(experts)
    activation = RowByRow(experts.act_fn)
    return RoutedExperts(
        [_linear(weight) for weight in experts.gate_up_proj],
        [_linear(weight) for weight in experts.down_proj],
        lambda gate, up: activation(gate) * up,
    )


def _experts_of_gpt_oss(experts: Any) -> RoutedExperts:
    """gpt-oss has weights [inputs, outputs] in which the gate's columns alternate with those of the values."""
    slope, limit = float(experts.alpha), float(experts.limit)

    def swish(gate: Tensor) -> Tensor:
        return gate * torch.sigmoid(gate * slope)

    def gated(gate: Tensor, up: Tensor) -> Tensor:
        return (up.clamp(-limit, limit) + 1) * row_by_row(swish, gate.clamp(max=limit))

    def apart(some: Tensor) -> Tensor:
        return torch.cat((some[..., ::2], some[..., 1::2]), dim=-1)

    up = zip(experts.gate_up_proj, experts.gate_up_proj_bias, strict=True)
    down = zip(experts.down_proj, experts.down_proj_bias, strict=True)
    return RoutedExperts(
        [_linear(apart(weight).T, apart(bias)) for weight, bias in up],
        [_linear(weight.T, bias) for weight, bias in down],
        gated,
    )


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A linear with this weight [outputs, inputs]."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().contiguous(), requires_grad=False)
    return linear
