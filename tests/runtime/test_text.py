"""Text: tokens and back, whole characters at a time, and the chat template."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from runtime.errors import InvalidRequest, MalformedRequest, ModelUnavailable
from runtime.text import Text
from tests.actors.engines import tiny_text

HALF = "\ufffd"
FAMILY = "👩\u200d👩\u200d👧\u200d👦"
WRITTEN = st.one_of(
    st.text(),
    st.lists(st.sampled_from([FAMILY, "🇺🇳", "e\u0301", "न", "ﷺ", HALF, " ", "\n", "<|im_end|>", "word"])).map("".join),
)


def save_byte_fallback_tokenizer(directory: Path) -> None:
    """A tokenizer as Llama 2 and Mistral have it: words begin with a mark, what is no word is spelt in bytes."""
    words = ["▁", *"helowrd.n't", "he", "ll", "hell", "hello", "▁hello", "▁w", "or"]
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("▁", "hello"), ("▁", "w"), ("o", "r")]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *dict.fromkeys(words)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(directory)


@pytest.fixture(scope="session")
def texts(seedling: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Text]:
    directory = tmp_path_factory.mktemp("byte_fallback")
    save_byte_fallback_tokenizer(directory)
    return {"byte level": Text.load(seedling), "byte fallback": Text.load(directory)}


each_kind = pytest.mark.parametrize("kind", ["byte level", "byte fallback"])


def pieces_of(text: Text, token_ids: list[int]) -> list[str]:
    detokenizer = text.detokenizer()
    return [detokenizer.feed(token_id) for token_id in token_ids]


@each_kind
@settings(max_examples=300)
@given(written=WRITTEN)
@example(written=FAMILY)
@example(written=f"a{HALF}b")
@example(written="  two  spaces \n\n")
def test_pieces_make_the_text_that_all_tokens_make(texts: Mapping[str, Text], kind: str, written: str) -> None:
    text = texts[kind]
    token_ids = text.encode(written)

    joined = "".join(pieces_of(text, token_ids))

    # Characters that look like half of one are held back until another follows.
    whole = text.decode(token_ids)
    assert whole.startswith(joined)
    assert not whole[len(joined) :].strip(HALF)


@each_kind
@settings(max_examples=300)
@given(written=WRITTEN.map(lambda text: text.replace(HALF, "")))
@example(written=FAMILY)
def test_no_piece_holds_half_a_character(texts: Mapping[str, Text], kind: str, written: str) -> None:
    text = texts[kind]

    assert not [piece for piece in pieces_of(text, text.encode(written)) if HALF in piece]


@each_kind
@settings(max_examples=300)
@given(parts=st.lists(st.one_of(WRITTEN, st.sampled_from([0, 1, 2, 10**6]))))
@example(parts=["a", 2, 2, 2, "b"])
@example(parts=[2] * 100)
def test_pieces_between_tokens_without_text_make_the_text_of_all(
    texts: Mapping[str, Text], kind: str, parts: list[str | int]
) -> None:
    text = texts[kind]
    token_ids = [token_id for part in parts for token_id in (text.encode(part) if isinstance(part, str) else [part])]

    joined = "".join(pieces_of(text, token_ids))

    whole = text.decode(token_ids)
    assert whole.startswith(joined)
    assert not whole[len(joined) :].strip(HALF)


class Counting:
    """A tokenizer that counts the tokens that it decodes."""

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        self.decoded = 0

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        self.decoded += len(token_ids)
        text: str = self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


class Counted(PreTrainedTokenizerFast):
    """A fast tokenizer on a counting one."""

    counting: Counting

    @property
    def backend_tokenizer(self) -> Any:
        return self.counting


@pytest.mark.parametrize("token_id", [2, 10**6], ids=["special", "of no word"])
def test_tokens_without_text_cost_the_same_however_many_came_before(seedling: Path, token_id: int) -> None:
    tokenizer = Counted.from_pretrained(seedling)
    tokenizer.counting = counting = Counting(PreTrainedTokenizerFast.from_pretrained(seedling).backend_tokenizer)
    text = Text(tokenizer, frozenset({2}))

    assert pieces_of(text, [*text.encode("hello"), *[token_id] * 1000])[-1] == ""
    assert counting.decoded < 100


@each_kind
def test_a_character_comes_whole_with_the_last_of_its_tokens(texts: Mapping[str, Text], kind: str) -> None:
    text = texts[kind]
    token_ids = text.encode("👩")

    pieces = pieces_of(text, token_ids)

    assert len(token_ids) >= 4
    assert [piece for piece in pieces if piece] == pieces[-1:] == ["👩"]


@each_kind
def test_a_character_cut_off_at_the_end_is_left_out(texts: Mapping[str, Text], kind: str) -> None:
    text = texts[kind]

    assert "".join(pieces_of(text, text.encode("so 👩")[:-1])) == "so "


@settings(max_examples=300)
@given(token_ids=st.lists(st.integers(0, 2047), max_size=30))
def test_pieces_of_any_tokens_are_the_start_of_their_text(texts: Mapping[str, Text], token_ids: list[int]) -> None:
    text = texts["byte level"]

    joined = "".join(pieces_of(text, token_ids))

    whole = text.decode(token_ids)
    assert whole.startswith(joined)
    assert not whole[len(joined) :].strip(HALF)


@settings(max_examples=300)
@given(token_ids=st.lists(st.integers(0, 258), max_size=30))
@example(token_ids=[13, 131, 259])
def test_bytes_that_are_no_text_do_not_stop_a_stream(texts: Mapping[str, Text], token_ids: list[int]) -> None:
    text = texts["byte fallback"]

    joined = "".join(pieces_of(text, [*token_ids, *text.encode("hello world")]))

    assert joined.endswith("hello world")


@settings(max_examples=200)
@given(written=st.text())
def test_text_survives_its_way_to_tokens_and_back(texts: Mapping[str, Text], written: str) -> None:
    text = texts["byte level"]

    assert text.decode(text.encode(written)) == written


def test_special_tokens_in_text_are_single_tokens_that_have_no_text(texts: Mapping[str, Text]) -> None:
    text = texts["byte level"]
    token_ids = text.encode("<|im_end|>hello")

    assert token_ids[0] in text.eos_token_ids
    assert "".join(pieces_of(text, token_ids)) == text.decode(token_ids) == "hello"


def test_two_streams_of_one_model_do_not_mix(texts: Mapping[str, Text]) -> None:
    text = texts["byte level"]
    one, other = text.detokenizer(), text.detokenizer()
    token_ids = text.encode("👩")

    fed = [(one.feed(token_id), other.feed(token_id)) for token_id in token_ids]

    assert fed[-1] == ("👩", "👩")


def copied(seedling: Path, to: Path, change: Callable[[Path], object]) -> Path:
    shutil.copytree(seedling, to)
    change(to)
    return to


def with_template(template: str) -> Callable[[Path], object]:
    return lambda directory: (directory / "chat_template.jinja").write_text(template) and None


TALK = [{"role": "user", "content": "Hi 👩"}]
ANSWERED = [*TALK, {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "  How?  "}]


def test_a_conversation_is_rendered_up_to_the_assistants_turn(texts: Mapping[str, Text]) -> None:
    text = texts["byte level"]

    token_ids = text.render(TALK)

    assert token_ids == text.encode("<|im_start|>user\nHi 👩<|im_end|>\n<|im_start|>assistant\n")


def test_the_next_turn_continues_what_was_rendered_and_said(texts: Mapping[str, Text]) -> None:
    text = texts["byte level"]
    said = text.encode("Hello.")

    going_on = text.render_next_turn("  How?  ", is_after_eos=False)

    assert text.render(TALK) + said + going_on == text.render(ANSWERED)


def test_the_next_turn_after_an_end_of_turn_does_not_end_it_again(texts: Mapping[str, Text]) -> None:
    text = texts["byte level"]
    said = text.encode("Hello.<|im_end|>")

    going_on = text.render_next_turn("  How?  ", is_after_eos=True)

    assert text.render(TALK) + said + going_on == text.render(ANSWERED)


@pytest.mark.parametrize("content", ["  How?  ", "", " ", "∴", "a∴b"])
def test_the_next_turn_works_with_a_template_that_trims(seedling: Path, tmp_path: Path, content: str) -> None:
    template = (seedling / "chat_template.jinja").read_text().replace("message.content", "message.content | trim")
    text = Text.load(copied(seedling, tmp_path / "model", with_template(template)))

    going_on = text.render_next_turn(content, is_after_eos=False)

    turn = f"<|im_end|>\n<|im_start|>user\n{content.strip()}<|im_end|>\n<|im_start|>assistant\n"
    assert going_on == text.encode(turn)


@pytest.mark.parametrize("content", ["How?", "", "∴", "a∴b"])
@pytest.mark.parametrize(
    "template", ["{{ messages[-1].content }}", "{{ messages[:2] | map(attribute='content') | join }}"]
)
def test_no_turn_follows_where_the_template_leaves_one_out(
    seedling: Path, tmp_path: Path, template: str, content: str
) -> None:
    text = Text.load(copied(seedling, tmp_path / "model", with_template(template)))

    with pytest.raises(MalformedRequest, match="leaves out earlier turns") as caught:
        text.render_next_turn(content, is_after_eos=True)
    assert "\n" not in str(caught.value)


def test_a_role_that_the_template_does_not_know_is_refused(texts: Mapping[str, Text]) -> None:
    with pytest.raises(MalformedRequest, match="unknown role: wizard") as caught:
        texts["byte level"].render([{"role": "wizard", "content": "abracadabra"}])

    assert caught.value.param == "messages"


def test_a_model_without_a_chat_template_takes_no_messages(texts: Mapping[str, Text]) -> None:
    with pytest.raises(MalformedRequest, match="no chat template"):
        texts["byte fallback"].render(TALK)


ENDING: dict[str, tuple[dict[str, Any], dict[str, Any], str | None, set[int]]] = {
    # What config.json, generation_config.json and tokenizer_config.json name, and what ends a turn.
    "config, one": ({"eos_token_id": 5}, {}, None, {5}),
    "config, several": ({"eos_token_id": [5, 6]}, {}, None, {5, 6}),
    "generation config, one": ({}, {"eos_token_id": 5}, None, {5}),
    "generation config, several": ({}, {"eos_token_id": [5, 6]}, None, {5, 6}),
    "tokenizer": ({}, {}, "<|im_end|>", {2}),
    "all": ({"eos_token_id": [5, 7]}, {"eos_token_id": [7, 8]}, "<|im_end|>", {2, 5, 7, 8}),
    "nowhere": ({}, {}, None, set()),
    "null": ({"eos_token_id": None}, {"eos_token_id": None}, None, set()),
    "empty lists": ({"eos_token_id": []}, {"eos_token_id": []}, None, set()),
    "none by another name": ({"eos_token_id": -1}, {"eos_token_id": [-1, None]}, None, set()),
    "what no wire has": ({"eos_token_id": 2**32}, {"eos_token_id": [True, 2.0, "2", [2]]}, None, set()),
}


def ending(directory: Path, config: dict[str, Any], generation: dict[str, Any], word: str | None) -> None:
    """Has the files of a model name these ends of a turn, and no others."""
    kept = json.loads((directory / "config.json").read_text())
    kept.pop("eos_token_id")
    (directory / "config.json").write_text(json.dumps(kept | config))
    (directory / "generation_config.json").write_text(json.dumps(generation))
    tokenizer = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"eos_token": word}))


@pytest.mark.parametrize(("config", "generation", "word", "expected"), ENDING.values(), ids=ENDING)
def test_the_tokens_that_end_a_turn_come_from_every_file_that_names_some(
    seedling: Path,
    tmp_path: Path,
    config: dict[str, Any],
    generation: dict[str, Any],
    word: str | None,
    expected: set[int],
) -> None:
    text = Text.load(copied(seedling, tmp_path / "model", lambda model: ending(model, config, generation, word)))

    assert text.eos_token_ids == expected


@pytest.mark.parametrize("named", [[], [5000], [5000, 2]], ids=["nowhere", "an unknown one", "an unknown one too"])
def test_without_an_end_that_the_tokenizer_knows_grammars_are_followed_and_tokens_spelt(
    texts: Mapping[str, Text], seedling: Path, tmp_path: Path, named: list[int]
) -> None:
    text = Text.load(
        copied(seedling, tmp_path / "model", lambda model: ending(model, {"eos_token_id": named}, {}, None))
    )
    way = text.json_grammar({"const": [1]}).follow()
    said = []
    while not way.is_complete:
        allowed = np.flatnonzero(np.unpackbits(way.allowed().view(np.uint8), bitorder="little"))
        said.append(int(allowed[0]))
        way.accept(said[-1])
        assert len(said) < 10

    assert text.decode(said) == "[1]"
    assert [text.spelling(token) for token in range(2048)] == [
        texts["byte level"].spelling(token) for token in range(2048)
    ]


def test_tokens_of_a_kind_that_grammars_cannot_follow_are_spelt_all_the_same() -> None:
    text = tiny_text()

    with pytest.raises(InvalidRequest, match="cannot follow"):
        text.json_grammar({})
    assert [text.spelling(token) for token in (0, 5, 99, 100, 10**6)] == [b"hello", b"word5", b"word99", b"", b""]


def without(*names: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        for name in names:
            (directory / name).unlink()

    return change


def with_a_broken_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").write_text('{"version": "1.0", ')


def with_a_tokenizer_of_another_shape(directory: Path) -> None:
    (directory / "tokenizer.json").write_text('{"model": {"type": "Oracle"}}')


def test_a_model_without_generation_config_ends_a_turn_by_the_tokenizer(seedling: Path, tmp_path: Path) -> None:
    text = Text.load(copied(seedling, tmp_path / "model", without("generation_config.json")))

    assert text.eos_token_ids == {2}


@pytest.mark.parametrize(
    "change",
    [
        without("tokenizer.json", "tokenizer_config.json"),
        without("tokenizer.json"),
        with_a_broken_tokenizer,
        with_a_tokenizer_of_another_shape,
    ],
    ids=["no files", "no tokenizer.json", "broken", "another shape"],
)
def test_a_model_without_a_tokenizer_that_loads_is_unavailable_in_one_line(
    seedling: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    directory = copied(seedling, tmp_path / "model", change)

    with pytest.raises(ModelUnavailable, match="tokenizer") as caught:
        Text.load(directory)

    assert len(str(caught.value).splitlines()) == 1
