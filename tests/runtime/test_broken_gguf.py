"""GGUF files that are damaged, cut off, in parts, or made to harm: each is refused in one line before it costs anything."""

import math
import os
import pickle
import struct
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGUFReader
from transformers import Qwen3Config

from runtime.engine import load_engine
from runtime.errors import ModelUnavailable, StartError
from runtime.gguf_file import StoredTensor
from runtime.gguf_model import dense_model, stored_model
from runtime.models import find_model
from runtime.settings import Settings
from runtime.text import Text
from tests.conftest import SMALL, save_random_model
from tests.gguf_files import HALVES, Kind, write_gguf

Damage = Callable[[bytes], bytes]

# The first tensor's name, length before it, in the table.
_FIRST = struct.pack("<Q", len("output_norm.weight")) + b"output_norm.weight"


def cut_before(mark: bytes, more: int = 0) -> Damage:
    return lambda whole: whole[: whole.index(mark) + more]


def put(at: int, layout: str, value: int) -> Damage:
    return lambda whole: whole[:at] + struct.pack(layout, value) + whole[at + struct.calcsize(layout) :]


def replaced(old: bytes, new: bytes) -> Damage:
    def damage(whole: bytes) -> bytes:
        assert whole.count(old) >= 1
        return whole.replace(old, new, 1)

    return damage


def of_kind(kind: int) -> Damage:
    """Makes the first tensor, a vector, one of this kind."""

    def damage(whole: bytes) -> bytes:
        at = whole.index(_FIRST) + len(_FIRST) + 4 + 8
        return put(at, "<I", kind)(whole)

    return damage


def of_dimensions(count: int) -> Damage:
    """Gives the first tensor this many dimensions, the largest that there are numbers for."""
    return replaced(_FIRST + struct.pack("<IQ", 1, 64), _FIRST + struct.pack("<I", count) + b"\xff" * 8 * count)


def named(name: bytes) -> Damage:
    """Gives the first tensor this name."""
    return replaced(_FIRST, struct.pack("<Q", len(name)) + name)


DAMAGES: Mapping[str, Damage] = {
    "nothing": lambda _: b"",
    "one byte": lambda whole: whole[:1],
    "a text": lambda _: b"weights",
    "a pickle": lambda _: pickle.dumps({"weights": list(range(100))}),
    "a web page": lambda _: b"<!doctype html><title>404</title>" * 40,
    "zeros": lambda whole: bytes(len(whole)),
    "the wrong end first": put(4, ">I", 3),
    "version 1": put(4, "<I", 1),
    "version 99": put(4, "<I", 99),
    "more tensors than there are numbers for": put(8, "<Q", 2**63),
    "more metadata than there are numbers for": put(16, "<Q", 2**63),
    "a key as long as the world": put(24, "<Q", 2**63),
    "cut inside its header": lambda whole: whole[:20],
    "cut inside its vocabulary": cut_before(b"tokenizer.ggml.tokens", 200),
    "cut inside its table of tensors": cut_before(_FIRST, 30),
    "cut behind its table of tensors": cut_before(b"token_embd.weight", 60),
    "cut inside its last tensor": lambda whole: whole[:-100],
    "two tensors of one name": replaced(b"blk.0.attn_k.weight", b"blk.0.attn_v.weight"),
    "a tensor of another name": replaced(b"blk.0.attn_k.weight", b"blk.9.attn_k.weight"),
    "a tensor of a kind that nobody knows": of_kind(200),
    "a vector of quantised blocks": of_kind(12),
    "a tensor of whole numbers": of_kind(26),
    "a tensor without end": replaced(_FIRST + struct.pack("<IQ", 1, 64), _FIRST + struct.pack("<IQ", 1, 2**40)),
    "a tensor of more dimensions than can be multiplied": of_dimensions(200_000),
    "a tensor of one dimension too many": of_dimensions(5),
    "a tensor of a name as long as a book": named(b"a\n" * 100_000),
    "a tensor of nothing": replaced(_FIRST + struct.pack("<IQ", 1, 64), _FIRST + struct.pack("<IQ", 1, 0)),
    "no architecture": replaced(b"general.architecture", b"general.architectura"),
    "a name that is no text": replaced(b"output_norm.weight", b"\xff" * 18),
}

