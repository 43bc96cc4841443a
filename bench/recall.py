"""What is recalled of a long conversation: a name told so many tokens ago, inside the window and past it, with sinks and without.

Before the name the window was filled once already, so that a session without sinks has lost its first tokens.
"""

from __future__ import annotations

import random
from dataclasses import replace

from actors import Runtime, open_runtime
from bench.figures import figure
from bench.scenario import Result, Setup
from runtime.events import Token
from runtime.text import Text

WINDOW = 252
# A window that holds all of it shows what the model itself recalls.
SLABS = {"sink 4": (4, WINDOW), "no sink": (0, WINDOW), "all in the window": (4, 1020)}
DISTANCES = (60, 180, 320)
TRIALS = 12
LONGEST_ANSWER = 16

_NAMES = "Anna Peter Clara Henry Maria Oscar Julia Victor Laura Simon Alice Martin Emma Robert Sophie David".split()
_TALK = (
    ("What do bees make?", "Bees make honey from the nectar of flowers."),
    ("Why is the sky blue?", "Blue light is scattered by the air more than red light is."),
    ("What is a river?", "A river is water that flows from high land to the sea."),
    ("How do birds fly?", "Birds fly with wings that push the air down."),
    ("What is bread made of?", "Bread is made of flour, water, salt and yeast."),
    ("Why do leaves fall?", "Trees drop their leaves to save water in winter."),
)

Message = dict[str, str]


async def run(setup: Setup) -> Result:
    """The share of trials in which the name came back."""
    result = Result(WINDOW)
    for slab, (sink, window) in SLABS.items():
        settings = replace(setup.settings, sink=sink, window=window, capacity=1, max_concurrent=1)
        async with open_runtime(settings) as runtime:
            for distance in DISTANCES:
                told = [await recalls(runtime, distance, trial) for trial in range(TRIALS)]
                name = f"recalled, {slab}, {distance} tokens after it was told"
                result.figures[name] = figure("of 1", [sum(told) / len(told)])
    return result


async def recalls(runtime: Runtime, distance: int, trial: int) -> bool:
    """Whether the name that was told at least `distance` tokens before is in the answer."""
    name = _NAMES[trial % len(_NAMES)]
    session = await runtime.create_session(runtime.text.eos_token_ids)
    await session.append(history(runtime.text, name, distance, random.Random(trial)))
    async with session.generate(LONGEST_ANSWER) as events:
        answer = [event.token_id async for event in events if isinstance(event, Token)]
    await session.close()
    return name.lower() in runtime.text.decode(answer).lower()


def history(text: Text, name: str, distance: int, choice: random.Random) -> list[int]:
    """A conversation that fills the window, tells the name, goes on for `distance` tokens or some more, and asks for it."""
    before = _small_talk(text, WINDOW, choice)
    told = _turn(f"My best friend is called {name}.", f"{name} sounds like a good friend.")
    after = _small_talk(text, distance, choice)
    question = [{"role": "user", "content": "What is my best friend called?"}]
    return text.render([*before, *told, *after, *question])


def _small_talk(text: Text, length: int, choice: random.Random) -> list[Message]:
    """Turns of at least so many tokens."""
    one = _turn(*_TALK[0])
    # What a template puts before the first turn is no part of it.
    first = 2 * len(text.render(one)) - len(text.render([*one, *one]))
    messages = one
    while len(text.render(messages)) - first < length:
        messages = [*messages, *_turn(*choice.choice(_TALK))]
    return messages


def _turn(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
