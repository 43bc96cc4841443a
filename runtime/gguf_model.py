"""Models of transformers on the tensors of a GGUF file: dequantised, or left as they are stored."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from runtime.checks import short_repr
from runtime.errors import ModelUnavailable
from runtime.foreign.gguf import TENSOR_PROCESSORS, TensorProcessor
from runtime.gguf_experts import EXPERTS, StoredExperts, parts_of
from runtime.gguf_file import GgufFile, StoredTensor, one_line_errors

Stored = StoredTensor | StoredExperts


class StoredLinear(nn.Module):
    """Replaces a linear whose weights stay as the file stores them; each read of `weight` dequantises them."""

    def __init__(self, stored: StoredTensor, bias: Tensor | None) -> None:
        super().__init__()
        self.stored, self.bias = stored, bias

    @property
    def weight(self) -> Tensor:
        return self.stored.dense()


class StoredEmbedding(nn.Module):
    """Replaces an embedding whose rows stay as the file stores them until they are looked up."""

    def __init__(self, stored: StoredTensor) -> None:
        super().__init__()
        self.stored = stored


def gguf_config(path: Path) -> PreTrainedConfig:
    """The configuration in a file. Raises ModelUnavailable, and what transformers raises for values that make no sense."""
    return _config(GgufFile.read(path))


def dense_model(path: Path, dtype: torch.dtype, **options: Any) -> Any:
    """The model with its weights dequantised into this type. Raises ModelUnavailable."""
    with one_line_errors(path):
        model, tensors = _empty_model(path, dtype, options)
        for name, stored in tensors.items():
            _set(model, name, stored.dense().to(dtype))
        model.tie_weights()
        return model


def stored_model(path: Path) -> Any:
    """The model with StoredLinears and a StoredEmbedding; everything else is in float32. Raises ModelUnavailable."""
    with one_line_errors(path):
        return _stored_model(path)


def _stored_model(path: Path) -> Any:
    model, whole = _empty_model(path, torch.float32, {})
    # Engines that keep weights as stored have no code for experts.
    tensors = {name: stored for name, stored in whole.items() if isinstance(stored, StoredTensor)}
    for name, tensor in tensors.items():
        if not tensor.is_finite():
            raise ModelUnavailable(f"the weights in {path} are damaged: {name} has values that are not finite")
    embedding = tensors["model.embed_tokens.weight"]
    for name, part in list(model.named_modules()):
        own = {key: tensors.get(f"{name}.{key}") for key, _ in part.named_parameters(recurse=False)}
        weight, bias = own.get("weight"), own.get("bias")
        if isinstance(part, nn.Linear):
            # If the head is not in the file, it shares the embedding.
            model.set_submodule(name, StoredLinear(weight or embedding, bias.dense() if bias else None))
        elif isinstance(part, nn.Embedding):
            model.set_submodule(name, StoredEmbedding(embedding))
        else:
            for key, stored in own.items():
                assert stored is not None
                _set(model, f"{name}.{key}", stored.dense())
    return model


def _config(file: GgufFile) -> PreTrainedConfig:
    return AutoConfig.for_model(**file.config_values())


def _empty_model(path: Path, dtype: torch.dtype, options: Mapping[str, Any]) -> tuple[Any, dict[str, Stored]]:
    """A model without weights, and the file's tensors by the names of its parameters, their shapes checked."""
    file = GgufFile.read(path)
    config = _config(file)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    decoder = model.get_decoder()
    decoder.rotary_emb = type(decoder.rotary_emb)(config)
    frequencies = decoder.rotary_emb.inv_freq
    frequencies /= file.rope_factors(len(frequencies))
    return model, _match_names(file, model)


def _match_names(file: GgufFile, model: Any) -> dict[str, Stored]:
    config = model.config.to_dict()
    processor = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)(config=config)
    architecture = next(key for key, name in MODEL_ARCH_NAMES.items() if name == file.architecture)
    names = get_tensor_name_map(architecture, model.config.num_hidden_layers)
    tensors = dict(file.weights())
    found: dict[str, Stored] = {}
    # A head that is tied to the embedding has no tensor of its own.
    for name, parameter in model.named_parameters():
        parts = []
        for part in parts_of(name):
            ours = names.get_name(part, try_suffixes=(".weight", ".bias")) or part
            stored = tensors.pop(ours, None)
            if stored is None:
                raise ModelUnavailable(f"{file.path} lacks the weights of {name} and maybe more")
            parts.append(StoredTensor(stored.kind, stored.shape, partial(_in_order, processor, stored, ours)))
        if len({part.shape for part in parts}) > 1:
            raise ModelUnavailable(f"{file.path} has {ours} of {parts[1].shape}, not of {parts[0].shape}")
        whole = StoredExperts(tuple(parts)) if EXPERTS in name else parts[0]
        if whole.shape != tuple(parameter.shape):
            raise ModelUnavailable(f"{file.path} has {ours} of {whole.shape}, not of {tuple(parameter.shape)}")
        found[name] = whole
    if tensors:
        raise ModelUnavailable(
            f"{file.path} has tensors that this release has no use for, such as {short_repr(min(tensors))}"
        )
    return found


def _in_order(processor: Any, stored: StoredTensor, name: str) -> NDArray[np.uint8]:
    """The tensor with its rows in transformers' order. Whole rows are moved, whatever they hold."""
    rows: NDArray[np.uint8] = processor.process(weights=stored.read(), name=name).weights
    return rows


def _set(model: Any, name: str, values: Tensor) -> None:
    parent, _, key = name.rpartition(".")
    model.get_submodule(parent).register_parameter(key, nn.Parameter(values, requires_grad=False))
