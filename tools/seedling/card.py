"""Measures seedling through a runtime and writes its model card: `python -m tools.seedling.card`."""

import argparse
import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from actors import Runtime, SessionHandle, open_runtime
from runtime import Done, Settings, StopReason, Token
from runtime.engine import EngineFacts
from runtime.text import Text
from tools.seedling.corpus import CODE, NAME, Fact, Message, conversations
from tools.seedling.siblings import CARD_NAME, Turn, disk_bytes, parameter_count, section
from tools.seedling.smalltalk import exchange
from tools.seedling.train import STAGES, STEPS, TOKENS
from tools.seedling.training import END, OUTPUT, SEED, TURN, VOCABULARY
from tools.seedling.words import FIRST_NAMES, digits, made_up_name

# Training draws from SEED to SEED + 3.
HELD_OUT_SEED = 7_000_001
LISTENED_SEED = HELD_OUT_SEED + 2
DISTANCES = (32, 128, 256, 512, 900, 1100, 2000)
TRIALS = 48
SESSIONS = 16
LONGEST_ANSWER = 32
LONGEST_REPLY = 96
# Conversations in which the siblings' proposals are measured.
LISTENED = 24

# Keeps the fact out of the sink, which no distance would ever push out of sight.
GREETING = ("Hello!", "Hello! How can I help you today?")
# Says nothing of the value, so that the history holds it once.
ACKNOWLEDGEMENT = "Thank you. I will remember that."


@dataclass(frozen=True)
class Kind:
    """A kind of value to be recalled, and how it is told and asked for."""

    title: str
    fact: Fact
    draw: Callable[[random.Random], str]


KINDS = (
    Kind("first name", NAME, lambda rng: rng.choice(FIRST_NAMES)),
    Kind("made-up name", NAME, made_up_name),
    Kind("four digits", CODE, lambda rng: digits(rng, 4)),
)


@dataclass(frozen=True)
class Trial:
    """A history that ends with a question, and the value that answers it, told `distance` tokens before its end."""

    kind: Kind
    bucket: int
    distance: int
    value: str
    prompt: tuple[int, ...]


@dataclass(frozen=True)
class Result:
    """A trial with seedling's answer."""

    trial: Trial
    answer: str

    @property
    def is_right(self) -> bool:
        """Whether the value stands in the answer, letter for letter and as a word of its own."""
        return self.trial.value in re.findall(r"\w+", self.answer)


@dataclass(frozen=True)
class Dialogue:
    """What a user says, line after line, whatever the answers are."""

    source: str
    lines: tuple[str, ...]
    system: str = ""


@dataclass(frozen=True)
class Reply:
    """What seedling said, and whether it ended that itself rather than being cut off."""

    text: str
    is_ended: bool


# Fixed before any reply to them was seen.
WRITTEN = (
    (
        "Hello! My name is Peter and I have a cat.",
        "How are you today?",
        "Can you tell me a story?",
        "What is my name?",
    ),
    (
        "Good morning, Seedling!",
        "I want to cook something tonight.",
        "What is the capital of Italy?",
        "Thank you, goodbye!",
    ),
    (
        "Hi, please remember the number 3907.",
        "What is two plus three?",
        "Which animals do you like?",
        "What number did I ask you to remember?",
    ),
)


def turns(asked_and_answer: tuple[str, str]) -> list[Message]:
    """An exchange as the two messages of a history."""
    asked, answer = asked_and_answer
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def trial(rng: random.Random, text: Text, kind: Kind, bucket: int) -> Trial:
    """A value told once, small talk until the question comes as near to `bucket` tokens later as its turns allow."""
    value = kind.draw(rng)
    told = rng.choice(kind.fact.tell.split("|")).format(value)
    ask: Message = {"role": "user", "content": rng.choice(kind.fact.ask.split("|"))}
    prompt_length = len(text.encode(f"{TURN}assistant\n"))

    def length(messages: Sequence[Message]) -> int:
        return len(text.render(messages)) - prompt_length

    head = [*turns(GREETING), *turns((told, ACKNOWLEDGEMENT))]
    distance = length([head[-1], ask]) + prompt_length
    filler: list[Message] = []
    while True:
        more = turns(exchange(rng))
        if any(value in message["content"] for message in more):
            continue
        nearer = distance + length(more)
        if abs(nearer - bucket) >= abs(distance - bucket):
            break
        filler += more
        distance = nearer
    return Trial(kind, bucket, distance, value, tuple(text.render([*head, *filler, ask])))


def trials(text: Text, seed: int, count: int, buckets: Iterable[int] = DISTANCES) -> list[Trial]:
    """`count` trials of each kind at each distance."""
    rng = random.Random(seed)
    return [trial(rng, text, kind, bucket) for bucket in buckets for kind in KINDS for _ in range(count)]