METADATA: Mapping[str, dict[str, Any]] = {
    "an architecture that nobody knows": {"general__architecture": "frobnicate"},
    "an architecture that is none of ours": {"general__architecture": "falcon"},
    "an encoder of pictures": {"general__architecture": "clip"},
    "an architecture that is a number": {"general__architecture": 3},
    "a thousand million layers": {"qwen3__block_count": 10**9},
    "no layer": {"qwen3__block_count": 0},
    "one layer more than it has": {"qwen3__block_count": 3},
    "one layer less than it has": {"qwen3__block_count": 1},
    "layers in words": {"qwen3__block_count": "two"},
    "layers left out": {"qwen3__block_count": None},
    "no heads": {"qwen3__attention__head_count": 0},
    "heads by layer": {"qwen3__attention__head_count_kv": [2, 1]},
    "heads that do not divide": {"qwen3__attention__head_count_kv": 3},
    "heads as wide as the world": {"qwen3__attention__key_length": 2**31},
    "rows of another width": {"qwen3__embedding_length": 65},
    "no context": {"qwen3__context_length": 0},
    "a norm of next to nothing": {"qwen3__attention__layer_norm_rms_epsilon": np.float64(1e-60)},
    "a norm of NaN": {"qwen3__attention__layer_norm_rms_epsilon": math.nan},
    "angles of NaN": {"qwen3__rope__freq_base": math.nan},
    "angles of no base": {"qwen3__rope__freq_base": 0.0},
    "an unknown scaling of angles": {"qwen3__rope__scaling__type": "longrope"},
    "a scaling by nothing": {"qwen3__rope__scaling__type": "linear"},
    "a scaling by NaN": {"qwen3__rope__scaling__type": "linear", "qwen3__rope__scaling__factor": math.nan},
    "factors of angles for others": {"rope_factors": torch.ones(3)},
    "factors of angles that are zero": {"rope_factors": torch.zeros(16)},
    "a template that is no text": {"tokenizer__chat_template": 7},
    "an end of turns that it lacks": {"tokenizer__ggml__eot_token_id": 10**6},
    "an end of turns in words": {"tokenizer__ggml__eot_token_id": "the end"},
    "an end of turns in fractions": {"tokenizer__ggml__eot_token_id": 2.0, "tokenizer__ggml__eos_token_id": None},
    "one part of three": {"split__count": 3},
    "an alignment of nothing": {"general__alignment": 0},
    "an alignment of fractions": {"general__alignment": 32.0},
    "an alignment in words": {"general__alignment": "32"},
    "no vocabulary": {"tokenizer__ggml__tokens": None},
    "more tokens than embeddings": {"tokenizer__ggml__tokens": [f"<{number}>" for number in range(3000)]},
    "a tokenizer that nobody knows": {"tokenizer__ggml__model": "bert"},
    "merges of one word": {"tokenizer__ggml__merges": ["alone"]},
    "merges of words that it lacks": {"tokenizer__ggml__merges": ["\u0100\u0101 \u0102\u0103"]},
    "an end that it lacks": {"tokenizer__ggml__eos_token_id": 10**6},
}


