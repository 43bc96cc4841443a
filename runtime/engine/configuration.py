"""Setup shared by all engines: what a model's configuration and the settings make of slabs, forms and memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from runtime.checkpoints import AS_DATA, FILE_ERRORS
from runtime.engine import EngineFacts
from runtime.engine.architectures import (
    ARCHITECTURES,
    attending_kinds,
    fault_of_layers,
    missing_parts,
    recurrent_spec,
)
from runtime.errors import InvalidSetting, ModelUnavailable, NotEnoughMemory, NotExact
from runtime.gguf_model import gguf_config
from runtime.model_files import one_line, quiet_transformers, read_checked_config
from runtime.proposers.ngram import PromptLookup
from runtime.settings import Settings
from runtime.slab import BUCKET_SLOTS, SlabSpec

# How weights are held that stay as a GGUF file has them.
KEPT = "kept"
# The more rows in a forward, the faster a prompt is read.
ROW_TILE = 256
# Recurrent layers keep a state for each chunk of a tile.
_RECURRENT_TILE = 32
# Handing so little out to more threads costs more than it saves, several times more where other programs run.
_ONE_THREAD_BYTES = 32 * 2**20


@dataclass(frozen=True, slots=True)
class Form:
    """The type that an engine computes in and how it holds its weights; `reason` says why, where a setting was auto."""

    dtype: torch.dtype
    weights: str
    reason: str = ""

    def __str__(self) -> str:
        return f"dtype={str(self.dtype).removeprefix('torch.')} weights={self.weights}"

    def after(self, failed: Sequence[Form]) -> Form:
        """This form, its reason being that those before it `failed` too."""
        reasons = [*(f"{one} is not bit-exact in batches here" for one in failed), self.reason]
        return replace(self, reason=", ".join(filter(None, reasons)))


def read_config(directory: Path) -> PreTrainedConfig:
    """The configuration of a model that this release runs. Raises ModelUnavailable."""
    is_file = directory.is_file()
    if not is_file:
        read_checked_config(directory)
    try:
        with quiet_transformers():
            config = gguf_config(directory) if is_file else AutoConfig.from_pretrained(directory, **AS_DATA)
    except FILE_ERRORS as error:
        raise ModelUnavailable(
            f"{directory} has no configuration that transformers can read: {one_line(error)}"
        ) from error
    text = config.get_text_config()
    if text.model_type in ARCHITECTURES and ARCHITECTURES[text.model_type].inside == config.model_type:
        config = text
    if config.model_type not in ARCHITECTURES:
        raise ModelUnavailable(
            f"{directory} is of architecture {config.model_type!r}; this release runs {', '.join(ARCHITECTURES)}"
        )
    if getattr(config, "use_bidirectional_attention", False):
        raise ModelUnavailable(f"{directory} looks ahead, as models of embeddings do: it cannot generate")
    if fault := fault_of_layers(config):
        raise ModelUnavailable(f"the configuration in {directory} makes no model: {fault}")
    return config


def check_covered(config: PreTrainedConfig, engine: str) -> None:
    """Raises ModelUnavailable where a model of this configuration has parts for which an engine has no code."""
    if missing := missing_parts(config, engine):
        raise ModelUnavailable(
            f"backend={engine} has no code for {', '.join(sorted(missing))}, which {config.model_type} has: set backend to auto "
            "or torch"
        )


def count_weights(config: PreTrainedConfig, directory: Path) -> int:
    """How many weights the model in `directory` has. Raises ModelUnavailable."""
    try:
        with torch.device("meta"), quiet_transformers():
            return sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    except FILE_ERRORS as error:
        raise ModelUnavailable(f"the configuration in {directory} makes no model: {one_line(error)}") from error


def is_small(weights: int) -> bool:
    """Whether a model of so many weights stays in a CPU's cache, and runs fastest on one thread."""
    return weights * torch.float32.itemsize < _ONE_THREAD_BYTES


def attention_shape(config: PreTrainedConfig) -> tuple[int, int, int]:
    """How many heads ask, how many hold keys and values, and how wide each is."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def slab_spec(
    config: PreTrainedConfig,
    settings: Settings,
    dtype: torch.dtype,
    device: torch.device,
    *,
    row_tile: int = ROW_TILE,
    bucket: int = BUCKET_SLOTS,
    others: Sequence[str] = (),
) -> SlabSpec:
    """The shape of slabs of an engine that computes in `dtype`, and whose attention reads slabs of `others` too.

    The window is cut down to what the model can see. Raises InvalidSetting.
    """
    own = str(dtype).removeprefix("torch.")
    if settings.kv_dtype not in ("auto", own, *others):
        raise InvalidSetting(
            f"kv_dtype={settings.kv_dtype} cannot be had beside dtype={own} here: set kv_dtype to auto, or backend to openvino"
        )
    longest = config.max_position_embeddings
    # What no layer sees need not be kept.
    kinds = attending_kinds(config)
    longest = max(min(longest, kind.window or longest) for kind in kinds)
    if settings.sink >= longest:
        raise InvalidSetting(f"sink must be less than the model's maximum context of {longest}, got {settings.sink}")
    _, kv_heads, head_dim = attention_shape(config)
    recurrent = recurrent_spec(config)
    return SlabSpec(
        layers=len(kinds),
        kv_heads=kv_heads,
        head_dim=head_dim,
        sink=settings.sink,
        window=min(settings.window, longest - settings.sink),
        row_tile=min(row_tile, _RECURRENT_TILE) if recurrent else row_tile,
        dtype=dtype if settings.kv_dtype == "auto" else named_dtype(settings.kv_dtype),
        device=device,
        bucket=bucket,
        recurrent=recurrent,
    )


def named_dtype(name: str) -> torch.dtype:
    """The type that the setting `dtype` or `kv_dtype` names, unless it says auto."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def check_memory(weights: int, free: int, settings: Settings, spec: SlabSpec, beside: EngineFacts | None) -> None:
    """Raises NotEnoughMemory where so many bytes of weights, and all slabs once full, exceed the `free` ones."""
    slabs = settings.capacity + settings.max_concurrent
    # Slabs take their memory as they fill.
    others = slabs * beside.slab.ceiling_bytes if beside else 0
    if settings.proposer == "ngram":
        others += slabs * PromptLookup.ceiling_bytes()
    needed = weights + slabs * spec.ceiling_bytes + others
    if needed > free:
        raise NotEnoughMemory(
            f"{needed / 2**30:.1f} GiB needed (weights {weights / 2**30:.1f}, {slabs} slabs of "
            f"{spec.ceiling_bytes / 2**30:.2f}) and {free / 2**30:.1f} free: lower window, capacity or max_concurrent"
        )


def refuse(failed: Sequence[Form]) -> NotExact:
    """What is said where none of the forms that the settings leave is bit-exact on this machine."""
    return NotExact(
        f"determinism=strict cannot be had here with {' or '.join(map(str, failed))}: a row gets other bits in other "
        "batches; set dtype and weights to auto, or determinism to fast"
    )
