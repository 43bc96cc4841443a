"""Models that are damaged, hostile or of another kind: each stops the start with one line, and none is served."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from runtime.durable import fingerprint
from runtime.engine import Engine, load_engine
from runtime.errors import ModelUnavailable, StartError
from runtime.models import find_model
from runtime.settings import Settings
from runtime.text import Text

CHOSEN = Settings(
    device="cpu", backend="torch", dtype="float32", determinism="fast", window=60, capacity=1, max_concurrent=1
)
NAN, INFINITE = float("nan"), float("inf")
Change = Callable[[Path], None]


def started(directory: Path, chosen: Settings = CHOSEN) -> Engine:
    """As a server starts."""
    found = find_model(str(directory))
    Text.load(found)
    return load_engine(chosen, found)


@pytest.fixture
def model(small_models: Mapping[str, Path], tmp_path: Path) -> Path:
    """A copy of a small model, to be changed."""
    return shutil.copytree(small_models["qwen3"], tmp_path / "model")


def refused(directory: Path, chosen: Settings = CHOSEN) -> str:
    """The line that says why a model does not start."""
    with pytest.raises(StartError) as caught:
        started(directory, chosen)
    said = str(caught.value)
    assert len(said.splitlines()) == 1
    assert len(said) < 800
    return said


def configure(directory: Path, **values: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_as_it_is_it_starts(model: Path) -> None:
    assert started(model).facts.architecture == "qwen3"


COUNTS = [
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size"),
    *("intermediate_size", "vocab_size", "max_position_embeddings"),
]


@pytest.mark.parametrize("name", COUNTS)
def test_a_count_that_no_model_has_is_told_by_its_name(model: Path, name: str) -> None:
    values: list[Any] = [-1, 0, 10**13, 10**30, NAN, INFINITE, 1.5, "12", True, [1], {}]
    for value in values:
        configure(model, **{name: value})

        assert name in refused(model)


@pytest.mark.parametrize("layers", [2**10 + 1, 10**9, 2**63])
def test_the_skeleton_of_a_model_without_end_is_not_made(model: Path, layers: int) -> None:
    configure(model, num_hidden_layers=layers, layer_types=None)

    assert "num_hidden_layers must be from 1 to" in refused(model)


@pytest.mark.parametrize("outer", ["qwen3_5", "qwen3_5_moe"])
@pytest.mark.parametrize(
    ("name", "value"),
    [("num_hidden_layers", 20_000_000), ("rope_theta", NAN), ("rope_parameters", {"rope_theta": NAN})],
    ids=str,
)
def test_the_text_part_of_a_multimodal_model_is_checked_as_a_model_is(
    small_models: Mapping[str, Path], tmp_path: Path, outer: str, name: str, value: Any
) -> None:
    model = shutil.copytree(small_models[f"{outer}_text"], tmp_path / "model")
    text = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({"model_type": outer, "text_config": text | {name: value}}))

    assert name.removesuffix("parameters") in refused(model)


@pytest.mark.parametrize("value", [-1e-6, NAN, INFINITE, 2.0, "1e-6", None, True, [1e-6]], ids=repr)
def test_an_epsilon_that_is_none_is_told_by_its_name(model: Path, value: Any) -> None:
    configure(model, rms_norm_eps=value)

    assert "rms_norm_eps" in refused(model)


@pytest.mark.parametrize(
    "value", [-1.0, 0, NAN, INFINITE, 10**400, "10000", {"a": NAN}], ids=lambda value: str(value)[:9]
)
@pytest.mark.parametrize("place", ["rope_parameters", "rope_scaling", "config"])
def test_angles_that_are_no_numbers_are_refused(model: Path, value: Any, place: str) -> None:
    if place == "config":
        configure(model, rope_parameters=None, rope_theta=value)
    else:
        configure(model, **{"rope_parameters": None, place: {"rope_type": "default", "rope_theta": value}})

    assert refused(model)


@pytest.mark.parametrize("value", [-1.0, 0, NAN, INFINITE, "2"], ids=repr)
@pytest.mark.parametrize("name", ["factor", "attention_factor", "beta_fast", "original_max_position_embeddings"])
def test_angles_that_are_scaled_by_no_number_are_refused(model: Path, name: str, value: Any) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 256}
    configure(model, rope_parameters=yarn | {name: value})

    assert name in refused(model)


# Values that a configuration may not have, or that make the model another one.
OTHERS: dict[str, list[Any]] = {
    "dtype": ["load", "Tensor", "int8", "complex64", "x", 5, [], {"": "float32"}],
    "torch_dtype": ["load", "save", "quint8"],
    "quantization_config": [{}, {"quant_method": "gptq"}, {"quant_method": "?"}, "int4", [], 4],
    "model_type": ["gpt2", "?", None, 5, []],
    "hidden_act": ["?", None, 5],
    "text_config": [{}, 5, [], {"model_type": "?"}],
    "layer_types": ["?", 5, [], ["?", "?"]],
    "tie_word_embeddings": ["yes", None, 1, False],
    "pad_token_id": ["?", NAN, 10**30, 2048],
    "eos_token_id": ["?", NAN, ["?"], [[2]]],
    "rope_parameters": ["?", 5, [], {"rope_type": "?"}, {"rope_type": "dynamic", "factor": 2.0}],
}
CHANGES: list[dict[str, Any]] = [
    *({name: value} for name, values in OTHERS.items() for value in values),
    {"attention_bias": True},
    {"head_dim": 33},
    {"num_attention_heads": 3},
    {"num_key_value_heads": 3},
    {"num_hidden_layers": 1, "layer_types": None},
    {"num_hidden_layers": 3, "layer_types": None},
    {"vocab_size": 2047},
    {"model_type": "?", "auto_map": {"AutoConfig": "code.Config"}},
]


@pytest.mark.parametrize("values", CHANGES, ids=str)
def test_a_configuration_that_is_of_no_model_or_of_another_is_refused(model: Path, values: dict[str, Any]) -> None:
    configure(model, **values)

    assert refused(model)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_more_ends_of_a_turn_than_a_session_can_have_are_refused(model: Path, name: str) -> None:
    file = model / name
    others = json.loads(file.read_text()) if file.exists() else {}

    file.write_text(json.dumps(others | {"eos_token_id": list(range(65))}))

    assert "65 tokens that end a turn" in refused(model)


BROKEN = {
    "list": b"[]",
    "text": b'"x"',
    "null": b"null",
    "empty": b"",
    "cut": b'{"a":',
    "bytes": b"\xff\xfe\x00",
    "deep": b"[" * 100_000,
    "digits": b'{"vocab_size": ' + b"9" * 5000 + b"}",
}
FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_damaged_is_told_of(model: Path, name: str, content: bytes) -> None:
    (model / name).write_bytes(content)

    assert refused(model)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_file_that_is_a_directory_is_told_of(model: Path, name: str) -> None:
    (model / name).unlink()
    (model / name).mkdir()

    assert refused(model)


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json", "x.gguf"]
)
def test_a_file_that_cannot_be_looked_at_is_told_of(model: Path, name: str) -> None:
    (model / "model.safetensors").rename(model / SHARD)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {NORM: SHARD}}))
    (model / name).unlink(missing_ok=True)
    # As in a directory that may not be entered, to look ends with an OSError, also for root, whom no permissions bind.
    (model / name).symlink_to("a" * 300)

    assert f"{name} cannot be looked at" in refused(model)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"type": "Mystery"}},
        {"model": {"type": "WordLevel", "vocab": {}, "unk_token": "?"}},
        {"decoder": {"type": "Mystery"}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}},
        {"added_tokens": [{"id": -1}]},
        {"version": "9.0"},
        # tokenizers panics at these.
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}},
        {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "x"}},
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    ],
    ids=str,
)
def test_a_tokenizer_of_an_unknown_kind_is_told_of(model: Path, changes: dict[str, Any]) -> None:
    file = model / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    assert "tokenizer" in refused(model)


@pytest.mark.parametrize("changes", [{"tokenizer_class": 5}, {"eos_token": 5}, {"chat_template": 5}], ids=str)
def test_a_tokenizers_configuration_that_makes_no_sense_is_told_of(model: Path, changes: dict[str, Any]) -> None:
    (model / "chat_template.jinja").unlink()
    file = model / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    assert refused(model)


def reweighed(change: Callable[[dict[str, Tensor]], None], directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def with_value(name: str, value: float) -> Change:
    def change(weights: dict[str, Tensor]) -> None:
        weights[name].view(-1)[-1] = value

    return partial(reweighed, change)


def with_tensor(name: str, tensor: Tensor) -> Change:
    return partial(reweighed, lambda weights: weights.update({name: tensor}))


def without(name: str) -> Change:
    def change(weights: dict[str, Tensor]) -> None:
        del weights[name]

    return partial(reweighed, change)


def truncated(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickled(directory: Path) -> None:
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def unweighed(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


NORM, LAST = "model.norm.weight", "model.layers.1.mlp.down_proj.weight"
WEIGHTS: dict[str, tuple[Change, str]] = {
    "one value of the embedding is NaN": (with_value("model.embed_tokens.weight", NAN), "embed_tokens"),
    "one value of a norm is NaN": (with_value(NORM, NAN), NORM),
    "one value of the last layer is infinite": (with_value(LAST, -INFINITE), LAST),
    "values that overflow": (with_tensor(NORM, torch.full((64,), 3e38)), "no numbers"),
    "values that overflow in this type": (with_tensor(NORM, torch.full((64,), 1e300, dtype=torch.float64)), NORM),
    "another shape": (with_tensor(NORM, torch.ones(32)), NORM),
    "another rank": (with_tensor(NORM, torch.ones(64, 1)), NORM),
    "whole numbers": (with_tensor(NORM, torch.ones(64, dtype=torch.int8)), NORM),
    "a tensor too few": (without(NORM), NORM),
    "a layer too many": (with_tensor("model.layers.7.mlp.up_proj.weight", torch.ones(2, 2)), "layers.7"),
    "cut short": (truncated, "model.safetensors"),
    "pickles alone": (pickled, "convert them to safetensors"),
    "none": (unweighed, "holds no weights"),
}


@pytest.mark.parametrize(("change", "words"), WEIGHTS.values(), ids=WEIGHTS)
def test_weights_that_are_damaged_are_told_of(model: Path, change: Change, words: str) -> None:
    change(model)

    assert words in refused(model)


def test_a_model_that_computes_no_numbers_is_not_taken_for_an_inexact_machine(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(model.parent / "cache"))
    chosen = Settings(device="cpu", backend="torch", window=60, capacity=1, max_concurrent=1)
    whole = shutil.copytree(model, model.parent / "whole")
    with_tensor(NORM, torch.full((64,), 3e38))(model)

    assert "no numbers" in refused(model, chosen)
    assert started(whole, chosen).facts.row_tile > 1


SHARD = "model-00001-of-00001.safetensors"
INDEXES: dict[str, tuple[Callable[[str], object], str]] = {
    "above": (lambda name: {"weight_map": {name: "../outside.safetensors"}}, "outside"),
    "absolute": (lambda name: {"weight_map": {name: "/tmp/outside.safetensors"}}, "outside"),
    "below": (lambda name: {"weight_map": {name: "below/outside.safetensors"}}, "outside"),
    "a pickle": (lambda name: {"weight_map": {name: "outside.bin"}}, "outside.bin"),
    "nothing there": (lambda name: {"weight_map": {name: "model-00002-of-00002.safetensors"}}, "lacks"),
    "a number": (lambda name: {"weight_map": {name: 5}}, "5"),
    "a list": (lambda name: [], "index.json"),
    "no map": (lambda name: {}, "index.json"),
    "an empty map": (lambda name: {"weight_map": {}}, "index.json"),
    "a map that is a list": (lambda name: {"weight_map": [name]}, "index.json"),
}


@pytest.mark.parametrize(("index", "words"), INDEXES.values(), ids=INDEXES)
def test_an_index_that_names_what_is_not_beside_it_is_refused(
    model: Path, index: Callable[[str], object], words: str
) -> None:
    shutil.copy(model / "model.safetensors", model.parent / "outside.safetensors")
    (model / "model.safetensors").rename(model / SHARD)
    (model / "model.safetensors.index.json").write_text(json.dumps(index(NORM)))

    assert words in refused(model)


def test_an_index_of_files_beside_it_is_followed(model: Path) -> None:
    names = load_file(model / "model.safetensors")
    (model / "model.safetensors").rename(model / SHARD)
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, SHARD)})
    )

    assert started(model).facts.vocabulary == 2048


@pytest.mark.parametrize("name", ["a" * 5000, "\0", "", "\ud800", "~/model", "org/\n"])
def test_a_name_that_no_file_can_have_is_no_model(name: str) -> None:
    with pytest.raises(ModelUnavailable):
        find_model(name)


def test_weights_that_are_not_there_have_no_fingerprint(model: Path) -> None:
    (model / "more.safetensors").symlink_to(model / "nowhere")

    with pytest.raises(ModelUnavailable, match=r"more\.safetensors"):
        fingerprint(model)
