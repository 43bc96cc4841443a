"""The torch engine: transformers' own model code, fed with row batches, attending over slabs."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig

from runtime.checkpoints import load_weights
from runtime.engine import EngineFacts
from runtime.engine.architectures import ARCHITECTURES, Part, attending_kinds, layer_kinds
from runtime.engine.attention import ATTENTION_NAME, CLAIMS, slab_attention
from runtime.engine.attention_plan import plan_forward
from runtime.engine.attention_probe import Manner, attention_is_exact
from runtime.engine.configuration import (
    Form,
    check_memory,
    count_weights,
    is_small,
    named_dtype,
    read_config,
    refuse,
    slab_spec,
)
from runtime.engine.drawing import DrawingEngine
from runtime.engine.exact import Claim
from runtime.engine.findings import found
from runtime.engine.linears import FixedRowsLinear, RowLinear, replace_linears, weights_bytes
from runtime.engine.machine import Level, features, kernel_class, level
from runtime.engine.probe import PROBED_ROWS, is_bit_exact, is_exact_function
from runtime.engine.rotary import ExactRotary
from runtime.engine.torch_parts import CLAIMS_OF_PARTS, capped, take_over
from runtime.engine.torch_slab import torch_pool
from runtime.errors import InvalidSetting
from runtime.gguf_file import GgufFile
from runtime.rows import RowBatch
from runtime.settings import Settings
from runtime.slab import SlabPool, SlabSpec

_log = logging.getLogger("perennial.engine")

AttentionInterface.register(ATTENTION_NAME, slab_attention)


class Loaded(NamedTuple):
    """A model whose parts are ours where they must be, and the rotary embeddings that turn its layers."""

    model: Any
    rotaries: Mapping[str, ExactRotary]


class TorchEngine(DrawingEngine):
    """A causal language model of one of `ARCHITECTURES` on one torch device."""

    def __init__(self, loaded: Loaded, spec: SlabSpec, form: Form, *, is_bit_exact: bool) -> None:
        """`form` says what the model's linears are."""
        model, self._rotaries = loaded
        self._decoder = model.get_decoder()
        self._head = model.get_output_embeddings()
        self._kinds = attending_kinds(model.config)
        self._config: PreTrainedConfig = model.config
        self._parts = ARCHITECTURES[model.config.model_type].parts
        self._spec = spec
        self._form = form
        self._linears = [part for part in model.modules() if isinstance(part, RowLinear)]
        self._is_bit_exact = is_bit_exact
        self._weights_bytes = weights_bytes(model)

    @classmethod
    def load(cls, settings: Settings, directory: Path, beside: EngineFacts | None = None) -> TorchEngine:
        """The engine for the model in `directory`, under `strict` in the first form that a probe finds exact here.

        One that is loaded `beside` another leaves it its memory, and its threads, for which the other was probed.

        Raises InvalidSetting, ModelUnavailable or NotEnoughMemory.
        """
        config = read_config(directory)
        device = _choose_device(settings)
        count = count_weights(config, directory)
        forms = _forms(settings, device, count, GgufFile.read(directory).kinds() if directory.is_file() else {})
        widest = max(form.dtype.itemsize for form in forms)
        # Beside the form that the head gets, the embedding that it shares its weights with stays as it is.
        held = count + (config.vocab_size * config.hidden_size if config.tie_word_embeddings else 0)
        free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else psutil.virtual_memory().available
        check_memory(held * widest, free, settings, slab_spec(config, settings, forms[0].dtype, device), beside)
        if device.type == "cpu" and beside is None:
            torch.set_num_threads(1 if is_small(count) else psutil.cpu_count(logical=False) or 1)
        is_strict = settings.determinism == "strict"
        failed: list[Form] = []
        for form in forms:
            spec = slab_spec(config, settings, form.dtype, device)
            loaded = _load_model(directory, form, device, is_strict=is_strict)
            if not is_strict or _is_proven(loaded, spec, form):
                return cls(loaded, spec, form.after(failed), is_bit_exact=is_strict)
            failed.append(form)
        if (settings.dtype, settings.weights) != ("auto", "auto"):
            raise refuse(failed)
        # A row that is always alone has no company that its bits could depend on.
        spec = slab_spec(config, settings, form.dtype, device, row_tile=1)
        return cls(loaded, spec, replace(form, reason="one row a forward").after(failed), is_bit_exact=True)

    @cached_property
    def facts(self) -> EngineFacts:
        return EngineFacts(
            backend="torch",
            device=self._spec.device.type,
            dtype=str(self._spec.dtype).removeprefix("torch."),
            weights=self._form.weights,
            form_reason=self._form.reason,
            architecture=self._config.model_type,
            vocabulary=self._config.vocab_size,
            weights_bytes=self._weights_bytes,
            row_tile=self._spec.row_tile,
            row_step=max((one.most_rows for one in self._linears if isinstance(one, FixedRowsLinear)), default=1),
            is_bit_exact=self._is_bit_exact,
            claims=self._claims() if self._is_bit_exact else (),
            tried=self._tried(),
            cpu_features=features(),
            kernel_class=kernel_class(),
            slab=self._spec,
        )

    def _claims(self) -> tuple[str, ...]:
        kinds = {type(one): one for one in self._linears}
        linears = tuple(Claim("linears", kind.__name__, kind.ground) for kind in kinds)
        of_parts = tuple(CLAIMS_OF_PARTS[part] for part in sorted(self._parts & CLAIMS_OF_PARTS.keys()))
        return tuple(f"{claim.part} ({claim.form}): {claim.ground}" for claim in (*linears, *CLAIMS, *of_parts))

    def _tried(self) -> str:
        if not self._is_bit_exact:
            return ""
        if self._spec.row_tile == 1:
            return "other rows in a forward: they change a row's bits, so each runs alone"
        counts = sorted({one.most_rows for one in self._linears})
        return (
            f"each linear at every count up to {' or '.join(map(str, counts))} on {PROBED_ROWS} rows or more, attention at "
            f"every count up to {self._spec.row_tile}, a layer in batches of two sessions"
        )

    def new_pool(self, count: int) -> SlabPool:
        return torch_pool(self._spec, count)

    @torch.inference_mode()
    def logits(self, batch: RowBatch) -> Tensor:
        rows = batch.rows
        assert 0 < len(rows) <= self._spec.row_tile
        device = self._spec.device
        hidden: Tensor = self._decoder(
            input_ids=torch.tensor([[row.token_id for row in rows]], device=device),
            position_ids=torch.tensor([[row.position for row in rows]], device=device),
            use_cache=False,
            plan=plan_forward(batch, self._rotaries, self._config.num_attention_heads, self._kinds),
        ).last_hidden_state[0]
        wanted = [index for index, row in enumerate(rows) if row.draw is not None]
        if not wanted:
            return hidden.new_empty(0, self._config.vocab_size, dtype=torch.float32)
        logits: Tensor = self._head(hidden[wanted])
        return capped(logits.float(), getattr(self._config, "final_logit_softcapping", None))


