"""A decoder-only model computed from its whole history in float64, one query at a time.

It reads the files of a model and knows nothing of slabs, batches, masks or transformers: what the product computes for
a row must come out here too, whatever the history went through.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import gelu, silu

from tests.reference.window import positions_seen


class ReferenceDecoder:
    """Any architecture of the table, with plain rotary embeddings."""

    def __init__(self, directory: Path) -> None:
        self.config: dict[str, Any] = json.loads((directory / "config.json").read_text())
        self.weights = {name: w.double() for name, w in load_file(directory / "model.safetensors").items()}
        self.heads: int = self.config["num_attention_heads"]
        self.kv_heads: int = self.config["num_key_value_heads"]
        self.head_dim: int = self.config.get("head_dim") or self.config["hidden_size"] // self.heads
        self.is_gemma: bool = self.config["model_type"].startswith("gemma")

    def logits(self, tokens: list[int], sink: int, window: int) -> Tensor:
        """Logits [tokens, vocabulary] of a history in which each token attends to what it may, as of its position."""
        embedding = self.weights["model.embed_tokens.weight"]
        hidden = embedding[tokens] * (math.sqrt(self.config["hidden_size"]) if self.is_gemma else 1)
        for layer in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            attended = self.attention(self.normed(hidden, f"{name}.input_layernorm"), layer, sink, window)
            if self.is_gemma:
                hidden = hidden + self.normed(attended, f"{name}.post_attention_layernorm")
                through = self.mlp(self.normed(hidden, f"{name}.pre_feedforward_layernorm"), f"{name}.mlp")
                hidden = hidden + self.normed(through, f"{name}.post_feedforward_layernorm")
            else:
                hidden = hidden + attended
                hidden = hidden + self.mlp(self.normed(hidden, f"{name}.post_attention_layernorm"), f"{name}.mlp")
        logits = self.normed(hidden, "model.norm") @ self.weights.get("lm_head.weight", embedding).T
        return self.capped(logits, "final_logit_softcapping")

    def attention(self, hidden: Tensor, layer: int, sink: int, window: int) -> Tensor:
        length, name = len(hidden), f"model.layers.{layer}.self_attn"
        if f"{name}.qkv_proj.weight" in self.weights:
            parts = self.linear(hidden, f"{name}.qkv_proj").view(length, -1, self.head_dim)
            queries, keys, values = parts.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        else:
            queries, keys, values = (
                self.linear(hidden, f"{name}.{part}_proj").view(length, -1, self.head_dim) for part in "qkv"
            )
        if f"{name}.q_norm.weight" in self.weights:
            queries, keys = self.normed(queries, f"{name}.q_norm"), self.normed(keys, f"{name}.k_norm")
        shared_by = self.heads // self.kv_heads
        keys, values = keys.repeat_interleave(shared_by, dim=1), values.repeat_interleave(shared_by, dim=1)
        attended = []
        for position in range(length):
            seen = sorted(positions_seen(position, sink, window, self.own_window(layer)))
            # A sink is as far away as it would be at the end of the first window: the place inside what is held.
            near = min(position, sink + window - 1)
            distances = [(near if other < sink else position) - other for other in seen]
            turned = self.turned(queries[position], distances, layer)  # [seen, heads, head_dim]
            scores = (turned * keys[seen]).sum(-1) / math.sqrt(self.config.get("query_pre_attn_scalar", self.head_dim))
            scores = self.capped(scores, "attn_logit_softcapping")  # [seen, heads]
            if f"{name}.sinks" in self.weights:
                scores = torch.cat((scores, self.weights[f"{name}.sinks"].unsqueeze(0)))
            shares = torch.softmax(scores, dim=0)[: len(seen)]
            attended.append((shares.unsqueeze(-1) * values[seen]).sum(0).flatten())
        return self.linear(torch.stack(attended), f"{name}.o_proj")

    def layer_type(self, layer: int) -> str | None:
        types = self.config.get("layer_types")
        return types[layer] if types else None

    def own_window(self, layer: int) -> int | None:
        window = self.config.get("sliding_window")
        return window if self.layer_type(layer) in (None, "sliding_attention") else None

    def turned(self, query: Tensor, distances: list[int], layer: int) -> Tensor:
        """`query` [heads, head_dim] as seen from keys that lie `distances` before it and are not turned themselves."""
        if not self.config.get("no_rope_layers", {layer: True})[layer]:
            return query.expand(len(distances), -1, -1)
        rope = self.config["rope_parameters"]
        rope = rope.get(self.layer_type(layer), rope)
        assert rope["rope_type"] == "default"
        columns = int(self.head_dim * rope.get("partial_rotary_factor", 1))
        half = columns // 2
        frequencies = torch.tensor([rope["rope_theta"] ** (-pair / half) for pair in range(half)], dtype=torch.float64)
        angles = torch.tensor(distances, dtype=torch.float64).view(-1, 1, 1) * frequencies  # [seen, 1, half]
        low, high = query[:, :half], query[:, half:columns]
        still = query[:, columns:].expand(len(distances), -1, -1)
        return torch.cat(
            (low * angles.cos() - high * angles.sin(), high * angles.cos() + low * angles.sin(), still), dim=-1
        )

    def mlp(self, hidden: Tensor, name: str) -> Tensor:
        if f"{name}.router.weight" in self.weights:
            return self.experts_of_gpt_oss(hidden, name)
        if f"{name}.gate.weight" in self.weights:
            return self.experts(hidden, name)
        if f"{name}.gate_up_proj.weight" in self.weights:
            gate, up = self.linear(hidden, f"{name}.gate_up_proj").chunk(2, dim=-1)
        else:
            gate, up = self.linear(hidden, f"{name}.gate_proj"), self.linear(hidden, f"{name}.up_proj")
        opened = gelu(gate, approximate="tanh") if self.is_gemma else silu(gate)
        return self.linear(opened * up, f"{name}.down_proj")

    def experts(self, hidden: Tensor, name: str) -> Tensor:
        shares = torch.softmax(self.linear(hidden, f"{name}.gate"), dim=-1)
        rows = []
        for row, of_row in zip(hidden, shares, strict=True):
            chosen = of_row.argsort(descending=True)[: self.config["num_experts_per_tok"]].tolist()
            whole = of_row[chosen].sum() if self.config["norm_topk_prob"] else 1
            outputs = []
            for expert in chosen:
                their = f"{name}.experts.{expert}"
                opened = silu(self.linear(row, f"{their}.gate_proj")) * self.linear(row, f"{their}.up_proj")
                outputs.append(self.linear(opened, f"{their}.down_proj") * of_row[expert] / whole)
            rows.append(torch.stack(outputs).sum(0))
        return torch.stack(rows)

    def experts_of_gpt_oss(self, hidden: Tensor, name: str) -> Tensor:
        scores, held, limit = self.linear(hidden, f"{name}.router"), f"{name}.experts", self.config["swiglu_limit"]
        rows = []
        for row, of_row in zip(hidden, scores, strict=True):
            chosen = of_row.argsort(descending=True)[: self.config["num_experts_per_tok"]].tolist()
            outputs = []
            for expert, share in zip(chosen, torch.softmax(of_row[chosen], dim=0), strict=True):
                both = row @ self.weights[f"{held}.gate_up_proj"][expert]
                both = both + self.weights[f"{held}.gate_up_proj_bias"][expert]
                gate, up = both[::2].clamp(max=limit), both[1::2].clamp(-limit, limit)
                opened = (up + 1) * gate * torch.sigmoid(self.config["swiglu_alpha"] * gate)
                output = opened @ self.weights[f"{held}.down_proj"][expert]
                outputs.append((output + self.weights[f"{held}.down_proj_bias"][expert]) * share)
            rows.append(torch.stack(outputs).sum(0))
        return torch.stack(rows)

    def capped(self, scores: Tensor, name: str) -> Tensor:
        cap = self.config.get(name)
        return cap * torch.tanh(scores / cap) if cap else scores

    def normed(self, vectors: Tensor, name: str) -> Tensor:
        mean_square = vectors.square().mean(-1, keepdim=True)
        weight = self.weights[f"{name}.weight"] + (1 if self.is_gemma else 0)
        return vectors / torch.sqrt(mean_square + self.config["rms_norm_eps"]) * weight

    def linear(self, vectors: Tensor, name: str) -> Tensor:
        product = vectors @ self.weights[f"{name}.weight"].T
        bias = self.weights.get(f"{name}.bias")
        return product if bias is None else product + bias
