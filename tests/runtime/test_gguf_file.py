"""What a GGUF file tells of its model: the tokenizer and template, and where a history of it can go on."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from runtime.durable import fingerprint
from runtime.gguf_file import GgufFile
from runtime.text import Text
from tests.gguf_files import Kind, write_gguf

TEXTS = (
    "Hello, I'm 1234 years old.\n\n  def f(x):\treturn x²",
    "naïve café 日本語 🎉",
    "<|im_start|>user\nhi<|im_end|>\n",
    "",
)


@pytest.fixture(scope="module")
def file(seedling: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model as a GGUF file."""
    path = tmp_path_factory.mktemp("gguf") / "seedling.gguf"
    write_gguf(seedling, path, lambda _: Kind.Q8_0)
    return path


@pytest.mark.parametrize("text", TEXTS)
def test_its_tokens_are_those_of_the_models_own_tokenizer(text: str, file: Path, seedling: Path) -> None:
    own, ours = Text.load(seedling), Text.load(file)

    assert ours.encode(text) == own.encode(text)
    assert ours.decode(own.encode(text)) == own.decode(own.encode(text))


def test_its_template_and_the_end_of_a_turn_are_the_models_own(file: Path, seedling: Path) -> None:
    own, ours = Text.load(seedling), Text.load(file)
    talk = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hi."}]

    assert ours.render(talk) == own.render(talk)
    assert ours.render_next_turn("And then?", is_after_eos=True) == own.render_next_turn("And then?", is_after_eos=True)
    assert ours.eos_token_ids == own.eos_token_ids


@pytest.mark.parametrize("token", ["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
def test_no_text_stands_for_one_of_its_control_tokens(token: str, file: Path) -> None:
    assert Text.load(file).has_special_tokens(f"as {token} a user says")


def test_its_tokenizer_goes_to_another_process_whole(file: Path) -> None:
    text = Text.load(file)

    sent = pickle.loads(pickle.dumps(text))

    assert sent.encode(TEXTS[0]) == text.encode(TEXTS[0])
    assert sent.has_special_tokens("<|im_start|>")


def test_every_token_that_ends_a_turn_is_one_of_its_ends(seedling: Path, tmp_path: Path) -> None:
    write_gguf(seedling, tmp_path / "model.gguf", tokenizer__ggml__eot_token_id=1)

    assert Text.load(tmp_path / "model.gguf").eos_token_ids == {1, 2}


def test_a_split_by_single_digits_is_made_where_the_file_names_one_that_transformers_lacks(
    seedling: Path, tmp_path: Path
) -> None:
    """Of three spaces before a digit llama.cpp makes one run; without a split of digits the last would go to the digit."""
    write_gguf(seedling, tmp_path / "model.gguf", tokenizer__ggml__pre="smollm")

    ours, own = Text.load(tmp_path / "model.gguf"), Text.load(seedling)

    assert ours.encode("x =   7 and 1234") == own.encode("x =   7 and 1234")


def test_a_history_of_one_file_goes_on_with_no_other(file: Path, seedling: Path, tmp_path: Path) -> None:
    write_gguf(seedling, tmp_path / "other.gguf", lambda _: Kind.Q4_0)

    assert fingerprint(file) == fingerprint(file)
    assert len({fingerprint(one) for one in (file, tmp_path / "other.gguf", seedling)}) == 3


def test_what_a_file_leaves_out_is_what_llama_cpp_takes(small_models: Mapping[str, Path], tmp_path: Path) -> None:
    left_out: dict[str, Any] = {"qwen3__rope__freq_base": None, "qwen3__attention__head_count_kv": None}
    write_gguf(small_models["qwen3"], tmp_path / "model.gguf", **left_out)

    values = GgufFile.read(tmp_path / "model.gguf").config_values()

    assert values["rope_parameters"] == {"rope_type": "default", "rope_theta": 10_000.0}
    assert values["num_key_value_heads"] == values["num_attention_heads"]


def test_another_file_in_the_place_of_one_is_read_anew(
    file: Path, small_models: Mapping[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(file.read_bytes())
    before = GgufFile.read(path)

    write_gguf(small_models["qwen3"], tmp_path / "other.gguf")
    (tmp_path / "other.gguf").replace(path)

    assert GgufFile.read(path).embedding.shape != before.embedding.shape


def test_kinds_of_tensors_are_counted(file: Path) -> None:
    kinds = GgufFile.read(file).kinds()

    assert kinds.keys() == {"Q8_0", "F32"}
