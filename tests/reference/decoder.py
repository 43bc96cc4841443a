"""A decoder-only model computed from its whole history in float64, one query at a time.

It reads the files of a model and knows nothing of slabs, batches, masks or transformers: what the product computes for
a row must come out here too, whatever the history went through.
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import silu

from tests.reference.window import positions_seen


class ReferenceDecoder:
    """Qwen3, Qwen2, Llama or Mistral with plain rotary embeddings."""

    def __init__(self, directory: Path) -> None:
        self.config = json.loads((directory / "config.json").read_text())
        assert self.config["rope_parameters"]["rope_type"] == "default"
        self.weights = {name: w.double() for name, w in load_file(directory / "model.safetensors").items()}
        self.heads: int = self.config["num_attention_heads"]
        self.kv_heads: int = self.config["num_key_value_heads"]
        self.head_dim: int = self.config.get("head_dim") or self.config["hidden_size"] // self.heads

    def logits(self, tokens: list[int], sink: int, window: int) -> Tensor:
        """Logits [tokens, vocabulary] of a history in which each token attends to what it may, as of its position."""
        hidden = self.weights["model.embed_tokens.weight"][tokens]
        for layer in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            normed = self.normed(hidden, f"{name}.input_layernorm")
            hidden = hidden + self.attention(normed, f"{name}.self_attn", sink, window)
            normed = self.normed(hidden, f"{name}.post_attention_layernorm")
            gate = silu(self.linear(normed, f"{name}.mlp.gate_proj"))
            hidden = hidden + self.linear(gate * self.linear(normed, f"{name}.mlp.up_proj"), f"{name}.mlp.down_proj")
        head = self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])
        return self.normed(hidden, "model.norm") @ head.T

    def attention(self, hidden: Tensor, name: str, sink: int, window: int) -> Tensor:
        length = len(hidden)
        queries = self.linear(hidden, f"{name}.q_proj").view(length, self.heads, self.head_dim)
        keys = self.linear(hidden, f"{name}.k_proj").view(length, self.kv_heads, self.head_dim)
        values = self.linear(hidden, f"{name}.v_proj").view(length, self.kv_heads, self.head_dim)
        if f"{name}.q_norm.weight" in self.weights:
            queries, keys = self.normed(queries, f"{name}.q_norm"), self.normed(keys, f"{name}.k_norm")
        shared_by = self.heads // self.kv_heads
        keys, values = keys.repeat_interleave(shared_by, dim=1), values.repeat_interleave(shared_by, dim=1)
        attended = []
        for position in range(length):
            seen = sorted(positions_seen(position, sink, window))
            # A sink is as far away as it would be at the end of the first window: the place inside what is held.
            near = min(position, sink + window - 1)
            distances = [(near if other < sink else position) - other for other in seen]
            turned = self.turned(queries[position], distances)  # [seen, heads, head_dim]
            scores = (turned * keys[seen]).sum(-1) / math.sqrt(self.head_dim)  # [seen, heads]
            shares = torch.softmax(scores, dim=0)
            attended.append((shares.unsqueeze(-1) * values[seen]).sum(0).flatten())
        return self.linear(torch.stack(attended), f"{name}.o_proj")

    def turned(self, query: Tensor, distances: list[int]) -> Tensor:
        """`query` [heads, head_dim] as seen from keys that lie `distances` before it and are not turned themselves."""
        theta = self.config["rope_parameters"]["rope_theta"]
        half = self.head_dim // 2
        frequencies = torch.tensor([theta ** (-pair / half) for pair in range(half)], dtype=torch.float64)
        angles = torch.tensor(distances, dtype=torch.float64).view(-1, 1, 1) * frequencies  # [seen, 1, half]
        low, high = query[:, :half], query[:, half:]
        return torch.cat((low * angles.cos() - high * angles.sin(), high * angles.cos() + low * angles.sin()), dim=-1)

    def normed(self, vectors: Tensor, name: str) -> Tensor:
        mean_square = vectors.square().mean(-1, keepdim=True)
        return vectors / torch.sqrt(mean_square + self.config["rms_norm_eps"]) * self.weights[f"{name}.weight"]

    def linear(self, vectors: Tensor, name: str) -> Tensor:
        product = vectors @ self.weights[f"{name}.weight"].T
        bias = self.weights.get(f"{name}.bias")
        return product if bias is None else product + bias