_NAN, _INFINITE = (np.array(value, np.float16).tobytes() for value in (np.nan, -np.inf))
# Kinds of blocks, where in one what is no number lies, and its bytes.
NO_NUMBERS = (
    *((kind, at, value) for kind, places in HALVES.items() for at in places for value in (_NAN, _INFINITE)),
    (Kind.F32, 0, np.array(np.nan, np.float32).tobytes()),
    (Kind.F16, 0, _INFINITE),
    (Kind.BF16, 0, b"\xc0\x7f"),
)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose embedding is as wide as a block of any kind, and is not its head too."""
    config = Qwen3Config(**SMALL | {"hidden_size": 256}, head_dim=32, tie_word_embeddings=False)
    return save_random_model(config, tmp_path_factory.mktemp("wide"))


@pytest.fixture(scope="module")
def whole(small_models: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("whole") / "model.gguf"
    write_gguf(small_models["qwen3"], file)
    return file.read_bytes()


def start(model: Path) -> None:
    directory = find_model(str(model))
    Text.load(directory)
    load_engine(Settings(model=str(model), device="cpu", window=64), directory)


def refusal(model: Path) -> str:
    """The line with which a start ends."""
    with pytest.raises(StartError) as caught:
        start(model)
    (line,) = str(caught.value).splitlines()
    assert len(line) < 800
    return line


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_in_a_line_that_names_it(damage: str, whole: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(DAMAGES[damage](whole))

    assert str(file) in refusal(file)


@pytest.mark.parametrize("metadata", METADATA)
def test_a_file_that_says_what_cannot_be_is_refused_in_a_line(
    metadata: str, small_models: Mapping[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(small_models["qwen3"], file, **METADATA[metadata])

    refusal(file)


@pytest.mark.parametrize(
    ("name", "value"),
    [("expert_count", None), ("expert_count", 4), ("expert_used_count", None), ("attention__sliding_window", 0)],
)
def test_a_file_whose_experts_or_windows_cannot_be_is_refused_in_a_line(
    name: str, value: int | None, small_models: Mapping[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "model.gguf"
    metadata: dict[str, Any] = {f"gpt-oss__{name}": value}
    write_gguf(small_models["gpt_oss"], file, **metadata)

    assert str(file) in refusal(file)


def test_a_part_of_a_split_file_is_refused_with_what_joins_them(
    small_models: Mapping[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "model-00001-of-00003.gguf"
    write_gguf(small_models["qwen3"], file, split__count=3)

    assert "llama-gguf-split --merge" in refusal(file)


@pytest.mark.parametrize("error", [OSError("gone"), TypeError("odd"), RuntimeError("torch")], ids=repr)
@pytest.mark.parametrize("load", [partial(dense_model, dtype=torch.float32), stored_model], ids=["dense", "stored"])
def test_a_tensor_that_cannot_be_read_is_told_of_in_a_line_that_names_the_file(
    load: Callable[[Path], Any], error: Exception, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: StoredTensor) -> torch.Tensor:
        raise error

    file = tmp_path / "model.gguf"
    file.write_bytes(whole)
    monkeypatch.setattr(StoredTensor, "dense", fail)

    with pytest.raises(ModelUnavailable, match=str(error)) as caught:
        load(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("damage", NO_NUMBERS, ids=[f"{kind.name} at {at}" for kind, at, _ in NO_NUMBERS])
def test_weights_that_are_no_numbers_are_told_of(damage: tuple[Kind, int, bytes], wide: Path, tmp_path: Path) -> None:
    """Those of one token's embedding, which the tokens that a start tries do not meet."""
    kind, at, value = damage
    file = tmp_path / "model.gguf"
    write_gguf(wide, file, lambda name: kind if name == "token_embd.weight" else Kind.F32)
    embedding = next(tensor for tensor in GGUFReader(file, "r+").tensors if tensor.name == "token_embd.weight")
    last_block = embedding.data.reshape(-1).view(np.uint8)[-GGML_QUANT_SIZES[kind][1] :]
    last_block[at : at + len(value)] = np.frombuffer(value, np.uint8)

    with pytest.raises(ModelUnavailable, match=r"embed_tokens\.weight has values that are not finite") as stored:
        stored_model(file)
    with pytest.raises(ModelUnavailable, match=r"embed_tokens\.weight has values that are not finite") as dense:
        load_engine(Settings(device="cpu", backend="torch", window=64), file)
    assert all(str(file) in str(caught.value) for caught in (stored, dense))


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.gguf")

    refusal(tmp_path / "model.gguf")
    refusal(tmp_path)


def test_a_link_to_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").symlink_to(tmp_path / "gone")

    refusal(tmp_path / "model.gguf")


def test_a_directory_of_several_files_is_refused_with_one_of_them(whole: bytes, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(whole)

    line = refusal(tmp_path)

    assert "holds 2 GGUF files" in line
    assert str(tmp_path / "a.gguf") in line


def test_a_directory_of_the_eyes_of_a_model_alone_is_refused(whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "mmproj-model.gguf").write_bytes(whole)

    assert "config.json" in refusal(tmp_path)
