"""What proposers bring: tokens a second of one stream over the same stream without, where answers quote and where they do not.

At the shape of a large model the answers are scripted, for random weights say nothing that could be foreseen: each forward runs
as it is, and the script says which token it drew. The bundled model says what it says.
"""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from actors import Runtime, SessionHandle
from actors.executor import EngineThread
from actors.proposing import open_proposing
from actors.tree import open_sessions
from bench.figures import Figure, figure, repeats
from bench.scenario import Result, Setup
from runtime.engine import Engine, EngineFacts, load_engine
from runtime.events import Token
from runtime.metrics import Metrics
from runtime.models import SEEDLING, find_model
from runtime.rows import RowBatch
from runtime.settings import Settings
from runtime.slab import SlabPool
from runtime.text import Text

BUDGET_S = 40
NONE = "none"
PROMPT_TOKENS, ANSWER_TOKENS = 256, 48
PASSAGE_TOKENS, NEW_TOKENS = 32, 2
CHUNK_TOKENS = 8
# A question that comes again gets the answer that it got.
QUESTIONS = ("Tell me a story.", "What is the capital of France?", "Count from one to ten.")
ASKED_AGAIN = 3
UNFORESEEN: Mapping[str, Any] = {"temperature": 2.0, "seed": 1}


@dataclass
class ScriptedEngine:
    """Runs an engine's forwards, and has a script's token drawn at each position."""

    engine: Engine
    script: Sequence[int] = field(default_factory=list)

    @property
    def facts(self) -> EngineFacts:
        return self.engine.facts

    def new_pool(self, count: int) -> SlabPool:
        return self.engine.new_pool(count)

    def forward(self, batch: RowBatch) -> tuple[Token, ...]:
        self.engine.forward(batch)
        return tuple(Token(self.script[row.position + 1]) for row in batch.rows if row.draw is not None)


@dataclass(slots=True)
class Pace:
    """Tokens of one stream, and the seconds that they took."""

    tokens: int = 0
    seconds: float = 0.0

    async def generate(self, session: SessionHandle, count: int, **sampling: Any) -> list[int]:
        said = []
        began = time.perf_counter()
        async with session.generate(count, **sampling) as events:
            async for event in events:
                if isinstance(event, Token):
                    said.append(event.token_id)
        self.seconds += time.perf_counter() - began
        self.tokens += len(said)
        return said

    @property
    def tokens_a_second(self) -> float:
        return self.tokens / self.seconds


def quoting_script(vocabulary: int) -> list[int]:
    """A prompt, and an answer of passages of it with a little that is new between them."""
    chance = random.Random(0)
    prompt = [chance.randrange(3, vocabulary) for _ in range(PROMPT_TOKENS)]
    answer: list[int] = []
    while len(answer) < ANSWER_TOKENS:
        begin = chance.randrange(PROMPT_TOKENS - PASSAGE_TOKENS)
        answer += prompt[begin : begin + PASSAGE_TOKENS]
        answer += [chance.randrange(3, vocabulary) for _ in range(NEW_TOKENS)]
    return prompt + answer


def unforeseen_script(vocabulary: int) -> list[int]:
    chance = random.Random(1)
    return [chance.randrange(3, vocabulary) for _ in range(PROMPT_TOKENS + ANSWER_TOKENS + 1)]


@asynccontextmanager
async def open_each(
    settings: Settings, proposers: Sequence[str]
) -> AsyncIterator[tuple[ScriptedEngine, Mapping[str, Runtime]]]:
    """A runtime for each proposer over one engine; each runs alone when it is asked."""
    directory = find_model(settings.model)
    text = Text.load(directory)
    with ThreadPoolExecutor(max_workers=1) as pool:
        thread = EngineThread(pool)
        engine = await thread.run(load_engine, settings, directory)
        scripted = ScriptedEngine(engine)
        chosen = engine if settings.model == SEEDLING else scripted
        async with AsyncExitStack() as stack:
            runtimes = {}
            for name in proposers:
                its = replace(settings, proposer=name)
                new_proposals = await stack.enter_async_context(open_proposing(its, engine.facts, thread))
                opening = open_sessions(its, chosen, thread, text, Metrics(), new_proposals)
                runtimes[name] = await stack.enter_async_context(opening)
            yield scripted, runtimes


