"""Which models the OpenVINO engine can run, and for which it is the best choice, without importing OpenVINO."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedConfig

from runtime.engine.architectures import missing_parts
from runtime.engine.configuration import attention_shape, read_config
from runtime.engine.machine import Level, level
from runtime.settings import Settings

# This many consecutive weights of a row share a scale.
GROUP = 32
# Attention takes this many numbers of a head at once.
_HEAD_STEP = 16


def is_best_by(settings: Settings, directory: Path) -> bool:
    """Whether the settings allow this engine, and it is the fastest for the model on this machine.

    That was measured on CPUs with AVX-512.
    """
    config = read_config(directory)
    is_on_cpu = settings.device == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    return (
        settings.device in ("auto", "cpu")
        and is_on_cpu
        and settings.dtype == "auto"
        and level() >= Level.AVX512
        and can_build(config)
    )


def can_build(config: PreTrainedConfig) -> bool:
    """Whether the engine's graphs cover the layers of this configuration, and their sizes divide into groups."""
    if missing_parts(config, "openvino"):
        return False
    heads, _, head_dim = attention_shape(config)
    sizes = (config.hidden_size, config.intermediate_size, heads * head_dim)
    return config.hidden_act == "silu" and not any(size % GROUP for size in sizes) and head_dim % _HEAD_STEP == 0
