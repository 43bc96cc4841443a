"""The MLX engine: mlx-lm's own model code, fed with row batches, attending over slabs. For Apple silicon; runs on any CPU too."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import psutil
import torch
from mlx.nn.layers.quantized import quantize
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from runtime.checkpoints import FILE_ERRORS
from runtime.dtypes import dtype_named, name_of
from runtime.engine import EngineFacts, findings
from runtime.engine.configuration import (
    ROW_TILE,
    Form,
    check_covered,
    check_memory,
    engine_facts,
    read_config,
    refuse,
    slab_spec,
)
from runtime.engine.drawing import draw_tokens
from runtime.engine.exact import Claim, Ground
from runtime.engine.machine import kernel_class
from runtime.engine.mlx_attention import PlannedRotary, SlabCache, let_attend_over_slabs, plan_forward
from runtime.engine.mlx_slab import as_mlx, mlx_pool, to_torch
from runtime.engine.probe import is_bit_exact
from runtime.engine.rotary import ExactRotary
from runtime.errors import InvalidSetting, ModelUnavailable
from runtime.events import Token
from runtime.model_files import one_line
from runtime.rows import RowBatch
from runtime.settings import Settings
from runtime.slab import SlabPool
from runtime.slab_spec import SlabSpec

# On a CPU MLX's products take as long for each of many rows as for a single one. On a GPU one row costs as much as this
# many.
_FIXED_ROWS_ON_CPU, _FIXED_ROWS_ON_GPU = 1, 32
_ROW_TILE_ON_CPU = 32
# With buckets of 256 slots, attention over a short history would take an eighth of a step.
_BUCKET_SLOTS = 64
_BITS = {"int8": 8, "int4": 4}
# Sizes of the groups of weights that share a scale and a zero, the largest first.
_GROUPS = (64, 32)


class Plugged(NamedTuple):
    """A model of mlx-lm with our rotary embedding and attention, its configuration, and the rotary angles."""

    model: Any
    config: PreTrainedConfig
    rotary: ExactRotary


class MlxEngine:
    """A causal language model of one of `ARCHITECTURES` on MLX's default device or the CPU."""

    def __init__(self, plugged: Plugged, spec: SlabSpec, form: Form, fixed_rows: int | None) -> None:
        """It runs as many of the model's layers as `spec` has, and `fixed_rows` of a batch at once, or all rows if None."""
        self._model, self._config, self._rotary = plugged
        self._spec, self._form, self._fixed_rows = spec, form, fixed_rows

    @classmethod
    def load(cls, settings: Settings, directory: Path, beside: EngineFacts | None = None) -> MlxEngine:
        """The engine for the model in `directory`, probed on this machine under `strict`.

        One that is loaded `beside` another leaves it its memory. Raises InvalidSetting, ModelUnavailable or NotEnoughMemory.
        """
        if directory.is_file():
            raise InvalidSetting("backend=mlx reads no GGUF files: set backend to torch, which runs them on mps too")
        config = read_config(directory)
        check_covered(config, "mlx")
        mx.set_default_device(_choose_device(settings))
        dtype = _choose_dtype(settings)
        is_strict = settings.determinism == "strict"
        tile = _ROW_TILE_ON_CPU if is_strict and _is_on_cpu() else ROW_TILE
        # The arrays are MLX's; torch computes only on the CPU here.
        spec = slab_spec(config, settings, dtype, row_tile=tile, bucket=_BUCKET_SLOTS)
        # A quantised checkpoint says itself how its weights are held.
        form = Form(dtype, "none" if settings.weights == "auto" else settings.weights)
        model = _load_model(directory, form)
        # Weights are loaded lazily: nothing was read from the files yet.
        check_memory(_weights_bytes(model), psutil.virtual_memory().available, settings, spec, beside)
        try:
            mx.eval(model.parameters())
        except RuntimeError as error:
            raise ModelUnavailable(f"the weights in {directory} cannot be read: {one_line(error)}") from error
        _check_numbers(model, directory)
        plugged = _plug_in(model, config)
        if not is_strict:
            return cls(plugged, spec, form, None)
        engine = cls(plugged, spec, form, _FIXED_ROWS_ON_CPU if _is_on_cpu() else _FIXED_ROWS_ON_GPU)
        if not engine.is_proven():
            raise refuse([form])
        return engine

    def is_proven(self) -> bool:
        """Whether the model's first layer gives rows the same bits in every batch here."""
        tried = replace(self._spec, layers=1)
        plugged = Plugged(self._model, self._config, self._rotary)
        engine = MlxEngine(plugged, tried, self._form, self._fixed_rows)
        described = f"mlx {version('mlx')} {mx.default_device()} {self._config} {self._form} {tried} {self._fixed_rows}"
        return findings.find_or_probe(described, partial(is_bit_exact, engine, tried, self._config.vocab_size))

    @cached_property
    def facts(self) -> EngineFacts:
        return engine_facts(
            "mlx",
            self._config,
            self._form,
            self._spec,
            device=mx.default_device().type.name,
            weights_bytes=_weights_bytes(self._model),
            row_step=self._fixed_rows or 1,
            kernel_class=f"{kernel_class()}, mlx {version('mlx')} on {mx.default_device().type.name}",
            is_bit_exact=self._fixed_rows is not None,
            claims=[Claim("whole forwards", f"{self._fixed_rows} rows", Ground.FIXED_ROWS)],
            tried="a layer and the head in batches of two sessions",
        )

    def new_pool(self, count: int) -> SlabPool:
        return mlx_pool(self._spec, count)

    def forward(self, batch: RowBatch) -> tuple[Token, ...]:
        return draw_tokens(self.logits(batch), batch)

    def logits(self, batch: RowBatch) -> Tensor:
        """As in every engine. Everything is evaluated when it returns, so that the time of a forward is its own."""
        rows = batch.rows
        assert 0 < len(rows) <= self._spec.row_tile
        at_once = self._fixed_rows or len(rows)
        parts = [RowBatch(rows[at : at + at_once]) for at in range(0, len(rows), at_once)]
        return torch.cat([self._logits(part, at_once) for part in parts])

    def _logits(self, batch: RowBatch, size: int) -> Tensor:
        """The logits of a batch that is padded to `size` rows, as each of its stretches is."""
        rows = batch.rows
        plan = plan_forward(batch, size, self._rotary)
        for stretch in plan.stretches:
            stretch.slab.reserve(stretch.extent)
        tokens = mx.array([[*(row.token_id for row in rows), *[0] * plan.filler]])
        caches = [SlabCache(plan, layer) for layer in range(self._spec.layers)]
        hidden = self._model.model(tokens, caches)[0]
        written = [array for stretch in plan.stretches for array in stretch.slab.arrays()]
        wanted = [index for index, row in enumerate(rows) if row.draw is not None]
        if not wanted:
            mx.eval(written)
            return torch.empty(0, self._config.vocab_size)
        filled = [*wanted, *[wanted[-1]] * (size - len(wanted))]
        logits = self._head(mx.take(hidden, mx.array(filled), axis=0)).astype(mx.float32)
        mx.eval(logits, written)
        return to_torch(logits)[: len(wanted)]

    def _head(self, hidden: mx.array) -> mx.array:
        model = self._model
        head = model.model.embed_tokens.as_linear if self._config.tie_word_embeddings else model.lm_head
        logits: mx.array = head(hidden)
        return logits


