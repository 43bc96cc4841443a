"""Fixtures of every test: small models, made here, and the bundled one."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

# Threads that spin while they wait take the cores of whatever else runs here, and tests grow many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from runtime.errors import ModelUnavailable
from runtime.models import SEEDLING, find_model
from runtime.smollm2 import SMOLLM2

pytest_plugins = ["tests.soak.ledger"]

SMALL = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
    "bos_token_id": None,
    "pad_token_id": 0,
}
SMALL_CONFIGS: Mapping[str, PreTrainedConfig] = {
    "qwen3": Qwen3Config(**SMALL, head_dim=32, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SMALL),
    "llama": LlamaConfig(**SMALL, head_dim=32, attention_bias=True),
    "mistral": MistralConfig(**SMALL, head_dim=32, sliding_window=256),
}


def save_random_model(config: PreTrainedConfig, directory: Path) -> Path:
    """Saves a model of `config` in float32 with weights so wide that attention is sharp; with seedling's tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(std=1.5 / weight.shape[-1] ** 0.5)
            else:
                weight.normal_(mean=1.0 if "norm" in name else 0.0, std=0.2)
    model.save_pretrained(directory)
    for file in find_model(SEEDLING).iterdir():
        if file.name.startswith("tokenizer") or file.suffix == ".jinja":
            shutil.copy(file, directory)
    return directory


@pytest.fixture(scope="session")
def seedling() -> Path:
    """The directory of the bundled model."""
    return find_model(SEEDLING)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The file of SmolLM2, fetched into this user's cache where it is not there yet."""
    try:
        return find_model(SMOLLM2)
    except ModelUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def small_models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Directories of random models, by the names of `SMALL_CONFIGS`."""
    home = tmp_path_factory.mktemp("small_models")
    return {name: save_random_model(config, home / name) for name, config in SMALL_CONFIGS.items()}
