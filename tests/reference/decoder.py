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
from torch.nn.functional import gelu, silu, softplus

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
        self.holds_norms_above_1: bool = self.config["model_type"].startswith(("gemma", "qwen3_5"))

    def logits(self, tokens: list[int], sink: int, window: int) -> Tensor:
        """Logits [tokens, vocabulary] of a history in which each token attends to what it may, as of its position."""
        embedding = self.weights["model.embed_tokens.weight"]
        hidden = embedding[tokens] * (math.sqrt(self.config["hidden_size"]) if self.is_gemma else 1)
        for layer in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            before, between = (
                ("operator_norm", "ffn_norm")
                if f"{name}.operator_norm.weight" in self.weights
                else ("input_layernorm", "post_attention_layernorm")
            )
            normed = self.normed(hidden, f"{name}.{before}")
            if f"{name}.conv.conv.weight" in self.weights:
                attended = self.short_convolution(normed, f"{name}.conv")
            elif f"{name}.linear_attn.A_log" in self.weights:
                attended = self.delta_rule(normed, f"{name}.linear_attn")
            else:
                attended = self.attention(normed, layer, sink, window)
            if self.is_gemma:
                hidden = hidden + self.normed(attended, f"{name}.post_attention_layernorm")
                through = self.mlp(self.normed(hidden, f"{name}.pre_feedforward_layernorm"), f"{name}.mlp")
                hidden = hidden + self.normed(through, f"{name}.post_feedforward_layernorm")
            else:
                hidden = hidden + attended
                hidden = hidden + self.mlp(self.normed(hidden, f"{name}.{between}"), f"{name}.mlp")
        last = "model.norm" if "model.norm.weight" in self.weights else "model.embedding_norm"
        logits = self.normed(hidden, last) @ self.weights.get("lm_head.weight", embedding).T
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
        gates = torch.ones(())
        if queries.shape[1] == 2 * self.heads:
            queries, gates = queries.view(length, self.heads, 2 * self.head_dim).chunk(2, dim=-1)
            gates = torch.sigmoid(gates).flatten(1)
        for norm in ("norm", "layernorm"):
            if f"{name}.q_{norm}.weight" in self.weights:
                queries, keys = self.normed(queries, f"{name}.q_{norm}"), self.normed(keys, f"{name}.k_{norm}")
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
        last = "o_proj" if f"{name}.o_proj.weight" in self.weights else "out_proj"
        return self.linear(torch.stack(attended) * gates, f"{name}.{last}")

    def short_convolution(self, hidden: Tensor, name: str) -> Tensor:
        before, behind, rows = self.linear(hidden, f"{name}.in_proj").chunk(3, dim=-1)
        return self.linear(behind * self.convolved(before * rows, f"{name}.conv"), f"{name}.out_proj")

    def delta_rule(self, hidden: Tensor, name: str) -> Tensor:
        """The gated delta rule as it is defined: a state for each head, changed by one token after the other."""
        heads, key_heads = self.config["linear_num_value_heads"], self.config["linear_num_key_heads"]
        keys, values = self.config["linear_key_head_dim"], self.config["linear_value_head_dim"]
        mixed = silu(self.convolved(self.linear(hidden, f"{name}.in_proj_qkv"), f"{name}.conv1d"))
        query, key, value = mixed.split([key_heads * keys, key_heads * keys, heads * values], dim=-1)
        rates = torch.sigmoid(self.linear(hidden, f"{name}.in_proj_b"))
        steps = softplus(self.linear(hidden, f"{name}.in_proj_a") + self.weights[f"{name}.dt_bias"])
        kept = torch.exp(-self.weights[f"{name}.A_log"].exp() * steps)
        gates = silu(self.linear(hidden, f"{name}.in_proj_z")).view(-1, heads, values)
        outputs = torch.zeros(len(hidden), heads, values, dtype=torch.float64)
        for head in range(heads):
            shared = head * key_heads // heads
            state = torch.zeros(keys, values, dtype=torch.float64)
            for position in range(len(hidden)):
                q, k = (part[position].view(key_heads, keys)[shared] for part in (query, key))
                q, k = q / torch.sqrt(q @ q + 1e-6) / math.sqrt(keys), k / torch.sqrt(k @ k + 1e-6)
                state = state * kept[position, head]
                told = value[position].view(heads, values)[head]
                state = state + torch.outer(k, (told - k @ state) * rates[position, head])
                outputs[position, head] = q @ state
        mean_square = outputs.square().mean(-1, keepdim=True)
        normed = outputs / torch.sqrt(mean_square + self.config["rms_norm_eps"]) * self.weights[f"{name}.norm.weight"]
        return self.linear((normed * gates).flatten(1), f"{name}.out_proj")

    def convolved(self, rows: Tensor, name: str) -> Tensor:
        """Each column by itself: a row and those before it, by its weights; before the first are zeros."""
        weight = self.weights[f"{name}.weight"].squeeze(1)  # [columns, taps]
        summed = torch.zeros_like(rows)
        for position in range(len(rows)):
            for tap in range(weight.shape[1]):
                other = position - (weight.shape[1] - 1 - tap)
                if other >= 0:
                    summed[position] += weight[:, tap] * rows[other]
        return summed

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
        if f"{name[:-4]}.feed_forward.w1.weight" in self.weights:
            held = f"{name[:-4]}.feed_forward"
            opened = silu(self.linear(hidden, f"{held}.w1")) * self.linear(hidden, f"{held}.w3")
            return self.linear(opened, f"{held}.w2")
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
            whole = of_row[chosen].sum() if self.config.get("norm_topk_prob", True) else 1
            outputs = []
            for expert in chosen:
                their = f"{name}.experts.{expert}"
                opened = silu(self.linear(row, f"{their}.gate_proj")) * self.linear(row, f"{their}.up_proj")
                outputs.append(self.linear(opened, f"{their}.down_proj") * of_row[expert] / whole)
            rows.append(torch.stack(outputs).sum(0))
        summed = torch.stack(rows)
        if f"{name}.shared_expert_gate.weight" in self.weights:
            shared = self.mlp(hidden, f"{name}.shared_expert")
            summed = summed + torch.sigmoid(self.linear(hidden, f"{name}.shared_expert_gate")) * shared
        return summed

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
        weight = self.weights[f"{name}.weight"] + (1 if self.holds_norms_above_1 else 0)
        epsilon = self.config["norm_eps"] if "norm_eps" in self.config else self.config["rms_norm_eps"]
        return vectors / torch.sqrt(mean_square + epsilon) * weight

    def linear(self, vectors: Tensor, name: str) -> Tensor:
        product = vectors @ self.weights[f"{name}.weight"].T
        bias = self.weights.get(f"{name}.bias")
        return product if bias is None else product + bias
