"""What a model's configuration and the settings make of an engine, whatever runs it: shapes, row tiles, memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig, PreTrainedConfig

from runtime.checkpoints import CONFIG_ERRORS, one_line
from runtime.engine import EngineFacts
from runtime.engine.probe import RowSizes, growing
from runtime.engine.proven import first_proven
from runtime.errors import InvalidSetting, ModelUnavailable, NotEnoughMemory
from runtime.settings import Settings
from runtime.slab import BUCKET_SLOTS, SlabSpec

# Those whose logits the test suite compares with transformers' own.
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
# The largest first: the more rows in a forward, the faster a prompt is read.
STRICT_ROW_TILES = (256, 32)
_FAST_ROW_TILE = 256
_FAST_SIZES = RowSizes(growing(1, _FAST_ROW_TILE), growing(1, _FAST_ROW_TILE))


def read_config(directory: Path) -> PreTrainedConfig:
    """The configuration of a model that this release runs. Raises ModelUnavailable."""
    try:
        config = AutoConfig.from_pretrained(directory)
    except CONFIG_ERRORS as error:
        raise ModelUnavailable(
            f"{directory} has no configuration that transformers can read: {one_line(error)}"
        ) from error
    if config.model_type not in ARCHITECTURES:
        raise ModelUnavailable(
            f"{directory} is of architecture {config.model_type!r}; this release runs {', '.join(ARCHITECTURES)}"
        )
    return config


def slab_specs(
    config: PreTrainedConfig,
    settings: Settings,
    dtype: torch.dtype,
    device: torch.device,
    *,
    strict_tiles: Sequence[int] = STRICT_ROW_TILES,
    bucket: int = BUCKET_SLOTS,
) -> list[SlabSpec]:
    """The shapes that slabs may have, the one to be tried first before the others. The window is cut down to what the
    model can see. Raises InvalidSetting.
    """
    longest = config.max_position_embeddings
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        longest = min(longest, config.sliding_window)
    if settings.sink >= longest:
        raise InvalidSetting(f"sink must be less than the model's maximum context of {longest}, got {settings.sink}")
    heads = config.num_attention_heads
    of_any_tile = partial(
        SlabSpec,
        layers=config.num_hidden_layers,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        sink=settings.sink,
        window=min(settings.window, longest - settings.sink),
        dtype=dtype,
        device=device,
        bucket=bucket,
    )
    tiles = strict_tiles if settings.determinism == "strict" else (_FAST_ROW_TILE,)
    return [of_any_tile(row_tile=tile) for tile in tiles]


def named_dtype(name: str) -> torch.dtype:
    """The type that the setting `dtype` names, unless it says auto."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def check_memory(weights: int, free: int, settings: Settings, spec: SlabSpec, beside: EngineFacts | None) -> None:
    """Raises NotEnoughMemory where so many bytes of weights, and all slabs once full, exceed the `free` ones."""
    slabs = settings.capacity + settings.max_concurrent
    # Slabs take their memory as they fill.
    others = slabs * beside.slab.ceiling_bytes if beside else 0
    needed = weights + slabs * spec.ceiling_bytes + others
    if needed > free:
        raise NotEnoughMemory(
            f"{needed / 2**30:.1f} GiB needed (weights {weights / 2**30:.1f}, {slabs} slabs of "
            f"{spec.ceiling_bytes / 2**30:.2f}) and {free / 2**30:.1f} free: lower window, capacity or max_concurrent"
        )


class Choice(NamedTuple):
    """The shape of an engine's slabs, what its rows are padded to, and whether that was proven bit-exact."""

    spec: SlabSpec
    is_bit_exact: bool
    sizes: RowSizes


def choose_sizes(
    settings: Settings,
    specs: Sequence[SlabSpec],
    described: str,
    device: str,
    find: Callable[[SlabSpec], RowSizes | None],
) -> Choice:
    """Under `strict` the first of `specs` for which `find` finds sizes for the model `described`. Raises InvalidSetting."""
    if settings.determinism == "fast":
        return Choice(specs[0], False, _FAST_SIZES)
    found = first_proven(specs, described, find)
    if found is None:
        raise InvalidSetting(
            f"determinism=strict cannot be had here: {settings.model} in {specs[0].dtype} on {device} gives a row "
            "other bits in other batches; set determinism=fast, or another dtype"
        )
    spec, sizes = found
    return Choice(spec, True, sizes)
