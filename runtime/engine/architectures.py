"""The architectures that run: what each has beyond the layers of Llama, and which engines have code for that.

A row of the table is used by the engines, refusals, the tests and the README. docs/architectures.md tells how to add one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from transformers import PreTrainedConfig

from runtime.slab_spec import RecurrentSpec


class Part(StrEnum):
    """What a model's layers may have that Llama's do not, in the words of the README and of refusals."""

    BIASES = "biases of queries, keys and values"
    HEAD_NORMS = "norms of queries and keys"
    OUTER_NORMS = "norms behind attention and MLP"
    FUSED = "fused projections"
    LAYER_WINDOWS = "windows of some layers' own"
    BARE_LAYERS = "layers without rotary embeddings"
    PARTIAL_ROPE = "rotary embeddings of a part of each head"
    ROPE_BY_LAYER = "rotary embeddings by kind of layer"
    SOFT_CAPS = "soft-capped scores and logits"
    SOFTMAX_SINKS = "learned sinks in the softmax"
    EXPERTS = "experts"
    GATED_ATTENTION = "gates behind attention"
    SHORT_CONVOLUTIONS = "recurrent layers of short convolutions"
    DELTA_RULE = "recurrent layers of the gated delta rule"


@dataclass(frozen=True, slots=True)
class Architecture:
    """One of transformers' model types. `models` are the names of models that have it.

    If it `has_half_angles`, its layers take each angle once for both halves of a head, instead of twice. `inside` is the
    model type of multimodal models of which it is the text part.
    """

    name: str
    models: str
    parts: frozenset[Part] = frozenset()
    has_half_angles: bool = False
    inside: str = ""


@dataclass(frozen=True, slots=True)
class LayerKind:
    """How a layer attends: over a `window` of its own if it has one, and with the rotary embedding of this name if it has one.

    A layer that `is_recurrent` does not attend.
    """

    window: int | None
    rotary: str | None
    is_recurrent: bool = False


# The name of the rotary embedding if all layers share one.
ONE_ROTARY = "one"
_SLIDING = "sliding_attention"
_RECURRENT = ("conv", "linear_attention")

ENGINES: Mapping[str, frozenset[Part]] = {
    "torch": frozenset(Part),
    "cuda": frozenset({Part.BIASES, Part.HEAD_NORMS}),
    "openvino": frozenset({Part.BIASES, Part.HEAD_NORMS}),
    "mlx": frozenset({Part.BIASES, Part.HEAD_NORMS}),
}

_OF_QWEN3_5 = frozenset({Part.BIASES, Part.HEAD_NORMS, Part.PARTIAL_ROPE, Part.GATED_ATTENTION, Part.DELTA_RULE})

ARCHITECTURES: Mapping[str, Architecture] = {
    one.name: one
    for one in (
        Architecture("llama", "Llama, SmolLM2", frozenset({Part.BIASES})),
        Architecture("mistral", "Mistral"),
        Architecture("qwen2", "Qwen2, Qwen2.5", frozenset({Part.BIASES})),
        Architecture("qwen3", "Qwen3", frozenset({Part.BIASES, Part.HEAD_NORMS})),
        Architecture("qwen3_moe", "Qwen3 MoE", frozenset({Part.BIASES, Part.HEAD_NORMS, Part.EXPERTS})),
        Architecture("smollm3", "SmolLM3", frozenset({Part.BIASES, Part.BARE_LAYERS})),
        Architecture("phi3", "Phi-3, Phi-4", frozenset({Part.FUSED, Part.PARTIAL_ROPE})),
        Architecture(
            "gemma2", "Gemma 2", frozenset({Part.BIASES, Part.OUTER_NORMS, Part.LAYER_WINDOWS, Part.SOFT_CAPS})
        ),
        Architecture(
            "gemma3_text",
            "Gemma 3 (its text)",
            frozenset({Part.BIASES, Part.HEAD_NORMS, Part.OUTER_NORMS, Part.LAYER_WINDOWS, Part.ROPE_BY_LAYER}),
        ),
        Architecture(
            "gpt_oss",
            "gpt-oss",
            frozenset({Part.BIASES, Part.LAYER_WINDOWS, Part.SOFTMAX_SINKS, Part.EXPERTS}),
            has_half_angles=True,
        ),
        Architecture("lfm2", "LFM2", frozenset({Part.HEAD_NORMS, Part.SHORT_CONVOLUTIONS})),
        Architecture("qwen3_5_text", "Qwen3.5 (its text)", _OF_QWEN3_5, inside="qwen3_5"),
        Architecture("qwen3_5_moe_text", "Qwen3.5 MoE (its text)", _OF_QWEN3_5 | {Part.EXPERTS}, inside="qwen3_5_moe"),
    )
}


def fault_of_layers(config: PreTrainedConfig) -> str:
    """What is wrong with the layers that a configuration describes; empty if nothing is."""
    layers = config.num_hidden_layers
    for name in ("layer_types", "no_rope_layers"):
        listed = getattr(config, name, None)
        if listed and len(listed) != layers:
            return f"{name} tells of {len(listed)} layers, and there are {layers}"
    if unknown := {*(getattr(config, "layer_types", None) or ())} - {"full_attention", _SLIDING, *_RECURRENT}:
        return f"layer_types has {sorted(unknown)[0]!r}, a kind of layer that does not run"
    return "" if attending_kinds(config) else "no layer attends"


def missing_parts(config: PreTrainedConfig, engine: str) -> frozenset[Part]:
    """The parts of a model of this configuration for which this engine has no code."""
    parts = ARCHITECTURES[config.model_type].parts
    if len({kind.window for kind in attending_kinds(config)}) > 1:
        parts |= {Part.LAYER_WINDOWS}
    return parts - ENGINES[engine]


def layer_kinds(config: PreTrainedConfig) -> tuple[LayerKind, ...]:
    """The kind of each layer of a model."""
    count, window = config.num_hidden_layers, getattr(config, "sliding_window", None)
    names = getattr(config, "layer_types", None) or [_SLIDING if window else "full_attention"] * count
    is_turned = getattr(config, "no_rope_layers", None) or [True] * count
    is_by_layer = Part.ROPE_BY_LAYER in ARCHITECTURES[config.model_type].parts

    def kind(name: str, is_turned: bool) -> LayerKind:
        if name in _RECURRENT:
            return LayerKind(None, None, is_recurrent=True)
        rotary = name if is_by_layer else ONE_ROTARY
        return LayerKind(window if name == _SLIDING else None, rotary if is_turned else None)

    return tuple(map(kind, names, is_turned))


def attending_kinds(config: PreTrainedConfig) -> tuple[LayerKind, ...]:
    """The kind of each layer that attends, in order."""
    return tuple(kind for kind in layer_kinds(config) if not kind.is_recurrent)


def recurrent_spec(config: PreTrainedConfig) -> RecurrentSpec | None:
    """What a model's recurrent layers keep of a session; None if it has no such layers."""
    layers = sum(kind.is_recurrent for kind in layer_kinds(config))
    if not layers:
        return None
    if Part.SHORT_CONVOLUTIONS in ARCHITECTURES[config.model_type].parts:
        return RecurrentSpec(layers, config.hidden_size, config.conv_L_cache - 1)
    heads, keys, values = config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim
    # Queries, keys and values, and for each head its decay and its learning rate.
    columns = 2 * config.linear_num_key_heads * keys + heads * values + 2 * heads
    return RecurrentSpec(layers, columns, config.linear_conv_kernel_dim - 1, (heads, keys, values))