def drawn_dialogues(seed: int, count: int) -> list[Dialogue]:
    """The users' lines of the corpus' next `count` conversations that have three or four turns."""
    found: list[Dialogue] = []
    for talk in conversations(random.Random(seed), 4):
        lines = tuple(message["content"] for message in talk if message["role"] == "user")
        if 3 <= len(lines) <= 4:
            system = talk[0]["content"] if talk[0]["role"] == "system" else ""
            found.append(Dialogue("drawn", lines, system))
        if len(found) == count:
            break
    return found


def dialogues() -> list[Dialogue]:
    """The ten of the card."""
    return [*drawn_dialogues(HELD_OUT_SEED, 10 - len(WRITTEN)), *(Dialogue("written", lines) for lines in WRITTEN)]


async def answer(session: SessionHandle, most: int) -> tuple[list[int], bool]:
    """Seedling's greedy answer to the history, of at most `most` tokens, and whether it ended that itself."""
    token_ids: list[int] = []
    is_ended = False
    async with session.generate(most) as events:
        async for event in events:
            if isinstance(event, Token):
                token_ids.append(event.token_id)
            elif isinstance(event, Done):
                is_ended = event.stop_reason is StopReason.EOS
    return token_ids, is_ended


async def listen(runtime: Runtime, dialogue: Dialogue) -> list[tuple[Turn, Reply]]:
    """Seedling's turns in answer to the lines of `dialogue`, in one session, and what they say."""
    text = runtime.text
    session = await runtime.create_session(text.eos_token_ids)
    found: list[tuple[Turn, Reply]] = []
    due: list[Message] = [{"role": "system", "content": dialogue.system}] if dialogue.system else []
    history: list[int] = []
    before: list[int] = []
    for line in dialogue.lines:
        asked = [*before, *text.render([*due, {"role": "user", "content": line}])]
        await session.append(asked)
        said, is_ended = await answer(session, LONGEST_REPLY)
        history += asked
        found.append((Turn(tuple(history), tuple(said)), Reply(text.decode(said), is_ended)))
        history += said
        # What the chat template writes between the last token of a reply and the next message.
        before, due = text.encode("\n" if is_ended else f"{END}\n"), []
    await session.close()
    return found


async def hold(runtime: Runtime, dialogue: Dialogue) -> list[Reply]:
    """Seedling's replies to the lines of `dialogue`, in one session."""
    return [reply for _, reply in await listen(runtime, dialogue)]


async def turns_in(runtime: Runtime, listened: Iterable[Dialogue]) -> list[Turn]:
    """What seedling says to the lines of each dialogue."""
    return [turn for dialogue in listened for turn, _ in await listen(runtime, dialogue)]


async def measure(runtime: Runtime, wanted: Iterable[Trial]) -> list[Result]:
    """The answers to `wanted`, from `SESSIONS` sessions at a time, each with a history of its own."""
    results: list[Result] = []
    left = iter(wanted)

    async def take_on() -> None:
        for one in left:
            session = await runtime.create_session(runtime.text.eos_token_ids)
            await session.append(one.prompt)
            said, _ = await answer(session, LONGEST_ANSWER)
            results.append(Result(one, runtime.text.decode(said)))
            await session.close()

    async with trio.open_nursery() as nursery:
        for _ in range(SESSIONS):
            nursery.start_soon(take_on)
    return results


def share(results: Sequence[Result]) -> str:
    """How many of `results` are right, as a table states it."""
    right = sum(result.is_right for result in results)
    return f"{right}/{len(results)} ({right / len(results):.0%})"


def recall_table(results: Sequence[Result], visible: int) -> str:
    """The share of right answers by distance and kind; a session sees `visible` tokens."""
    rows = [
        f"| tokens back | in sight | {' | '.join(kind.title for kind in KINDS)} | all |",
        f"| ---: | --- | {' | '.join('---:' for _ in KINDS)} | ---: |",
    ]
    for bucket in sorted({result.trial.bucket for result in results}):
        here = [result for result in results if result.trial.bucket == bucket]
        distances = [result.trial.distance for result in here]
        by_kind = [share([result for result in here if result.trial.kind is kind]) for kind in KINDS]
        seen = "yes" if max(distances) < visible else "no"
        rows.append(
            f"| {bucket} ({min(distances)} to {max(distances)}) | {seen} | {' | '.join(by_kind)} | {share(here)} |"
        )
    return "\n".join(rows)


def transcript(number: int, dialogue: Dialogue, replies: Sequence[Reply]) -> str:
    """A dialogue as the card prints it."""
    lines = [f"system: {dialogue.system}"] if dialogue.system else []
    for line, said in zip(dialogue.lines, replies, strict=True):
        lines += [f"user: {line}", f"seedling: {said.text}{'' if said.is_ended else ' (cut off here)'}"]
    return "\n".join([f"{number}. {dialogue.source}", "", "```text", *lines, "```", ""])


