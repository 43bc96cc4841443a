"""Layers that keep a state of fixed size instead of keys and values: short convolutions, and the gated delta rule.

A row's output follows from its position and its history alone, however that was cut into forwards. A convolution reads its
layer's inputs of the tokens before. The delta rule is computed in chunks of `CHUNK` positions that begin at multiples of
it, from the state before the chunk and the inputs inside it: always products of the same shapes, in which rows that are
still to come are zeros, and add nothing to those before them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from runtime.engine.attention_plan import ForwardPlan
from runtime.engine.exact import RowByRowCalls
from runtime.engine.torch_slab import TorchSlab, as_torch
from runtime.slab_spec import CHUNK

# The same as in transformers, and in the library with which the models were trained.
_LEAST_SQUARE = 1e-6


class ShortConvolution(nn.Module):
    """Replaces LFM2's layer: a gated convolution over the last few tokens, each column by itself."""

    def __init__(self, original: Any, layer: int) -> None:
        super().__init__()
        self.in_proj, self.out_proj = original.in_proj, original.out_proj
        self.weight, self.bias = nn.Parameter(original.conv.weight.detach().squeeze(1)), original.conv.bias
        self._layer = layer

    def forward(self, hidden_states: Tensor, *, plan: ForwardPlan, **_: Any) -> Tensor:
        """Of `hidden_states` [1, rows, columns], the same shape."""
        before, behind, rows = self.in_proj(hidden_states[0]).chunk(3, dim=-1)
        inputs = before * rows
        parts = []
        for part in plan.stretches:
            slab = as_torch(part.stretch.slab)
            slab.write_inputs(self._layer, inputs[part.stretch.start : part.stretch.stop], part.begin)
            parts.append(
                convolve(slab.read_inputs(self._layer, part.begin - self.weight.shape[1] + 1, part.end), self.weight)
            )
        mixed = torch.cat(parts) if self.bias is None else torch.cat(parts) + self.bias.float()
        output: Tensor = self.out_proj(behind * mixed.to(rows.dtype))
        return output.unsqueeze(0)


