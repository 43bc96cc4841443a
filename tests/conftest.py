"""Fixtures of every test: small models, made here, and the bundled one."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

# Threads that spin while they wait take the cores of whatever else runs here, and tests grow many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from hypothesis import settings
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from runtime.errors import ModelUnavailable
from runtime.models import SEEDLING, find_model
from runtime.smollm2 import SMOLLM2

pytest_plugins = ["tests.s3_server", "tests.runtime.durable.buckets", "tests.soak.ledger"]

# How long a case takes depends on what else runs here.
settings.register_profile("perennial", deadline=None)
settings.load_profile("perennial")

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
HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 32,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
# Of the layers that have one, shorter than most windows of tests.
OWN_WINDOW = 16
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}


def small_gpt_oss(rope_parameters: Mapping[str, Any]) -> GptOssConfig:
    return GptOssConfig(
        **SMALL,
        head_dim=32,
        sliding_window=OWN_WINDOW,
        num_local_experts=8,
        num_experts_per_tok=2,
        rope_parameters={**rope_parameters},
    )


# One of each architecture that we run.
SMALL_CONFIGS: Mapping[str, PreTrainedConfig] = {
    "qwen3": Qwen3Config(**SMALL, head_dim=32, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SMALL),
    "llama": LlamaConfig(**SMALL, head_dim=32, attention_bias=True),
    "mistral": MistralConfig(**SMALL, head_dim=32, sliding_window=256),
    "qwen3_moe": Qwen3MoeConfig(
        **SMALL, head_dim=32, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True
    ),
    "smollm3": SmolLM3Config(**SMALL, no_rope_layers=[1, 0]),
    "phi3": Phi3Config(**SMALL, rope_parameters={**DEFAULT_ROPE, "partial_rotary_factor": 0.5}),
    "gemma2": Gemma2Config(**SMALL, head_dim=32, sliding_window=OWN_WINDOW, query_pre_attn_scalar=16),
    "gemma3_text": Gemma3TextConfig(
        **SMALL, head_dim=32, sliding_window=OWN_WINDOW, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt_oss": small_gpt_oss(DEFAULT_ROPE),
    "lfm2": Lfm2Config(**SMALL | {"num_hidden_layers": 3}, layer_types=["conv", "full_attention", "conv"]),
    "qwen3_5_text": Qwen3_5TextConfig(**SMALL, **HYBRID),
    "qwen3_5_moe_text": Qwen3_5MoeTextConfig(
        **SMALL,
        **HYBRID,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    ),
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
                # Some architectures hold what a norm's factors exceed 1 by.
                weight.normal_(mean=float(weight[0]) if "norm" in name else 0.0, std=0.2)
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
