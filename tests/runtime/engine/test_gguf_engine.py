"""Engines on GGUF files: what they compute, against transformers on the dequantised weights, and what they say of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from tests.conftest import SMALL, YARN, save_random_model, small_gpt_oss
from tests.gguf_files import Kind, every_kind, write_gguf
from tests.runtime.engine.feeding import Load, LogitsEngine, feed, random_tokens
from tests.runtime.engine.test_engine import ON_EVERY_ENGINE

FITS = 150
WIDE = Qwen3Config(**SMALL | {"hidden_size": 256, "intermediate_size": 512}, head_dim=64, tie_word_embeddings=True)


def transformers_logits(directory: Path, weights: Mapping[str, Tensor], tokens: list[int]) -> Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    model.load_state_dict(weights, strict=False)
    with torch.inference_mode():
        logits: Tensor = model.eval()(input_ids=torch.tensor([tokens])).logits[0]
    return logits


def opened(load: Load, file: Path, **settings: str) -> LogitsEngine:
    """Its bits are tried in test_bit_exact, so nothing is probed here."""
    return load(file, determinism="fast", **{"weights": "auto"} | settings)


def fed(load: Load, file: Path, tokens: list[int], **settings: str) -> Tensor:
    engine = opened(load, file, **settings)
    return feed(engine, engine.new_pool(1).acquire(), tokens)


@pytest.fixture(autouse=True)
def reads_gguf(engine_name: str) -> None:
    if engine_name == "mlx":
        pytest.skip("MLX reads no GGUF files")


@pytest.mark.parametrize("architecture", ON_EVERY_ENGINE)
def test_logits_are_those_of_transformers_on_the_same_weights(
    small_models: Mapping[str, Path], architecture: str, tmp_path: Path, load: Load
) -> None:
    directory = small_models[architecture]
    weights = write_gguf(directory, tmp_path / "model.gguf")
    tokens = random_tokens(FITS, 2048)

    logits = fed(load, tmp_path / "model.gguf", tokens)

    torch.testing.assert_close(logits, transformers_logits(directory, weights, tokens), rtol=0, atol=1e-4)


ROPES: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": (
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 4.0},
    ),
    "yarn": (
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128},
        {
            "llama__rope__scaling__type": "yarn",
            "llama__rope__scaling__factor": 4.0,
            "llama__rope__scaling__original_context_length": 128,
        },
    ),
}


@pytest.mark.parametrize("rope", ROPES)
def test_scaled_rotary_embeddings_turn_as_transformers_own(rope: str, tmp_path: Path, load: Load) -> None:
    parameters, metadata = ROPES[rope]
    directory = save_random_model(LlamaConfig(**SMALL, rope_parameters=parameters), tmp_path)
    weights = write_gguf(directory, tmp_path / "model.gguf", **metadata)
    tokens = random_tokens(FITS, 2048)

    logits = fed(load, tmp_path / "model.gguf", tokens)

    torch.testing.assert_close(logits, transformers_logits(directory, weights, tokens), rtol=0, atol=1e-4)


def test_the_factors_of_llama_3_divide_the_frequencies(tmp_path: Path, load: Load) -> None:
    """llama.cpp's converter writes them as a tensor, worked out as transformers does."""
    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    directory = save_random_model(LlamaConfig(**SMALL, rope_parameters=llama3), tmp_path)
    scaled, plain = (
        AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, rope_parameters=parameters)).model.rotary_emb.inv_freq
        for parameters in (llama3, {"rope_type": "default", "rope_theta": 1e4})
    )
    weights = write_gguf(directory, tmp_path / "model.gguf", rope_factors=plain / scaled)
    tokens = random_tokens(FITS, 2048)

    logits = fed(load, tmp_path / "model.gguf", tokens)

    torch.testing.assert_close(logits, transformers_logits(directory, weights, tokens), rtol=0, atol=1e-4)


def experts_in_mxfp4(name: str) -> Kind:
    return Kind.MXFP4 if "_exps" in name else Kind.Q8_0 if "attn" in name else Kind.F32


def test_experts_in_mxfp4_are_those_of_transformers_on_what_they_stand_for(
    tmp_path: Path, backend: str, load: Load
) -> None:
    """As llama.cpp has gpt-oss; the OpenVINO engine leaves it to torch."""
    if backend != "torch":
        pytest.skip("torch alone has code for experts")
    directory = save_random_model(small_gpt_oss({**YARN, "truncate": False}), tmp_path)
    weights = write_gguf(directory, tmp_path / "model.gguf", experts_in_mxfp4)
    tokens = random_tokens(FITS, 2048)
    engine = load(tmp_path / "model.gguf", "auto", weights="auto", determinism="fast")

    logits = feed(engine, engine.new_pool(1).acquire(), tokens)

    torch.testing.assert_close(logits, transformers_logits(directory, weights, tokens), rtol=0, atol=1e-4)
    assert engine.facts.architecture == "gpt_oss"
    assert "6 of MXFP4" in engine.facts.form_reason


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A file in which each product meets another kind of weights, and what these are."""
    directory = save_random_model(WIDE, tmp_path_factory.mktemp("mixed"))
    return directory, write_gguf(directory, directory / "model.gguf", every_kind)


def test_logits_of_quantised_weights_are_near_those_of_transformers_on_what_they_stand_for(
    mixed: tuple[Path, dict[str, Tensor]], load: Load, engine_name: str
) -> None:
    directory, weights = mixed
    tokens = random_tokens(FITS, 2048)
    expected = transformers_logits(directory, weights, tokens)

    logits = fed(load, directory / "model.gguf", tokens)

    # OpenVINO rounds the rows that it multiplies to 8 bits, which is a matter of a few in a thousand each time.
    most = 0.03 if engine_name == "openvino" else 1e-5
    assert (logits - expected).square().mean().sqrt() < most * expected.std()


def test_each_kind_of_tensor_is_told_with_what_became_of_it(
    mixed: tuple[Path, dict[str, Tensor]], load: Load, engine_name: str
) -> None:
    directory, _ = mixed

    facts = opened(load, directory / "model.gguf").facts

    if engine_name == "openvino":
        told = {line.split(":")[0].split(" of ")[1]: line for line in facts.tensors}
        kinds = (Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.Q5_0, Kind.Q5_1, Kind.Q4_0, Kind.Q4_1, Kind.Q8_0, Kind.Q3_K)
        assert facts.weights == "kept"
        assert {kind.name for kind in kinds} <= told.keys()
        assert "no value rounded" in told["Q4_K"]
        assert "moved by at most" in told["Q3_K"]
    else:
        assert facts.weights == "none"
        assert facts.form_reason.startswith("dequantised: ")
        assert "2 of Q4_K" in facts.form_reason


@pytest.mark.parametrize("weights", ["int8", "int4", "none"])
def test_an_explicit_setting_rounds_them_once_more(
    mixed: tuple[Path, dict[str, Tensor]], weights: str, load: Load
) -> None:
    directory, dense = mixed
    tokens = random_tokens(FITS, 2048)
    expected = transformers_logits(directory, dense, tokens)

    logits = fed(load, directory / "model.gguf", tokens, weights=weights)

    assert opened(load, directory / "model.gguf", weights=weights).facts.weights == weights
    most = {"none": 1e-5, "int8": 0.05, "int4": 0.8}[weights]
    assert (logits - expected).square().mean().sqrt() < most * expected.std()
