"""What an embedding program may pass: each argument that makes no sense is refused by its name, and everything goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from fractions import Fraction
from itertools import count, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from actors import Runtime, open_runtime
from runtime import Done, Overflow, Settings, StopReason, Token
from runtime.errors import InvalidRequest, SessionNotFound, SnapshotNotFound
from runtime.models import SEEDLING, find_model
from runtime.text import Text
from tests.actors.engines import LedgerEngine, generated, open_lab
from tests.runtime.test_text import ending, save_byte_fallback_tokenizer

NAN, INFINITE, HUGE = float("nan"), float("inf"), 10**5000
NO_COUNT = [-1, HUGE * -1, 2.5, NAN, True, "5", b"5", [5], Fraction(5), np.float32(5), np.array([5, 6]), np.True_, int]
NO_NUMBER = [-0.1, NAN, INFINITE, -INFINITE, HUGE, -HUGE, True, "1", [1.0], Fraction(1, 2), 1j]

WRONG: dict[str, list[Any]] = {
    "max_tokens": [0, None, *NO_COUNT],
    "top_logprobs": [10**6, HUGE, *NO_COUNT],
    "top_k": [None, *NO_COUNT],
    "seed": [2**64, HUGE, *NO_COUNT],
    "temperature": [100.1, None, *NO_NUMBER],
    "top_p": [0, 0.0, 1.1, None, *NO_NUMBER],
    "grammar": ["root ::= 'a'", {"type": "object"}, 5],
}


@asynccontextmanager
async def open_small(model: Path | str = SEEDLING) -> AsyncIterator[Runtime]:
    settings = Settings(model=str(model), device="cpu", backend="torch", determinism="fast", window=60, capacity=2)
    async with open_runtime(settings) as runtime:
        yield runtime


@pytest.mark.parametrize("name", WRONG)
async def test_a_generation_that_makes_no_sense_is_refused_and_the_session_goes_on(name: str) -> None:
    async with open_small() as runtime:
        session = await runtime.create_session()
        await session.append([5, 6, 7])
        for value in WRONG[name]:
            with pytest.raises(InvalidRequest) as refused:
                await generated(session, **({"max_tokens": 2} | {name: value}))
            assert refused.value.param == name
            assert len(str(refused.value)) < 200
        assert (
            len(await generated(session, 3, top_logprobs=5, temperature=1, top_p=1, top_k=2**70, seed=2**64 - 1)) == 3
        )
        assert (await session.info()).history_length == 6


async def test_whole_numbers_of_other_kinds_are_taken() -> None:
    async with open_small() as runtime:
        whole: Any = np.int64
        session = await runtime.create_session(np.arange(3000, 3003))
        await session.append(np.array([5, 6, 7], np.int16), whole(0))
        kinds = {"top_k": np.uint8(3), "seed": np.uint64(2**64 - 1), "top_logprobs": np.int32(1)}

        assert len(await generated(session, whole(3), temperature=np.float64(0.5), **kinds)) == 3


@pytest.mark.parametrize(
    "token_ids",
    [None, 5, "abc", [1.0], [[1]], [-1], [2**32], [2**80], [None], count(), repeat(1), {"a": 1}, [np.float64(1)]],
    ids=repr,
)
async def test_what_is_no_list_of_tokens_is_not_appended(token_ids: Any) -> None:
    async with open_lab(LedgerEngine()) as runtime:
        session = await runtime.create_session()
        with pytest.raises(InvalidRequest) as refused:
            await session.append(token_ids)

        assert refused.value.param == "token_ids"
        assert (await session.append([1])).history_length == 1


async def test_bytes_are_a_token_each_and_not_four_of_them_one() -> None:
    async with open_lab(LedgerEngine()) as runtime:
        session = await runtime.create_session()

        assert (await session.append(b"\1\2\3\4\5")).history_length == 5


@pytest.mark.parametrize("length", NO_COUNT, ids=lambda value: type(value).__name__)
async def test_a_length_that_is_none_is_refused(length: Any) -> None:
    async with open_lab(LedgerEngine()) as runtime:
        session = await runtime.create_session()
        with pytest.raises(InvalidRequest) as refused:
            await session.append([1], length)

        assert refused.value.param == "expected_history_length"
        assert (await session.append([1], 0)).history_length == 1


UNMADE: list[tuple[str, Any]] = [
    *(("eos_token_ids", ids) for ids in ([-1], [2**32], [1.5], ["2"], [[2]], [None], [True], range(65), 5, None, "ab")),
    *(("overflow", overflow) for overflow in ("evict", None, 1, True)),
    *(("label", label) for label in (None, 5, b"label", ["label"], "a" * 257, "\ud800")),
]


@pytest.mark.parametrize(("name", "value"), UNMADE, ids=repr)
async def test_a_session_that_makes_no_sense_is_not_made(name: str, value: Any) -> None:
    async with open_lab(LedgerEngine(), capacity=1) as runtime:
        kept = await runtime.create_session()
        with pytest.raises(InvalidRequest):
            await runtime.create_session(**{name: value})

        assert (await kept.append([1])).history_length == 1


@pytest.mark.parametrize("number", [0, *NO_COUNT], ids=lambda value: type(value).__name__)
async def test_a_completion_of_no_number_of_answers_is_refused(number: Any) -> None:
    async with open_lab(LedgerEngine()) as runtime:
        await runtime.create_session()
        with pytest.raises(InvalidRequest):
            async with runtime.completion((), Overflow.EVICT, number):
                pass

        assert runtime.load().slab_in_use == 1
        assert runtime.load().completions_running == 0


@pytest.mark.parametrize("session_id", [None, 5, b"id", ["id"], {"id": 1}, "", "\ud800", "../x", "a" * 10**5], ids=repr)
async def test_an_id_that_is_none_is_of_no_session(session_id: Any) -> None:
    async with open_lab(LedgerEngine()) as runtime:
        with pytest.raises(SessionNotFound):
            runtime.find_session(session_id)
        with pytest.raises(SessionNotFound):
            await runtime.fork_session(session_id)


@pytest.mark.parametrize("snapshot_id", [None, 5, ["id"], "\ud800", "../sessions/x", "a" * 300], ids=repr)
async def test_an_id_that_is_none_is_of_no_snapshot(tmp_path: Path, snapshot_id: Any) -> None:
    settings = Settings(
        device="cpu", backend="torch", determinism="fast", window=60, capacity=2, state_dir=str(tmp_path)
    )
    async with open_runtime(settings) as runtime:
        with pytest.raises(SnapshotNotFound):
            await runtime.restore_session(snapshot_id)
        with pytest.raises(SnapshotNotFound):
            await runtime.delete_snapshot(snapshot_id)


def of_fewer_words(directory: Path) -> Text:
    save_byte_fallback_tokenizer(directory)
    return Text.load(directory)


def of_as_many_words_in_another_order(directory: Path) -> Text:
    source = json.loads((find_model(SEEDLING) / "tokenizer.json").read_text())
    words = source["model"]["vocab"]
    first, second = (word for word, token_id in words.items() if token_id in (300, 301))
    words[first], words[second] = words[second], words[first]
    return Text(PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(source))), frozenset({2}))


@pytest.mark.parametrize("another", [of_fewer_words, of_as_many_words_in_another_order])
async def test_a_grammar_of_another_tokenizer_is_refused(tmp_path: Path, another: Callable[[Path], Text]) -> None:
    async with open_small() as runtime:
        session = await runtime.create_session()
        await session.append([5, 6, 7])
        with pytest.raises(InvalidRequest) as refused:
            await generated(session, 5, grammar=another(tmp_path).json_grammar({"type": "object"}))

        assert refused.value.param == "grammar"
        again = Text.load(find_model(SEEDLING)).json_grammar({"const": 1})
        assert runtime.text.decode(await generated(session, 5, grammar=again)) == "1"


async def test_a_model_whose_files_name_no_end_answers_by_a_grammar(tmp_path: Path) -> None:
    model = shutil.copytree(find_model(SEEDLING), tmp_path / "model")
    ending(model, {}, {}, None)
    async with open_small(model) as runtime:
        assert runtime.text.eos_token_ids == frozenset()
        session = await runtime.create_session(runtime.text.eos_token_ids)
        await session.append([5, 6, 7])
        grammar = runtime.text.json_grammar({"const": [1]})
        async with session.generate(20, grammar=grammar, top_logprobs=2) as stream:
            *tokens, done = [event async for event in stream]

    assert runtime.text.decode([token.token_id for token in tokens if isinstance(token, Token)]) == "[1]"
    assert isinstance(done, Done)
    assert done.stop_reason is StopReason.EOS