@asynccontextmanager
async def open_session(runtime: Runtime, history: Sequence[int]) -> AsyncIterator[SessionHandle]:
    """A session that has read a history."""
    session = await runtime.create_session(runtime.text.eos_token_ids)
    await session.append(history)
    yield session
    await session.close()


async def scripted_speed(runtime: Runtime, script: Sequence[int]) -> float:
    pace = Pace()
    async with open_session(runtime, script[:PROMPT_TOKENS]) as session:
        await pace.generate(session, ANSWER_TOKENS)
    return pace.tokens_a_second


async def quoting_speed(runtime: Runtime) -> float:
    """Of the answers to questions that were answered before, in one conversation."""
    messages: list[dict[str, str]] = []
    pace = Pace()
    for turn in range(ASKED_AGAIN * len(QUESTIONS)):
        messages.append({"role": "user", "content": QUESTIONS[turn % len(QUESTIONS)]})
        async with open_session(runtime, runtime.text.encode(runtime.text.apply_template(messages))) as session:
            said = await (Pace() if turn < len(QUESTIONS) else pace).generate(session, ANSWER_TOKENS)
        messages.append({"role": "assistant", "content": runtime.text.decode(said)})
    return pace.tokens_a_second


async def unforeseen_speeds(
    runtimes: Mapping[str, Runtime], history: Sequence[int], count: int, **sampling: Any
) -> dict[str, float]:
    """Of each runtime's stream after a history, a few tokens of each by turns: a machine changes its pace within seconds."""
    paces = {name: Pace() for name in runtimes}
    async with AsyncExitStack() as stack:
        sessions = {
            name: await stack.enter_async_context(open_session(runtime, history)) for name, runtime in runtimes.items()
        }
        names = list(runtimes)
        for _ in range(count // CHUNK_TOKENS):
            names.reverse()
            for name in names:
                await paces[name].generate(sessions[name], CHUNK_TOKENS, **sampling)
    return {name: pace.tokens_a_second for name, pace in paces.items()}


async def run(setup: Setup) -> Result:
    """Tokens a second with each proposer by turns, and their ratios to none."""
    is_scripted = setup.model != SEEDLING
    proposers = (NONE, "ngram") if is_scripted else (NONE, "ngram", "draft", "diffusion")
    settings = replace(setup.settings, capacity=1, max_concurrent=1)
    taken: dict[tuple[str, str], list[float]] = {}
    async with open_each(settings, proposers) as (engine, runtimes):
        vocabulary = engine.facts.vocabulary
        for number in repeats(BUDGET_S, least=6):
            these: dict[tuple[str, str], float] = {}
            engine.script = quoting_script(vocabulary)
            for name, runtime in runtimes.items():
                once = scripted_speed(runtime, engine.script) if is_scripted else quoting_speed(runtime)
                these["quoting", name] = await once
            engine.script = unforeseen_script(vocabulary)
            if is_scripted:
                speeds = await unforeseen_speeds(runtimes, engine.script[:PROMPT_TOKENS], ANSWER_TOKENS)
            else:
                text = runtimes[NONE].text
                question = text.encode(text.apply_template([{"role": "user", "content": QUESTIONS[0]}]))
                speeds = await unforeseen_speeds(runtimes, question, 4 * ANSWER_TOKENS, **UNFORESEEN)
            these |= {("unforeseen", name): speed for name, speed in speeds.items()}
            # The first round warms up.
            if number:
                for key, speed in these.items():
                    taken.setdefault(key, []).append(speed)
    figures: dict[str, Figure] = {
        f"{work}: {name}": figure("tokens/s", speeds) for (work, name), speeds in taken.items()
    }
    ratios = {
        f"{work}: {name} over none": figure(
            "x", [one / other for one, other in zip(speeds, taken[work, NONE], strict=True)]
        )
        for (work, name), speeds in taken.items()
        if name != NONE
    }
    return Result(engine.facts.slab.window, figures | ratios)
