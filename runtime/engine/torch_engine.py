"""The torch engine: transformers' own model code, fed with row batches, attending over slabs."""

from __future__ import annotations

import copy
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from runtime.checkpoints import CONFIG_ERRORS, load_weights, one_line
from runtime.engine import EngineFacts
from runtime.engine.attention import ATTENTION_NAME, AttentionAlone, plan_forward, slab_attention
from runtime.engine.configuration import (
    Choice,
    check_memory,
    choose_sizes,
    named_dtype,
    read_config,
    slab_specs,
)
from runtime.engine.drawing import DrawingEngine
from runtime.engine.linears import can_pack, replace_linears, weights_bytes
from runtime.engine.probe import RowSizes, find_sizes, padded
from runtime.engine.rotary import ExactRotary
from runtime.engine.torch_slab import torch_pool
from runtime.errors import InvalidSetting, ModelUnavailable
from runtime.rows import RowBatch
from runtime.settings import Settings
from runtime.slab import SlabPool, SlabSpec

# Handing so little out to more threads costs more than it saves, several times more where other programs run.
_ONE_THREAD_BYTES = 32 * 2**20

AttentionInterface.register(ATTENTION_NAME, slab_attention)


class TorchEngine(DrawingEngine):
    """A causal language model of one of `ARCHITECTURES` on one torch device."""

    def __init__(self, model: PreTrainedModel, choice: Choice) -> None:
        """`model` attends by `ATTENTION_NAME` and turns by an ExactRotary."""
        decoder = model.get_decoder()
        self._decoder = decoder
        self._rotary: ExactRotary = decoder.rotary_emb
        self._head = model.get_output_embeddings()
        self._config: PreTrainedConfig = model.config
        self._spec, self._is_bit_exact, self._sizes = choice
        self._weights_bytes = weights_bytes(model)

    @classmethod
    def load(cls, settings: Settings, directory: Path, beside: EngineFacts | None = None) -> TorchEngine:
        """The engine for the model in `directory`, its row sizes proven on this machine under `strict`.

        One that is loaded `beside` another leaves it its memory, and its threads, for which its row sizes were proven.

        Raises InvalidSetting, ModelUnavailable or NotEnoughMemory.
        """
        config = read_config(directory)
        device = _choose_device(settings)
        dtype = _choose_dtype(settings, device)
        specs = slab_specs(config, settings, dtype, device)
        weights = _count_weights(config, directory)
        if config.tie_word_embeddings and (settings.weights != "none" or can_pack(dtype, device)):
            # The embedding stays as it is beside the form that the head gets.
            weights += config.vocab_size * config.hidden_size
        free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else psutil.virtual_memory().available
        check_memory(weights * dtype.itemsize, free, settings, specs[0], beside)
        if device.type == "cpu" and beside is None:
            torch.set_num_threads(
                1 if weights * dtype.itemsize < _ONE_THREAD_BYTES else psutil.cpu_count(logical=False) or 1
            )
        model = _load_model(directory, dtype).to(device)
        replace_linears(model, model.get_output_embeddings(), settings.weights, dtype, device)
        described = f"{config} {settings.weights}"
        return cls(model, choose_sizes(settings, specs, described, device.type, partial(_find_sizes, model)))

    @cached_property
    def facts(self) -> EngineFacts:
        return EngineFacts(
            backend="torch",
            device=self._spec.device.type,
            dtype=str(self._spec.dtype).removeprefix("torch."),
            architecture=self._config.model_type,
            vocabulary=self._config.vocab_size,
            weights_bytes=self._weights_bytes,
            row_tile=self._spec.row_tile,
            row_sizes=self._sizes.rows,
            is_bit_exact=self._is_bit_exact,
            slab=self._spec,
        )

    def new_pool(self, count: int) -> SlabPool:
        return torch_pool(self._spec, count)

    @torch.inference_mode()
    def logits(self, batch: RowBatch) -> Tensor:
        rows = batch.rows
        assert 0 < len(rows) <= self._spec.row_tile
        device = self._spec.device
        filler = padded(len(rows), self._sizes.rows) - len(rows)
        hidden: Tensor = self._decoder(
            input_ids=torch.tensor([[*(row.token_id for row in rows), *[0] * filler]], device=device),
            position_ids=torch.tensor([[*(row.position for row in rows), *[0] * filler]], device=device),
            use_cache=False,
            plan=plan_forward(batch, self._sizes.queries, self._rotary, self._config.num_attention_heads),
        ).last_hidden_state[0]
        wanted = [index for index, row in enumerate(rows) if row.draw is not None]
        if not wanted:
            return hidden.new_empty(0, self._config.vocab_size, dtype=torch.float32)
        size = padded(len(wanted), self._sizes.rows)
        indices = torch.tensor([*wanted, *[wanted[-1]] * (size - len(wanted))], device=device)
        logits: Tensor = self._head(hidden.index_select(0, indices))
        return logits[: len(wanted)].float()


def _find_sizes(model: Any, spec: SlabSpec) -> RowSizes | None:
    """The least padding under which rows of the model's first `spec.layers` are bit-equal in every batch, or None."""
    config, rotary = model.config, model.get_decoder().rotary_emb
    attending = partial(AttentionAlone, spec, config.num_attention_heads, rotary)
    queries = find_sizes(attending, spec, AttentionAlone.tokens)
    if queries is None:
        return None
    short = _first_layers(model, spec.layers)
    rows = find_sizes(
        lambda rows: TorchEngine(short, Choice(spec, True, RowSizes(rows, queries))), spec, config.vocab_size
    )
    return RowSizes(rows, queries) if rows else None


def _count_weights(config: PreTrainedConfig, directory: Path) -> int:
    try:
        with torch.device("meta"):
            return sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    except CONFIG_ERRORS as error:
        raise ModelUnavailable(f"the configuration in {directory} makes no model: {one_line(error)}") from error


def _load_model(directory: Path, dtype: torch.dtype) -> Any:
    refusal = f"the weights in {directory} cannot be loaded"
    model = load_weights(AutoModelForCausalLM, directory, dtype, refusal, attn_implementation=ATTENTION_NAME)
    decoder = model.get_decoder()
    decoder.rotary_emb = ExactRotary(decoder.rotary_emb)
    return model.eval()


def _first_layers(model: Any, count: int) -> Any:
    """The model with its first `count` layers alone, on the same weights."""
    weights = {id(weight): weight for weight in (*model.parameters(), *model.buffers())}
    shallow = copy.deepcopy(model, weights)
    decoder = shallow.get_decoder()
    decoder.layers = decoder.layers[:count]
    return shallow


def _choose_device(settings: Settings) -> torch.device:
    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    name = settings.device
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if has[kind])
    if not has[name]:
        raise InvalidSetting(f"device={name} is not available here: this machine has {[k for k in has if has[k]]}")
    return torch.device(name)


def _choose_dtype(settings: Settings, device: torch.device) -> torch.dtype:
    if settings.dtype != "auto":
        return named_dtype(settings.dtype)
    # Without hardware for it, bfloat16 on a CPU is emulated and slower than float32.
    is_native = device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()  # noqa: SLF001 (torch has no public name)
    return torch.bfloat16 if is_native else torch.float32