def _is_proven(loaded: Loaded, spec: SlabSpec, form: Form) -> bool:
    """Whether each part of the model, and its first layers as a whole, give rows the same bits in every batch here."""
    config = loaded.model.config
    cap = getattr(config, "attn_logit_softcapping", None)
    has_sinks = Part.SOFTMAX_SINKS in ARCHITECTURES[config.model_type].parts
    # In the order of layers, so that what is tried is called the same in every process.
    manners = dict.fromkeys(Manner(kind, cap, has_sinks) for kind in attending_kinds(config))
    return (
        _linears_are_exact(loaded.model, form)
        and attention_is_exact(spec, config.num_attention_heads, loaded.rotaries, manners)
        and _layers_are_exact(loaded, spec, form)
    )


@torch.inference_mode()
def _linears_are_exact(model: Any, form: Form) -> bool:
    distinct: dict[str, tuple[str, RowLinear]] = {}
    for name, part in model.named_modules():
        if isinstance(part, RowLinear):
            kind = f"{type(part).__name__} {part.inputs} x {part.outputs} {form.dtype}, at most {part.most_rows} rows"
            distinct.setdefault(kind, (name, part))
    for kind, (name, part) in distinct.items():
        if not found(kind, partial(is_exact_function, part, part.inputs, form.dtype, part.most_rows)):
            _log.warning("a row gets other bits in other batches of %s (%s)", name, kind)
            return False
    return True


