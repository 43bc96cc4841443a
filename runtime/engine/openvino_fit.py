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
from runtime.engine.machine import Level, level
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

    That was measured on CPUs with AVX-512. One that cannot multiply 16-bit numbers would round the weights of a model that fits
    into its cache, which torch multiplies as they are.
    """
    config = read_config(directory)
    is_on_cpu = settings.device == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    return (
        settings.device in ("auto", "cpu")
        and is_on_cpu
        and settings.dtype == "auto"
        and level() >= Level.AVX512
        and can_build(config)
        and (level() >= Level.AVX512_BF16 or not is_small(_count(config, directory)))
    )


def _count(config: PreTrainedConfig, directory: Path) -> int:
    """How many weights the model's files have, those that are there twice counted twice; its code need not be imported for it.

    What is wrong with the files is for an engine to say. Raises ModelUnavailable.
    """
    with suppress(ModelUnavailable, OSError, SafetensorError):
        if directory.is_file():
            return sum(math.prod(stored.shape) for stored in GgufFile.read(directory).weights().values())
        return count_stored(directory)
    return count_weights(config, directory)


def can_build(config: PreTrainedConfig) -> bool:
    """Whether the engine's graphs cover the layers of this configuration, and their sizes divide into groups."""
    if missing_parts(config, "openvino"):
        return False
    heads, _, head_dim = attention_shape(config)
    sizes = (config.hidden_size, config.intermediate_size, heads * head_dim)
    return config.hidden_act == "silu" and not any(size % GROUP for size in sizes) and head_dim % _HEAD_STEP == 0
