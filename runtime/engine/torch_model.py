"""What all engines on torch do with a model: choosing its form, loading it, and trying its linears."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from runtime.checkpoints import load_weights
from runtime.dtypes import dtype_named
from runtime.engine import findings
from runtime.engine.configuration import IN_CACHE, Form, is_small
from runtime.engine.exact import Claim
from runtime.engine.linears import RowLinear, replace_linears
from runtime.engine.machine import Level, level
from runtime.engine.probe import is_exact_function
from runtime.engine.rotary import ExactRotary
from runtime.engine.torch_parts import take_over
from runtime.errors import InvalidSetting
from runtime.settings import Settings

_log = logging.getLogger("perennial.engine")


class Loaded(NamedTuple):
    """A model with our parts where they are needed, and its rotary embeddings by name."""

    model: Any
    rotaries: Mapping[str, ExactRotary]


def load_model(directory: Path, form: Form, device: torch.device, attention: str, *, is_strict: bool) -> Loaded:
    """Loads the model in `directory` in this form; its layers attend by the function that transformers knows as `attention`.

    Raises ModelUnavailable or InvalidSetting.
    """
    refusal = f"the weights in {directory} cannot be loaded"
    model = load_weights(AutoModelForCausalLM, directory, form.dtype, refusal, attn_implementation=attention)
    rotaries = take_over(model)
    model = model.to(device)
    replace_linears(model, model.get_output_embeddings(), form.weights, form.dtype, device, is_strict=is_strict)
    return Loaded(model.eval(), rotaries)


def first_layers(model: Any, count: int) -> Any:
    """The model with only its first `count` layers, sharing the weights."""
    weights = {id(weight): weight for weight in (*model.parameters(), *model.buffers())}
    shallow = copy.deepcopy(model, weights)
    decoder = shallow.get_decoder()
    decoder.layers = decoder.layers[:count]
    return shallow


def choose_device(settings: Settings) -> torch.device:
    """The device that `settings` name, or the best one available. Raises InvalidSetting."""
    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    name = settings.device
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if has[kind])
    if not has[name]:
        raise InvalidSetting(f"device={name} is not available here: this machine has {[k for k in has if has[k]]}")
    return torch.device(name)


def free_memory(device: torch.device) -> int:
    """Free memory of the device, in bytes."""
    return torch.cuda.mem_get_info()[0] if device.type == "cuda" else psutil.virtual_memory().available


def held_weights(config: PreTrainedConfig, count: int) -> int:
    """How many weights are held of a model with `count` weights: an embedding is held besides a head that shares its weights."""
    return count + (config.vocab_size * config.hidden_size if config.tie_word_embeddings else 0)


def forms_of(settings: Settings, device: torch.device, weights: int, kinds: Mapping[str, int]) -> list[Form]:
    """The forms that the settings allow for a model with this many `weights`, in the order in which to try them.

    `kinds` counts its tensors in a GGUF file by kind; these are rounded again only if a setting asks for it.
    """
    is_dtype_auto, is_weights_auto = settings.dtype == "auto", settings.weights == "auto"
    if device.type != "cpu":
        dtype = torch.bfloat16 if is_dtype_auto else dtype_named(settings.dtype)
        return [Form(dtype, "none" if is_weights_auto else settings.weights, _dequantised_reason(kinds))]
    here = level()
    if not is_dtype_auto:
        dtypes = [dtype_named(settings.dtype)]
    elif here == Level.AMX:
        dtypes = [torch.bfloat16, torch.float32]
    else:
        # On other CPUs few rows are multiplied faster in float32, even with weights of 16 bits.
        dtypes = [torch.float32]
    if not is_weights_auto:
        return [Form(dtype, settings.weights) for dtype in dtypes]
    if kinds:
        choices = {"none": _dequantised_reason(kinds)}
    elif is_small(weights):
        choices = {"none": IN_CACHE, "int8": ""}
    elif here >= Level.AVX512_BF16:
        choices = {"none": "this CPU reads 16 bits a weight at its memory's speed", "int8": ""}
    else:
        choices = {"int8": "this CPU cannot multiply 16-bit numbers", "none": ""}
    return [Form(dtype, name, reason) for dtype in dtypes for name, reason in choices.items()]


def _dequantised_reason(kinds: Mapping[str, int]) -> str:
    return f"dequantised: {', '.join(f'{count} of {kind}' for kind, count in kinds.items())}" if kinds else ""


def linear_claims(linears: Iterable[RowLinear]) -> list[Claim]:
    """One claim for each form that a model's linears have."""
    kinds = {type(one): one for one in linears}
    return [Claim("linears", kind.__name__, kind.ground) for kind in kinds]


@torch.inference_mode()
def linears_are_exact(model: Any, form: Form, device: torch.device) -> bool:
    """Whether each kind of linear in the model gives a row the same bits in every batch here."""
    distinct: dict[str, tuple[str, RowLinear]] = {}
    for name, part in model.named_modules():
        if isinstance(part, RowLinear):
            shape = f"{part.inputs} x {part.outputs} {form.dtype}, at most {part.most_rows} rows on {device.type}"
            kind = f"{type(part).__name__} {shape}"
            distinct.setdefault(kind, (name, part))
    for kind, (name, part) in distinct.items():
        if not findings.find_or_probe(
            kind, partial(is_exact_function, part, part.inputs, form.dtype, part.most_rows, device)
        ):
            _log.warning("a row gets other bits in other batches of %s (%s)", name, kind)
            return False
    return True
