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
from runtime.engine import EngineFacts
from runtime.engine.configuration import (
    ROW_TILE,
    Form,
    check_covered,
    check_memory,
    read_config,
    refuse,
    slab_spec,
)
from runtime.engine.drawing import draw_tokens
from runtime.engine.exact import Claim, Ground
from runtime.engine.findings import found
from runtime.engine.machine import features, kernel_class
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

# On a CPU MLX's products take as long for each row of many as for one alone. On a GPU one row costs what so many cost.
_FIXED_ROWS_ON_CPU, _FIXED_ROWS_ON_GPU = 1, 32
_ROW_TILE_ON_CPU = 32
# Over 256 slots attention of a lone short history would take an eighth of a step.
_BUCKET_SLOTS = 64
_BITS = {"int8": 8, "int4": 4}
# The largest first: weights in a row of so many share a scale and a zero.
_GROUPS = (64, 32)


class Plugged(NamedTuple):
    """A model of mlx-lm whose layers turn and attend as ours, what it is, and the angles that it turns by."""

    model: Any
    config: PreTrainedConfig
    rotary: ExactRotary


class MlxEngine:
    """A causal language model of one of `ARCHITECTURES` on MLX's default device or the CPU."""

    def __init__(self, plugged: Plugged, spec: SlabSpec, form: Form, fixed_rows: int | None) -> None:
        """Of the model's layers run as many as the slabs of `spec` have, and of a batch `fixed_rows` at once, or all."""
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
        # Its arrays are MLX's own; what torch computes for it, it computes on the CPU.
        spec = slab_spec(config, settings, dtype, row_tile=tile, bucket=_BUCKET_SLOTS)
        # A checkpoint that is quantised says so itself.
        form = Form(dtype, "none" if settings.weights == "auto" else settings.weights)
        model = _load_model(directory, form)
        # Nothing was read from the files yet.
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
        return found(described, partial(is_bit_exact, engine, tried, self._config.vocab_size))

    @cached_property
    def facts(self) -> EngineFacts:
        return EngineFacts(
            backend="mlx",
            device=mx.default_device().type.name,
            dtype=self._spec.dtype,
            weights=self._form.weights,
            form_reason=self._form.reason,
            architecture=self._config.model_type,
            vocabulary=self._config.vocab_size,
            weights_bytes=_weights_bytes(self._model),
            row_tile=self._spec.row_tile,
            row_step=self._fixed_rows or 1,
            is_bit_exact=self._fixed_rows is not None,
            claims=self._claims(),
            tried="a layer and the head in batches of two sessions" if self._fixed_rows else "",
            cpu_features=features(),
            kernel_class=f"{kernel_class()}, mlx {version('mlx')} on {mx.default_device().type.name}",
            slab=self._spec,
        )

    def _claims(self) -> tuple[str, ...]:
        if self._fixed_rows is None:
            return ()
        claim = Claim("whole forwards", f"{self._fixed_rows} rows", Ground.FIXED_ROWS)
        return (str(claim),)

    def new_pool(self, count: int) -> SlabPool:
        return mlx_pool(self._spec, count)

    def forward(self, batch: RowBatch) -> tuple[Token, ...]:
        return draw_tokens(self.logits(batch), batch)

    def logits(self, batch: RowBatch) -> Tensor:
        """As every engine's; all is evaluated when it returns, so that a forward's time is a forward's time."""
        rows = batch.rows
        assert 0 < len(rows) <= self._spec.row_tile
        at_once = self._fixed_rows or len(rows)
        parts = [RowBatch(rows[at : at + at_once]) for at in range(0, len(rows), at_once)]
        return torch.cat([self._logits(part, at_once) for part in parts])

    def _logits(self, batch: RowBatch, size: int) -> Tensor:
        """Of a batch that is padded to `size` rows, each piece of it too."""
        rows = batch.rows
        plan = plan_forward(batch, size, self._rotary)
        for piece in plan.pieces:
            piece.slab.reserve(piece.extent)
        tokens = mx.array([[*(row.token_id for row in rows), *[0] * plan.filler]])
        caches = [SlabCache(plan, layer) for layer in range(self._spec.layers)]
        hidden = self._model.model(tokens, caches)[0]
        written = [array for piece in plan.pieces for array in piece.slab.arrays()]
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
    # On a CPU bfloat16 saves one row nothing, and float32 is what the torch engine computes in there.
    return torch.float32 if _is_on_cpu() else torch.bfloat16


def _load_model(directory: Path, form: Form) -> Any:
    """The model, its weights still to be read. A checkpoint that is quantised stays so."""
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
            f"weights={weights} cannot hold layers of {min(widths)} columns, which are no multiple of {_GROUPS[-1]}: set "
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
            raise ModelUnavailable(f"the weights in {directory} are damaged: {name} holds what is no number")


def _weights_bytes(model: Any) -> int:
    weights: Any = tree_flatten(model.parameters())
    return sum(array.nbytes for _, array in weights)
