"""Which models the OpenVINO engine can run, and for which it is the best choice, without importing OpenVINO."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig

from runtime.engine.architectures import missing_parts
from runtime.engine.configuration import attention_shape, count_weights, is_small, read_config
from runtime.engine.machine import Level, hardware_level, level
from runtime.errors import ModelUnavailable
from runtime.gguf_file import GgufFile
from runtime.model_files import count_stored
from runtime.settings import Settings

# This many consecutive weights of a row share a scale.
GROUP = 32
# Attention takes this many numbers of a head at once.
_HEAD_STEP = 16


def is_best_by(settings: Settings, directory: Path) -> bool:
    """Whether the settings allow this engine, and it is the fastest for the model on this machine.

    On a CPU with AVX2 alone its graphs hold weights that are not quantised in 32 bits, and torch's linears in 16.
    """
    config = read_config(directory)
    is_on_cpu = settings.device == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    return (
        settings.device in ("auto", "cpu")
        and is_on_cpu
        and settings.dtype == "auto"
        and fits_cpu()
        and can_build(config)
        and (level() >= Level.AVX512 or settings.weights != "none" or is_small_model(config, directory))
    )


def fits_cpu() -> bool:
    """Whether its kernels were tried on CPUs like this one. What limits torch's libraries does not limit them in the same way."""
    return level() >= Level.AVX512 or level() == hardware_level() == Level.AVX2


def is_small_model(config: PreTrainedConfig, directory: Path) -> bool:
    """Whether the model's weights fit into a CPU's cache, those that its files have twice counted twice.

    Its code need not be imported for it. What is wrong with the files is for an engine to say. Raises ModelUnavailable.
    """
    with suppress(ModelUnavailable, OSError, SafetensorError):
        if directory.is_file():
            return is_small(sum(math.prod(stored.shape) for stored in GgufFile.read(directory).weights().values()))
        return is_small(count_stored(directory))
    return is_small(count_weights(config, directory))


def can_build(config: PreTrainedConfig) -> bool:
    """Whether the engine's graphs cover the layers of this configuration, and their sizes divide into groups."""
    if missing_parts(config, "openvino"):
        return False
    heads, _, head_dim = attention_shape(config)
    sizes = (config.hidden_size, config.intermediate_size, heads * head_dim)
    return config.hidden_act == "silu" and not any(size % GROUP for size in sizes) and head_dim % _HEAD_STEP == 0