def _is_on_cpu() -> bool:
    return mx.default_device() == mx.Device(mx.cpu)


def _choose_device(settings: Settings) -> mx.Device:
    has_gpu = mx.metal.is_available()
    if settings.device == "cuda" or (settings.device == "mps" and not has_gpu):
        raise InvalidSetting(
            f"device={settings.device} is not available to backend=mlx here: set device to auto or cpu"
        )
    return mx.Device(mx.cpu if settings.device == "cpu" or not has_gpu else mx.gpu)


def _choose_dtype(settings: Settings) -> torch.dtype:
    if settings.dtype != "auto":
        return dtype_named(settings.dtype)
    # On a CPU bfloat16 is no faster for one row, and the torch engine computes in float32 there too.
    return torch.float32 if _is_on_cpu() else torch.bfloat16


def _load_model(directory: Path, form: Form) -> Any:
    """The model, with weights that are not read yet. A quantised checkpoint stays quantised."""
    try:
        model, config = load_model(directory, lazy=True)
    except FILE_ERRORS as error:
        raise ModelUnavailable(f"the weights in {directory} cannot be loaded by mlx-lm: {one_line(error)}") from error
    model.set_dtype(as_mlx(name_of(form.dtype)))
    if form.weights != "none" and not config.get("quantization"):
        _quantise(model, form.weights)
    return model


def _quantise(model: Any, weights: str) -> None:
    widths = {part.weight.shape[-1] for _, part in model.named_modules() if hasattr(part, "to_quantized")}
    group = next((size for size in _GROUPS if all(width % size == 0 for width in widths)), None)
    if group is None:
        raise InvalidSetting(
            f"weights={weights} cannot hold layers of {min(widths)} columns, which are not a multiple of {_GROUPS[-1]}: set "
            "weights to none"
        )
    quantize(model, group_size=group, bits=_BITS[weights])


def _plug_in(model: Any, config: PreTrainedConfig) -> Plugged:
    """Gives every layer our rotary embedding and our attention. The angles are those of the torch engine."""
    for layer in model.layers:
        layer.self_attn.rope = PlannedRotary()
        let_attend_over_slabs(sys.modules[type(layer.self_attn).__module__])
    with torch.device("meta"):
        rotary: Any = type(AutoModelForCausalLM.from_config(config).get_decoder().rotary_emb)
    return Plugged(model, config, ExactRotary(rotary(config)))


def _check_numbers(model: Any, directory: Path) -> None:
    weights: Any = tree_flatten(model.parameters())
    for name, array in weights:
        if mx.issubdtype(array.dtype, mx.floating) and not mx.isfinite(array).all():
            raise ModelUnavailable(f"the weights in {directory} are damaged: {name} has values that are not finite")


def _weights_bytes(model: Any) -> int:
    weights: Any = tree_flatten(model.parameters())
    return sum(array.nbytes for _, array in weights)
