"""GGUF files of the models that tests make, written as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

Kind = GGMLQuantizationType
KindOf = Callable[[str], Kind]

# Where a block of each kind has its numbers in half precision; the last of two is what is taken off, in kinds named K.
HALVES: Mapping[Kind, tuple[int, ...]] = {
    Kind.Q8_0: (0,),
    Kind.Q4_0: (0,),
    Kind.Q4_1: (0, 2),
    Kind.Q5_0: (0,),
    Kind.Q5_1: (0, 2),
    Kind.Q2_K: (80, 82),
    Kind.Q3_K: (108,),
    Kind.Q4_K: (0, 2),
    Kind.Q5_K: (0, 2),
    Kind.Q6_K: (208,),
    Kind.MXFP4: (),
}
# What the gguf package rounds to itself; blocks of the others are drawn.
ROUNDED = (Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.MXFP4)
# llama.cpp's names of architectures, where they are not transformers'.
_THEIR_NAMES: Mapping[str, str] = {"mistral": "llama", "gpt_oss": "gpt-oss"}
# Files have one kind for most tensors and another for some; here each product of a layer meets another.
_KINDS_BY_PART: Mapping[str, tuple[Kind, Kind]] = {
    "attn_q": (Kind.Q4_K, Kind.Q8_0),
    "attn_k": (Kind.Q4_K, Kind.F16),
    "attn_v": (Kind.Q6_K, Kind.BF16),
    "attn_output": (Kind.Q5_0, Kind.Q4_0),
    "ffn_gate": (Kind.Q4_1, Kind.Q5_K),
    "ffn_up": (Kind.Q5_1, Kind.Q5_K),
    "ffn_down": (Kind.Q6_K, Kind.Q3_K),
}


def every_kind(name: str) -> Kind:
    """Kinds for a model whose widths are multiples of 256, other ones in every second layer."""
    match name.split("."):
        case ["blk", layer, part, _]:
            return _KINDS_BY_PART[part][int(layer) % 2]
    return Kind.Q6_K


def blocks_alone(name: str) -> Kind:
    """As `every_kind`, but for kinds that are not quantised, and one that has no form here."""
    others = {Kind.F16: Kind.Q4_0, Kind.BF16: Kind.Q5_1, Kind.Q3_K: Kind.Q4_1}
    kind = every_kind(name)
    return others.get(kind, kind)


def drawn_blocks(kind: Kind, outputs: int, inputs: int, seed: int = 0) -> NDArray[np.uint8]:
    """A matrix of random blocks [outputs, bytes], whose values are about as large as those of a trained one."""
    choice = np.random.default_rng(seed)
    values, size = GGML_QUANT_SIZES[kind]
    blocks = choice.integers(0, 256, (outputs * inputs // values, size), dtype=np.uint8)
    for at in HALVES[kind]:
        scales = choice.uniform(-1e-3, 1e-3, (len(blocks), 1)).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8)
    if kind is Kind.MXFP4:
        blocks[:, 0] = choice.integers(112, 120, len(blocks))
    return blocks.reshape(outputs, -1)


def write_gguf(
    directory: Path,
    path: Path,
    kind_of: KindOf = lambda _: Kind.F32,
    rope_factors: Tensor | None = None,
    **metadata: Any,
) -> dict[str, Tensor]:
    """A GGUF file of the model in `directory`, each matrix of the kind for its name there; returns what its weights are.

    `metadata` takes the place of what the model itself would say, or leaves out what is None; dots are written as __.
    """
    config = json.loads((directory / "config.json").read_text())
    architecture = _THEIR_NAMES.get(config["model_type"], config["model_type"])
    writer = GGUFWriter(path, architecture)
    _add_metadata(writer, config | {"architecture": architecture}, directory, metadata)
    names = gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), config["num_hidden_layers"]
    )
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors.numpy())

    def written(name: str, values: NDArray[Any]) -> NDArray[Any]:
        """What it stands for once it is in the file."""
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs is not None
        kind = kind_of(theirs) if values.ndim > 1 and name.endswith("weight") else Kind.F32
        raw = gguf.quantize(values, kind) if kind in ROUNDED else drawn_blocks(kind, *values.shape)
        writer.add_tensor(theirs, raw, raw_dtype=kind)
        return gguf.dequantize(raw, kind)

    weights = {}
    for name, tensor in sorted(load_file(directory / "model.safetensors").items()):
        heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
        turned = architecture == "llama" and ("q_proj" in name or "k_proj" in name)
        values = tensor.float().numpy()
        if architecture == "gpt-oss" and (".experts." in name or "sinks" in name):
            dense = _of_gpt_oss(name, values, written)
        elif turned:
            dense = _deinterleaved(written(name, _interleaved(values, heads)), heads)
        else:
            dense = written(name, values)
        weights[name] = torch.tensor(dense)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def _of_gpt_oss(name: str, values: NDArray[Any], written: Callable[[str, NDArray[Any]], NDArray[Any]]) -> NDArray[Any]:
    """Experts as llama.cpp has them: outputs before inputs, and what gates apart from what goes through."""
    if name.endswith("sinks"):
        return written(f"{name}.weight", values)
    if name.endswith("down_proj"):
        return written(f"{name}.weight", np.ascontiguousarray(values.swapaxes(1, 2))).swapaxes(1, 2).copy()
    if name.endswith("down_proj_bias"):
        return written(name.replace("_bias", ".bias"), values)
    dense = np.empty_like(values)
    for first, part in enumerate(("gate_proj", "up_proj")):
        one = values[..., first::2]
        if name.endswith("_bias"):
            dense[..., first::2] = written(name.replace("gate_up_proj_bias", f"{part}.bias"), np.ascontiguousarray(one))
        else:
            theirs = written(name.replace("gate_up_proj", f"{part}.weight"), np.ascontiguousarray(one.swapaxes(1, 2)))
            dense[..., first::2] = theirs.swapaxes(1, 2)
    return dense


def _interleaved(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows of queries or keys so that those that turn together are neighbours, as llama.cpp has them."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _deinterleaved(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _add_metadata(writer: GGUFWriter, config: Mapping[str, Any], directory: Path, changes: Mapping[str, Any]) -> None:
    architecture = config["architecture"]
    values: dict[str, Any] = {
        f"{architecture}.context_length": config["max_position_embeddings"],
        f"{architecture}.embedding_length": config["hidden_size"],
        f"{architecture}.block_count": config["num_hidden_layers"],
        f"{architecture}.feed_forward_length": config["intermediate_size"],
        f"{architecture}.attention.head_count": config["num_attention_heads"],
        f"{architecture}.attention.head_count_kv": config["num_key_value_heads"],
        f"{architecture}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        f"{architecture}.rope.freq_base": float(config["rope_parameters"]["rope_theta"]),
        **_tokenizer(directory),
    }
    if architecture == "gpt-oss":
        values |= {
            "gpt-oss.expert_count": config["num_local_experts"],
            "gpt-oss.expert_used_count": config["num_experts_per_tok"],
            "gpt-oss.expert_feed_forward_length": config["intermediate_size"],
            "gpt-oss.attention.sliding_window": config["sliding_window"],
        }
        rope = config["rope_parameters"]
        if rope["rope_type"] == "yarn":
            values |= {
                "gpt-oss.rope.scaling.type": "yarn",
                "gpt-oss.rope.scaling.factor": float(rope["factor"]),
                "gpt-oss.rope.scaling.original_context_length": rope["original_max_position_embeddings"],
            }
    if "head_dim" in config:
        values[f"{architecture}.attention.key_length"] = config["head_dim"]
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    for key, value in values.items():
        match value:
            case None:
                pass
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case np.float64():
                writer.add_float64(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case _:
                writer.add_array(key, value)


def _tokenizer(directory: Path) -> dict[str, Any]:
    """Byte-level BPE with single digits, as Qwen's own."""
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    spelled = {token_id: token for token, token_id in tokenizer["model"]["vocab"].items()} | special
    merges = tokenizer["model"]["merges"]
    ids = {token: token_id for token_id, token in special.items()}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [spelled[token_id] for token_id in range(len(spelled))],
        "tokenizer.ggml.token_type": [
            int(gguf.TokenType.CONTROL if token_id in special else gguf.TokenType.NORMAL)
            for token_id in range(len(spelled))
        ],
        "tokenizer.ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
        "tokenizer.ggml.eos_token_id": ids["<|im_end|>"],
        "tokenizer.ggml.padding_token_id": ids["<|endoftext|>"],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": (directory / "chat_template.jinja").read_text(),
    }
