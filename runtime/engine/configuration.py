"""Setup shared by all engines: what a model's configuration and the settings make of slabs, forms and memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from runtime.checkpoints import AS_DATA, FILE_ERRORS
from runtime.dtypes import name_of
from runtime.engine import EngineFacts
from runtime.engine.architectures import (
    ARCHITECTURES,
    attending_kinds,
    fault_of_layers,
    missing_parts,
    recurrent_spec,
)
from runtime.engine.exact import Claim
from runtime.engine.machine import features
from runtime.errors import InvalidSetting, ModelUnavailable, NotEnoughMemory, NotExact
from runtime.gguf_model import gguf_config
from runtime.model_files import one_line, quiet_transformers, read_checked_config
from runtime.proposers.ngram import PromptLookup
from runtime.settings import Settings
from runtime.slab_spec import BUCKET_SLOTS, SlabSpec

# The name of the form of weights that stay as a GGUF file has them.
KEPT = "kept"
# Why a model below a size is neither rounded nor computed in fewer bits.
IN_CACHE = "so small a model stays in the CPU's cache"
# Rows of a forward; with more of them prompts are read faster.
ROW_TILE = 256
# The head has few rows, one for each session, and its probe takes longest.
HEAD_MOST_ROWS = 32
# Smaller, because recurrent layers keep a state for each chunk of a tile.
_RECURRENT_TILE = 32
# A model below this size runs on one thread: sharing so little work costs more than it saves, and much more beside busy
# programs.
_ONE_THREAD_BYTES = 32 * 2**20


@dataclass(frozen=True, slots=True)
class Form:
    """The type that an engine computes in and how it holds its weights; `reason` says why, where a setting was auto."""

    dtype: torch.dtype
    weights: str
    reason: str = ""

    def __str__(self) -> str:
        return f"dtype={name_of(self.dtype)} weights={self.weights}"

    def after(self, failed: Sequence[Form]) -> Form:
        """This form, with the `failed` ones before it added to its reason."""
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
        text = config.get_text_config()
        kind = text.model_type
    except FILE_ERRORS as error:
        raise ModelUnavailable(
            f"{directory} has no configuration that transformers can read: {one_line(error)}"
        ) from error
    if kind in ARCHITECTURES and ARCHITECTURES[kind].inside == config.model_type:
        config = text
    if config.model_type not in ARCHITECTURES:
        raise ModelUnavailable(
            f"{directory} is of architecture {config.model_type!r}; this release runs {', '.join(ARCHITECTURES)}"
        )
    if getattr(config, "use_bidirectional_attention", False):
        raise ModelUnavailable(f"{directory} attends in both directions, as embedding models do: it cannot generate")
    if fault := fault_of_layers(config):
        raise ModelUnavailable(f"the configuration in {directory} makes no model: {fault}")
    return config


def check_covered(config: PreTrainedConfig, engine: str) -> None:
    """Raises ModelUnavailable if a model of this configuration has parts for which this engine has no code."""
    if missing := missing_parts(config, engine):
        raise ModelUnavailable(
            f"backend={engine} has no code for {', '.join(sorted(missing))}, which {config.model_type} has: set backend to auto "
            "or torch"
        )


def count_weights(config: PreTrainedConfig, directory: Path) -> int:
    """The number of weights of the model in `directory`. Raises ModelUnavailable."""
    try:
        with torch.device("meta"), quiet_transformers():
            return sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    except FILE_ERRORS as error:
        raise ModelUnavailable(f"the configuration in {directory} makes no model: {one_line(error)}") from error


def is_small(weights: int) -> bool:
    """Whether a model with this many weights fits into a CPU's cache, and runs fastest on one thread."""
    return weights * torch.float32.itemsize < _ONE_THREAD_BYTES


def attention_shape(config: PreTrainedConfig) -> tuple[int, int, int]:
    """The number of query heads, the number of kv heads, and their dimension."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def slab_spec(
    config: PreTrainedConfig,
    settings: Settings,
    dtype: torch.dtype,
    *,
    row_tile: int = ROW_TILE,
    bucket: int = BUCKET_SLOTS,
    others: Sequence[str] = (),
) -> SlabSpec:
    """The shape of slabs for an engine that computes in `dtype` and whose attention can also read slabs of the types `others`.

    The window is cut down to what the model can see. Raises InvalidSetting.
    """
    own = name_of(dtype)
    if settings.kv_dtype not in ("auto", own, *others):
        raise InvalidSetting(
            f"kv_dtype={settings.kv_dtype} cannot be had beside dtype={own} here: set kv_dtype to auto, or backend to openvino"
        )
    longest = config.max_position_embeddings
    # Tokens that no layer can see need not be kept.
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
        dtype=own if settings.kv_dtype == "auto" else settings.kv_dtype,
        bucket=bucket,
        recurrent=recurrent,
    )


def check_memory(weights: int, free: int, settings: Settings, spec: SlabSpec, beside: EngineFacts | None) -> None:
    """Raises NotEnoughMemory if `weights` bytes and all slabs, once full, exceed `free` bytes."""
    slabs = settings.capacity + settings.max_concurrent
    # Slabs take their memory as they fill, so that of the other engine is not taken yet.
    others = slabs * beside.slab.ceiling_bytes if beside else 0
    if settings.proposer == "ngram":
        others += slabs * PromptLookup.ceiling_bytes()
    needed = weights + slabs * spec.ceiling_bytes + others
    if needed > free:
        raise NotEnoughMemory(
            f"{needed / 2**30:.1f} GiB needed (weights {weights / 2**30:.1f}, {slabs} slabs of "
            f"{spec.ceiling_bytes / 2**30:.2f}) and {free / 2**30:.1f} free: lower window, capacity or max_concurrent"
        )


def engine_facts(
    backend: str,
    config: PreTrainedConfig,
    form: Form,
    spec: SlabSpec,
    *,
    device: str,
    weights_bytes: int,
    row_step: int,
    kernel_class: str,
    is_bit_exact: bool,
    claims: Iterable[Claim],
    tried: str,
    tensors: tuple[str, ...] = (),
) -> EngineFacts:
    """The facts of an engine of this `form`. `claims` and `tried` are used only if it is bit-exact."""
    return EngineFacts(
        backend=backend,
        device=device,
        dtype=name_of(form.dtype),
        weights=form.weights,
        form_reason=form.reason,
        architecture=config.model_type,
        vocabulary=config.vocab_size,
        weights_bytes=weights_bytes,
        row_tile=spec.row_tile,
        row_step=row_step,
        is_bit_exact=is_bit_exact,
        claims=tuple(map(str, claims)) if is_bit_exact else (),
        tried=tried if is_bit_exact else "",
        cpu_features=features(),
        kernel_class=kernel_class,
        slab=spec,
        tensors=tensors,
    )


def refuse(failed: Sequence[Form]) -> NotExact:
    """The error if none of the forms that the settings allow is bit-exact on this machine."""
    return NotExact(
        f"determinism=strict cannot be had here with {' or '.join(map(str, failed))}: a row gets other bits in other "
        "batches; set dtype and weights to auto, or determinism to fast"
    )
