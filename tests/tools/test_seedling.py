"""seedling as it lies in the repository, and the generators that it was made from."""

import itertools
import json
import random
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trio

from actors import Runtime, open_runtime
from runtime import Settings
from runtime.text import Text
from tools.seedling.card import (
    HELD_OUT_SEED,
    SESSIONS,
    Dialogue,
    Reply,
    dialogues,
    drawn_dialogues,
    hold,
    measure,
    trials,
)
from tools.seedling.corpus import Message, conversation, conversations, long_recall
from tools.seedling.train import train_tokenizer
from tools.seedling.training import OUTPUT, SINK

SETTINGS = Settings(model="seedling", device="cpu", capacity=SESSIONS, max_concurrent=1)
VISIBLE = SINK + 1020


@pytest.fixture
async def runtime() -> AsyncIterator[Runtime]:
    async with open_runtime(SETTINGS) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def text() -> Text:
    return Text.load(OUTPUT)


def first_conversations(seed: int, count: int) -> list[list[Message]]:
    return list(itertools.islice(conversations(random.Random(seed), 7), count))


def test_conversations_are_decided_by_their_seed() -> None:
    assert first_conversations(1, 50) == first_conversations(1, 50)
    assert first_conversations(1, 50) != first_conversations(2, 50)


@pytest.mark.parametrize("make", [conversation, long_recall])
def test_users_and_seedling_take_turns_in_every_conversation(
    make: Callable[[random.Random, int], list[Message]],
) -> None:
    for seed in range(50):
        talk = make(random.Random(seed), 5)
        roles = [message["role"] for message in talk if message["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(message["content"] for message in talk)


def test_the_cards_dialogues_and_trials_are_decided_by_their_seed(text: Text) -> None:
    assert dialogues() == dialogues()
    assert trials(text, 1, 2) == trials(text, 1, 2)
    assert trials(text, 1, 2) != trials(text, 2, 2)


def test_the_card_has_ten_dialogues_of_three_or_four_turns() -> None:
    assert [len(dialogue.lines) in (3, 4) for dialogue in dialogues()] == [True] * 10


def test_a_trial_tells_its_value_once_and_near_the_distance_asked_for(text: Text) -> None:
    for trial in trials(text, 1, 2, (32, 256, 900, 1100)):
        history = text.decode(trial.prompt)
        told = len(text.encode(history.partition(trial.value)[0]))
        assert history.count(trial.value) == 1
        assert told > SINK
        assert abs(trial.distance - trial.bucket) < 64
        assert (trial.distance < VISIBLE) == (trial.bucket < VISIBLE)


def test_the_files_of_seedling_are_at_most_eight_megabytes() -> None:
    assert sum(path.stat().st_size for path in OUTPUT.iterdir() if path.is_file()) <= 8_000_000


def test_the_tokenizer_in_the_repository_is_the_one_that_the_script_makes(tmp_path: Path) -> None:
    train_tokenizer().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text()) == json.loads((OUTPUT / "tokenizer.json").read_text())
    assert (tmp_path / "chat_template.jinja").read_text() == (OUTPUT / "chat_template.jinja").read_text()


async def test_seedling_recalls_nearly_every_value_inside_the_window(runtime: Runtime) -> None:
    results = await measure(runtime, trials(runtime.text, HELD_OUT_SEED + 1, 2, (32, 256, 900)))
    assert sum(result.is_right for result in results) >= 0.9 * len(results)


async def test_what_is_past_the_window_is_not_recalled(runtime: Runtime) -> None:
    results = await measure(runtime, trials(runtime.text, HELD_OUT_SEED + 1, 1, (1100,)))
    assert not any(result.is_right for result in results)


async def test_a_name_is_remembered_over_the_turns_of_one_session(runtime: Runtime) -> None:
    lines = ("Hello, my name is Fiona.", "How are you?", "What is the capital of France?", "What is my name?")
    replies = await hold(runtime, Dialogue("written", lines))
    assert "Paris" in replies[2].text
    assert replies[3].text == "Your name is Fiona."


async def test_replies_end_by_themselves_in_plain_sentences(runtime: Runtime) -> None:
    plain = re.compile(r"[A-Z0-9][A-Za-z0-9 .,;:?!'-]*")
    replies: list[Reply] = []

    async def hold_one(dialogue: Dialogue) -> None:
        replies.extend(await hold(runtime, dialogue))

    async with trio.open_nursery() as nursery:
        for dialogue in drawn_dialogues(1, 6):
            nursery.start_soon(hold_one, dialogue)
    assert all(reply.is_ended for reply in replies)
    assert [reply.text for reply in replies if not plain.fullmatch(reply.text)] == []