class DeltaRule(nn.Module):
    """Replaces a Gated DeltaNet of transformers (arXiv 2412.06464).

    Letters: H value heads, K and V columns of a key and of a value, C positions of a chunk.
    """

    def __init__(self, original: Any, layer: int) -> None:
        super().__init__()
        self.in_proj_qkv, self.in_proj_z = original.in_proj_qkv, original.in_proj_z
        self.in_proj_b, self.in_proj_a = original.in_proj_b, original.in_proj_a
        self.weight = nn.Parameter(original.conv1d.weight.detach().squeeze(1))
        self.dt_bias, self.A_log = original.dt_bias, original.A_log
        self.norm, self.out_proj = RowByRowCalls(original.norm), original.out_proj
        self._heads, self._key_heads = original.num_v_heads, original.num_k_heads
        self._keys, self._values = original.head_k_dim, original.head_v_dim
        self._layer = layer

    def forward(self, hidden_states: Tensor, *, plan: ForwardPlan, **_: Any) -> Tensor:
        """Of `hidden_states` [1, rows, columns], the same shape."""
        rows = hidden_states[0]
        inputs = torch.cat((self.in_proj_qkv(rows), self.in_proj_b(rows), self.in_proj_a(rows)), dim=-1)
        parts = []
        for part in plan.stretches:
            slab = as_torch(part.stretch.slab)
            slab.write_inputs(self._layer, inputs[part.stretch.start : part.stretch.stop], part.begin)
            for chunk in range(part.begin // CHUNK, (part.end - 1) // CHUNK + 1):
                first = chunk * CHUNK
                found = self._run_chunk(slab, chunk, part.end)
                parts.append(found[max(part.begin - first, 0) : part.end - first])
        found = torch.cat(parts).to(rows.dtype).view(-1, self._values)
        normed: Tensor = self.norm(found, self.in_proj_z(rows).view(-1, self._values))
        output: Tensor = self.out_proj(normed.view(len(rows), -1))
        return output.unsqueeze(0)

    def _run_chunk(self, slab: TorchSlab, chunk: int, end: int) -> Tensor:
        """Outputs [C, H, V] of the chunk with this number, which has positions up to `end`.

        After a whole chunk, its state is in the slab.
        """
        first, reach = chunk * CHUNK, self.weight.shape[1] - 1
        inputs = slab.read_inputs(self._layer, first - reach, min(end, first + CHUNK))
        inputs = nn.functional.pad(inputs, (0, 0, 0, CHUNK + reach - len(inputs)))
        # A copy, because the order of sums may depend on where in a line of memory the operands begin.
        before = slab.state(self._layer, chunk).clone()
        output, after = self._delta(inputs, before if chunk else before.zero_())
        if end >= first + CHUNK:
            slab.state(self._layer, chunk + 1).copy_(after)
        return output

    def _delta(self, inputs: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs [C, H, V] and the state [H, K, V] after a chunk, from its `inputs` and the state `before` it.

        The inputs [C + reach, columns] begin `reach` positions before the chunk. All is computed in float32, by the chunked
        form of the rule (arXiv 2406.06484, section 3).
        """
        mixed, learning, forgetting = inputs.split((len(self.weight), self._heads, self._heads), dim=-1)
        mixed = nn.functional.silu(convolve(mixed, self.weight).to(inputs.dtype)).float()
        each = self._key_heads * self._keys
        query, key, value = mixed.split((each, each, self._heads * self._values), dim=-1)
        query, key = (self._by_value_head(part) for part in (query, key))  # [H, C, K]
        query = query * self._keys**-0.5
        value = value.view(CHUNK, self._heads, self._values).transpose(0, 1)  # [H, C, V]
        rate = learning[-CHUNK:].sigmoid().float().T.unsqueeze(-1)  # [H, C, 1]
        steps = nn.functional.softplus(forgetting[-CHUNK:].float() + self.dt_bias.float())
        decay = (
            (-self.A_log.float().exp() * steps).T.cumsum(dim=-1).unsqueeze(-1)
        )  # [H, C, 1]: logarithms, since the chunk began
        between = (
            (decay - decay.transpose(1, 2)).tril().exp().tril()
        )  # [H, C, C]: the share of an earlier row that is left at a later one

        fading_key = key * rate * decay.exp()
        overlap = torch.eye(CHUNK, device=key.device) + ((key * rate) @ key.transpose(1, 2) * between).tril(-1)
        both = torch.cat((value * rate, fading_key), dim=-1)
        solved = torch.linalg.solve_triangular(overlap, both, upper=False, unitriangular=True)
        from_values, from_keys = solved.split((self._values, self._keys), dim=-1)
        learned = from_values - from_keys @ before  # [H, C, V]
        output = (query * decay.exp()) @ before + (query @ key.transpose(1, 2) * between) @ learned
        last = decay[:, -1:]
        after = before * last.exp() + (key * (last - decay).exp()).transpose(1, 2) @ learned
        return output.transpose(0, 1), after

    def _by_value_head(self, part: Tensor) -> Tensor:
        """Queries or keys [C, columns] as [H, C, K], of length 1."""
        heads = part.view(CHUNK, self._key_heads, self._keys)
        unit = heads * torch.rsqrt(heads.square().sum(dim=-1, keepdim=True) + _LEAST_SQUARE)
        return unit.repeat_interleave(self._heads // self._key_heads, dim=1).transpose(0, 1)


def convolve(inputs: Tensor, weight: Tensor) -> Tensor:
    """Convolves `inputs` [rows + reach, columns] with `weight` [columns, reach + 1]; returns [rows, columns] float32."""
    rows = len(inputs) - weight.shape[1] + 1
    inputs, weight = inputs.float(), weight.float()
    summed = inputs[:rows] * weight[:, 0]
    for back in range(1, weight.shape[1]):
        summed = summed + inputs[back : back + rows] * weight[:, back]
    return summed
