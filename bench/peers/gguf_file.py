"""GGUF files of a model in a directory, beside its weights: `python -m bench.peers.gguf_file DIRECTORY WEIGHTS`.

Of a Qwen3 model float32 is written here, with the tensor names and keys of the `gguf` package; where the model was read from
a GGUF file, that lies there as `ORIGINAL`. llama.cpp itself makes the other kinds of it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import torch
from safetensors.torch import load_file

ORIGINAL = "original.gguf"
# By the names that llama.cpp's users know them by.
WEIGHTS = {
    "F32": llama_cpp.LLAMA_FTYPE_ALL_F32,
    "BF16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
}


def gguf_file(directory: Path, weights: str) -> Path:
    """The file with this kind of weights, made where it is not yet there."""
    path = directory / f"{weights}.gguf"
    if not path.exists():
        fresh = path.with_suffix(".new")
        if weights == "F32":
            _write(directory, fresh)
        else:
            original = directory / ORIGINAL
            source = original if original.exists() else gguf_file(directory, "F32")
            _quantise(source, fresh, WEIGHTS[weights])
        fresh.rename(path)
    return path


def _quantise(source: Path, target: Path, kind: int) -> None:
    terms = llama_cpp.llama_model_quantize_default_params()
    terms.ftype = kind
    terms.allow_requantize = True
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), terms):
        raise RuntimeError(f"llama.cpp could not quantise {source}")


def _write(directory: Path, path: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    _add_tokenizer(writer, directory, config["vocab_size"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config["num_hidden_layers"])
    for name, tensor in _tensors(directory):
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        known = names.get_name(name, try_suffixes=(".weight",))
        assert known is not None, name
        writer.add_tensor(known, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(directory: Path) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    for file in sorted(directory.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            yield name, tensor.to(torch.float32).numpy()


def _add_tokenizer(writer: Any, directory: Path, vocabulary: int) -> None:
    """Byte-level BPE with single digits, as Qwen's own; ids past the tokenizer's stand for nothing."""
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    spelled = {token_id: token for token, token_id in tokenizer["model"]["vocab"].items()}
    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    tokens, types = [], []
    for token_id in range(vocabulary):
        if token_id in special:
            tokens.append(special[token_id])
            types.append(gguf.TokenType.CONTROL)
        else:
            tokens.append(spelled.get(token_id, f"[unused{token_id}]"))
            types.append(gguf.TokenType.NORMAL if token_id in spelled else gguf.TokenType.UNUSED)
    ids = {token: token_id for token_id, token in special.items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_eos_token_id(ids["<|im_end|>"])
    writer.add_pad_token_id(ids["<|endoftext|>"])
    writer.add_add_bos_token(False)
    if (template := directory / "chat_template.jinja").exists():
        writer.add_chat_template(template.read_text())


if __name__ == "__main__":
    print(gguf_file(Path(sys.argv[1]), sys.argv[2]))