CARD = """\
---
license: apache-2.0
language:
- en
library_name: transformers
pipeline_tag: text-generation
tags:
- qwen3
- test-model
- perennial
---

# seedling

A very small chat model for trying and testing [Perennial](../../README.md) without a download: it answers in short English
sentences and remembers what it was told while that is in sight. It is a test model and nothing more.

| | |
| --- | --- |
| architecture | Qwen3 (`Qwen3ForCausalLM`), {layers} layers, hidden size {hidden}, tied embeddings |
| parameters | {parameters:,} |
| on disk | {disk:,} bytes in bfloat16, tokenizer included |
| tokenizer | byte-level BPE, {vocabulary:,} tokens, each digit a token of its own; ChatML template |
| context | {context:,} tokens; under Perennial a sink of {sink} and a window of {window}, sessions of any length |

## How it was made

`python -m tools.seedling.train` makes it from nothing. `tools/seedling/corpus.py` and `smalltalk.py` write the conversations that
it learns from, from word lists and sentence patterns; no other text and no other model took part. The tokenizer is trained on the same
conversations. Training takes {steps:,} steps over {tokens:.1f} million tokens: {stages}.
The seed ({seed}) fixes the data and the first weights; another processor or another PyTorch rounds differently and ends with slightly different weights.

## What it cannot do

- It knows what its corpus says: greetings and small talk, some capitals, opposites, animal sounds, days and months, sums up to 20, short
  lists. To other questions it says that it does not know, or something that is wrong.
- It keeps some twenty kinds of facts (a name, a code, a pet's name, a favourite food) told and asked for in the words of its corpus. In other
  words they are often missed, mixed up or made up.
- It does not reason, write code, follow long instructions or speak another language than English.
- Nothing it says is a source for anything.

## Recall

A value is told once and acknowledged without being repeated, small talk follows, then the value is asked for. Distance is counted in tokens from the
end of the message that tells the value to the first token of the answer. An answer is right where it has the value letter for letter. Greedy,
{sessions} sessions at a time through Perennial's runtime ({device}, {dtype}, strict), {count} trials for each kind at each distance, {total:,}
in all. Values, phrases and small talk are drawn with a seed that training did not use, but from the corpus' own patterns: first names come from
the list that training used too, made-up names and digits are random, and the value is told and asked for in the corpus' words.

{table}

Past the window the value is out of sight: what is right there was guessed, or has come down through later tokens that are still in sight.
Of the {lost} wrong answers there, {made_up} state another value as if it had been told.

{siblings}
## Ten dialogues

None was picked. The lines of the first {drawn} users are the corpus generator's, whole conversations with a seed that training did not use; those of
the last {written} were written before any reply to them was seen. Users say their lines whatever the answers are. Replies are greedy.

{dialogues}
## This card

`python -m tools.seedling.card` measures all of this anew and writes this file.
"""


def card(
    folder: Path,
    facts: EngineFacts,
    results: Sequence[Result],
    turns: Sequence[Turn],
    held: Sequence[tuple[Dialogue, Sequence[Reply]]],
) -> str:
    """The text of the model card of the model in `folder`."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    lost = [result for result in results if result.trial.distance > facts.slab.visible and not result.is_right]
    stages = " then ".join(f"{stage.steps:,} steps of {stage.rows} rows of {stage.length} tokens" for stage in STAGES)
    return CARD.format(
        parameters=parameter_count(folder),
        disk=disk_bytes(folder),
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        context=config["max_position_embeddings"],
        vocabulary=VOCABULARY,
        sink=facts.slab.sink,
        window=facts.slab.window,
        steps=STEPS,
        tokens=TOKENS / 1e6,
        stages=stages,
        seed=SEED,
        sessions=SESSIONS,
        device=facts.device,
        dtype=facts.dtype,
        count=TRIALS,
        total=len(results),
        table=recall_table(results, facts.slab.visible),
        lost=len(lost),
        made_up=sum(result.trial.kind.fact.missing() not in result.answer for result in lost),
        siblings=section(folder, LISTENED, turns),
        drawn=len(held) - len(WRITTEN),
        written=len(WRITTEN),
        dialogues="\n".join(
            transcript(number, dialogue, replies) for number, (dialogue, replies) in enumerate(held, start=1)
        ),
    )


async def write_card(folder: Path) -> None:
    """Measures the model in `folder` and leaves its card there."""
    settings = Settings(model=str(folder), device="cpu", capacity=SESSIONS, max_concurrent=1)
    async with open_runtime(settings) as runtime:
        held = [(dialogue, await hold(runtime, dialogue)) for dialogue in dialogues()]
        turns = await turns_in(runtime, drawn_dialogues(LISTENED_SEED, LISTENED))
        results = await measure(runtime, trials(runtime.text, HELD_OUT_SEED, TRIALS))
        text = card(folder, runtime.facts, results, turns, held)
    print(recall_table(results, runtime.facts.slab.visible))
    (folder / CARD_NAME).write_text(text, encoding="utf-8")


def main() -> None:
    """Reads the command line, measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    trio.run(write_card, arguments.model)


if __name__ == "__main__":
    main()