def _layers_are_exact(loaded: Loaded, spec: SlabSpec, form: Form) -> bool:
    config = loaded.model.config
    kinds = layer_kinds(config)
    # Layers of a kind have the same shapes, and so the same kernels: more of it would show nothing more.
    count = max(kinds.index(kind) for kind in kinds) + 1
    recurrent = sum(kind.is_recurrent for kind in kinds[:count])
    tried = replace(
        spec,
        layers=count - recurrent,
        recurrent=replace(spec.recurrent, layers=recurrent) if spec.recurrent else None,
    )

    def probe() -> bool:
        short = _first_layers(loaded.model, count)
        # The head was tried by itself, and a large one takes longest.
        short.set_output_embeddings(nn.Identity())
        engine = TorchEngine(Loaded(short, loaded.rotaries), tried, form, is_bit_exact=False)
        return is_bit_exact(engine, tried, config.vocab_size)

    return found(f"{config} {form} {tried}", probe)


def _load_model(directory: Path, form: Form, device: torch.device, *, is_strict: bool) -> Loaded:
    refusal = f"the weights in {directory} cannot be loaded"
    model = load_weights(AutoModelForCausalLM, directory, form.dtype, refusal, attn_implementation=ATTENTION_NAME)
    rotaries = take_over(model)
    model = model.to(device)
    replace_linears(model, model.get_output_embeddings(), form.weights, form.dtype, device, is_strict=is_strict)
    return Loaded(model.eval(), rotaries)


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


def _forms(settings: Settings, device: torch.device, weights: int, kinds: Mapping[str, int]) -> list[Form]:
    """The forms that the settings leave for a model of so many `weights`, the one to be tried first before the others.

    `kinds` are those of its tensors in a GGUF file, which an explicit setting alone rounds once more.
    """
    is_dtype_auto, is_weights_auto = settings.dtype == "auto", settings.weights == "auto"
    if device.type != "cpu":
        dtype = torch.bfloat16 if is_dtype_auto else named_dtype(settings.dtype)
        return [Form(dtype, "none" if is_weights_auto else settings.weights, _dequantised(kinds))]
    here = level()
    if not is_dtype_auto:
        dtypes = [named_dtype(settings.dtype)]
    elif here == Level.AMX:
        dtypes = [torch.bfloat16, torch.float32]
    else:
        # Elsewhere few rows are multiplied faster in float32, from weights of 16 bits too.
        dtypes = [torch.float32]
    if not is_weights_auto:
        return [Form(dtype, settings.weights) for dtype in dtypes]
    if kinds:
        choices = {"none": _dequantised(kinds)}
    elif is_small(weights):
        choices = {"none": "so small a model stays in the CPU's cache", "int8": ""}
    elif here >= Level.AVX512_BF16:
        choices = {"none": "this CPU reads 16 bits a weight at its memory's speed", "int8": ""}
    else:
        choices = {"int8": "this CPU multiplies no numbers of 16 bits", "none": ""}
    return [Form(dtype, name, reason) for dtype in dtypes for name, reason in choices.items()]


def _dequantised(kinds: Mapping[str, int]) -> str:
    return f"dequantised: {', '.join(f'{count} of {kind}' for kind, count in kinds.items())}" if kinds else ""
