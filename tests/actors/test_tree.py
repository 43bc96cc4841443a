"""The runtime as a program embeds it: start, stop, completions, failure of the engine, and bits on the real model."""

from __future__ import annotations

import gc
import math
from array import array
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from itertools import pairwise
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from actors import Runtime, SessionHandle, open_runtime
from actors.engine_thread import EngineThread
from actors.handles import CompletionSessions
from actors.proposers import NgramProposer
from actors.proposing import NewProposals, Proposals
from actors.tree import open_sessions
from runtime import Done, Event, Overflow, Sampling, Settings, StopReason, Token
from runtime.engine import Engine
from runtime.engine.torch_engine import TorchEngine
from runtime.errors import (
    EngineFailed,
    InvariantViolation,
    ModelUnavailable,
    PerennialError,
    Saturated,
    SessionFailed,
    SessionNotFound,
)
from runtime.metrics import Metrics
from runtime.proposers.ngram import PromptLookup
from runtime.rows import Row, RowBatch
from runtime.sampling import Draw
from runtime.slab import Slab
from tests.actors.conftest import SEEDLING
from tests.actors.engines import (
    BREAKS,
    BREAKS_BADLY,
    DRAWS_NOTHING,
    SKIPS_A_LAYER,
    BrokenBadly,
    LedgerEngine,
    generated,
    open_lab,
    sample,
    tiny_text,
)
from tests.actors.proposers import eager, erring


@pytest.fixture
def engine() -> LedgerEngine:
    return LedgerEngine(sink=2, window=14, row_tile=8)


class Stop(Exception):
    """A user's own error."""


async def test_the_example_of_the_contract_runs_as_it_is_written() -> None:
    seen = []
    async with open_runtime(Settings(model="seedling")) as rt:
        session = await rt.create_session(eos_token_ids=(2,))
        await session.append([5, 6, 7])
        async with session.generate(max_tokens=16) as events:  # leaving the block cancels the work
            async for event in events:  # HistoryTruncated? Token* Done
                seen.append(event)
        info = await session.info()
        await session.close()
    tokens, done = seen[:-1], seen[-1]
    assert all(isinstance(event, Token) for event in tokens)
    assert isinstance(done, Done)
    assert done.generated_token_count == len(tokens)
    assert (done.stop_reason, len(tokens) <= 16) in [(StopReason.MAX_TOKENS, True), (StopReason.EOS, True)]
    assert info.history_length == 3 + len(tokens)


async def test_a_model_that_is_not_there_stops_the_start_with_one_error() -> None:
    with pytest.raises(ModelUnavailable):
        async with open_runtime(Settings(model="./no such directory")):
            pass


def models_and_slabs() -> set[int]:
    gc.collect()
    return {id(one) for one in gc.get_objects() if issubclass(type(one), TorchEngine | Slab)}


@pytest.mark.parametrize(
    "proposer", [{}, {"proposer": "draft", "proposer_model": "seedling"}], ids=["alone", "beside a draft"]
)
async def test_a_runtime_frees_its_memory_at_its_end_whatever_still_refers_to_it(proposer: dict[str, Any]) -> None:
    metrics, before = Metrics(), models_and_slabs()
    async with open_runtime(Settings(model="seedling", backend="torch", **proposer), metrics) as runtime:
        session = await runtime.create_session()
        await session.append([5, 6, 7])
        assert models_and_slabs() > before

    assert models_and_slabs() <= before
    del runtime, session, metrics


async def stop(runtime: Runtime) -> None:
    await runtime.create_session()
    raise Stop


async def test_what_the_block_raises_comes_out_as_it_is(engine: LedgerEngine) -> None:
    with pytest.raises(Stop):
        async with open_lab(engine) as runtime:
            await stop(runtime)


async def test_a_runtime_can_end_while_sessions_are_at_work(engine: LedgerEngine, nursery: trio.Nursery) -> None:
    refused: list[type[PerennialError]] = []
    served, serving = trio.open_memory_channel[Event](math.inf)

    async def generate(session: SessionHandle) -> None:
        with pytest.raises((SessionFailed, SessionNotFound)) as caught:
            await serve(session)
        refused.append(caught.type)

    async def serve(session: SessionHandle) -> None:
        async with session.generate(10**6) as events:
            async for event in events:
                served.send_nowait(event)

    async with open_lab(engine) as runtime:
        session = await runtime.create_session()
        await session.append([1])
        for _ in range(2):
            nursery.start_soon(generate, session)
            for _ in range(10):
                await serving.receive()
    await wait_all_tasks_blocked()
    # One was being served, the other waited for its turn.
    assert sorted(refused, key=str) == [SessionFailed, SessionNotFound]


async def test_a_cancelled_runtime_waits_for_its_forward_before_slabs_come_back(
    engine: LedgerEngine, nursery: trio.Nursery
) -> None:
    metrics, ending, ended = Metrics(), trio.CancelScope(), trio.Event()
    engine.hold()

    async def run() -> None:
        with EngineThread() as thread, ending:
            async with open_sessions(Settings(), engine, thread, tiny_text(), metrics) as runtime:
                session = await runtime.create_session()
                await session.append([1, 2, 3])
        ended.set()

    nursery.start_soon(run)
    await engine.begun()
    ending.cancel()
    await wait_all_tasks_blocked()
    assert (ended.is_set(), sample(metrics, "slab_in_use")) == (False, 1)
    engine.open()
    await ended.wait()
    assert sample(metrics, "slab_in_use") == 0


class TestAFailureOfTheEngine:
    @pytest.mark.parametrize("fault", [BREAKS, DRAWS_NOTHING], ids=["raises", "draws too little"])
    async def test_ends_the_tree_with_its_name(self, engine: LedgerEngine, fault: int) -> None:
        with pytest.raises(EngineFailed):
            async with open_lab(engine) as runtime:
                await append_and_generate(runtime, fault)

    async def test_beside_every_exception_ends_the_tree_too(self, engine: LedgerEngine) -> None:
        with pytest.raises(BrokenBadly):
            async with open_lab(engine) as runtime:
                await append_and_generate(runtime, BREAKS_BADLY)

    async def test_keeps_its_cause(self, engine: LedgerEngine) -> None:
        with pytest.raises(EngineFailed, match="a wire is loose") as failure:
            async with open_lab(engine) as runtime:
                await append_and_generate(runtime, BREAKS)
        assert str(failure.value.__cause__) == "a wire is loose"

    async def test_is_told_at_once_to_everyone_who_waits(self, engine: LedgerEngine) -> None:
        told: dict[str, type[Exception]] = {}

        async def append(name: str, session: SessionHandle, token_id: int) -> None:
            with pytest.raises(PerennialError) as caught:
                await session.append([token_id])
            told[name] = caught.type

        async def generate(name: str, session: SessionHandle) -> None:
            with pytest.raises(PerennialError) as caught:
                await generated(session, 5)
            told[name] = caught.type

        async def fail(askers: trio.Nursery) -> None:
            async with open_lab(engine, capacity=12) as runtime:
                sessions = [await runtime.create_session() for _ in range(12)]
                await sessions[1].append([1])
                engine.hold()
                askers.start_soon(sessions[2].append, [1])
                await engine.begun()
                # Of these the first run in one forward; the others find no room, or come while it runs.
                askers.start_soon(append, "fails", sessions[0], BREAKS)
                await wait_all_tasks_blocked()
                askers.start_soon(generate, "generates", sessions[1])
                askers.start_soon(append, "behind", sessions[0], 1)
                for index in range(3, 12):
                    askers.start_soon(append, f"beside {index}", sessions[index], 1)
                await wait_all_tasks_blocked()
                engine.end()
                await engine.begun()
                askers.start_soon(append, "late", sessions[2], 1)
                await wait_all_tasks_blocked()
                engine.end()
                await trio.sleep_forever()

        async with trio.open_nursery() as askers:
            with pytest.raises(EngineFailed):
                await fail(askers)
        assert told.pop("behind") is SessionNotFound
        assert set(told.values()) == {EngineFailed}
        assert len(told) == 12

    async def test_counts_its_sessions_as_failed_and_frees_their_slabs(self, engine: LedgerEngine) -> None:
        metrics: list[Metrics] = []

        async def fail() -> None:
            async with open_lab(engine) as runtime:
                metrics.append(runtime.metrics)
                await append_and_generate(runtime, BREAKS)

        with pytest.raises(EngineFailed):
            await fail()
        assert sample(metrics[0], "session_total", outcome="failed") == 1
        assert sample(metrics[0], "slab_in_use") == 0

    async def test_reaches_a_session_whose_asker_has_left(self, engine: LedgerEngine, nursery: trio.Nursery) -> None:
        leaving = trio.CancelScope()

        async def append_and_leave(session: SessionHandle) -> None:
            with leaving:
                await session.append([BREAKS])

        async def fail() -> None:
            async with open_lab(engine) as runtime:
                session = await runtime.create_session()
                engine.hold()
                nursery.start_soon(append_and_leave, session)
                await engine.begun()
                leaving.cancel()
                await wait_all_tasks_blocked()
                engine.open()
                await session.info()

        with pytest.raises(EngineFailed):
            await fail()

    async def test_ends_a_completion(self, engine: LedgerEngine) -> None:
        async def fail() -> None:
            async with open_lab(engine) as runtime:
                await complete(runtime, [BREAKS])

        with pytest.raises(EngineFailed):
            await fail()


async def append_and_generate(runtime: Runtime, token_id: int) -> None:
    session = await runtime.create_session()
    await session.append([token_id])
    await generated(session, 1)


async def complete(runtime: Runtime, prompt: list[int], max_tokens: int = 3, **sampling: Any) -> list[int]:
    async with runtime.completion((), Overflow.ERROR) as completion:
        session, _ = await having_read(completion, prompt)
        return await generated(session, max_tokens, **sampling)


async def having_read(completion: CompletionSessions, prompt: list[int]) -> tuple[SessionHandle, int]:
    """A completion's first session, which has read the prompt, and how much of that needed no reading."""
    session, length = completion.open(array("I", prompt))
    await session.append(prompt[length:])
    return session, length


@contextmanager
def nothing_leaks(runtime: Runtime) -> Iterator[None]:
    yield
    assert sample(runtime.metrics, "slab_in_use") == 0
    assert sample(runtime.metrics, "session_active") == 0
    assert sample(runtime.metrics, "admission_pending") == 0


class TestACompletion:
    """Here is one permit under `reject`: a completion that leaked it, or its slab, would refuse the next."""

    async def test_frees_permit_and_slab_when_it_ends(self, engine: LedgerEngine) -> None:
        async with open_lab(engine, max_concurrent=1) as runtime:
            for _ in range(30):
                with nothing_leaks(runtime):
                    assert await complete(runtime, [1, 2, 3]) == engine.continued([1, 2, 3], 3)

    async def test_frees_permit_and_slab_when_its_block_fails(self, engine: LedgerEngine) -> None:
        async def stop_in_a_generation(runtime: Runtime) -> None:
            async with runtime.completion((), Overflow.ERROR) as completion:
                session, _ = await having_read(completion, [1, 2, 3])
                async with session.generate(100) as events:
                    await anext(events)
                    raise Stop

        async with open_lab(engine, max_concurrent=1) as runtime:
            for _ in range(5):
                with nothing_leaks(runtime), pytest.raises(Stop):
                    await stop_in_a_generation(runtime)

    async def test_frees_permit_and_slab_when_its_session_fails(self, engine: LedgerEngine) -> None:
        async with open_lab(engine, max_concurrent=1) as runtime:
            for _ in range(5):
                with nothing_leaks(runtime), pytest.raises(InvariantViolation):
                    await complete(runtime, [SKIPS_A_LAYER])

    async def test_frees_permit_and_slab_when_it_closes_its_session_itself(self, engine: LedgerEngine) -> None:
        async with open_lab(engine, max_concurrent=1) as runtime:
            for _ in range(5):
                with nothing_leaks(runtime):
                    async with runtime.completion((), Overflow.ERROR) as completion:
                        session, _ = completion.open(array("I", [1]))
                        await session.close()

    async def test_frees_permit_and_slab_wherever_it_is_cancelled(self, engine: LedgerEngine) -> None:
        async def cancel_after(passes: int, scope: trio.CancelScope) -> None:
            for _ in range(passes):
                await trio.lowlevel.checkpoint()
            scope.cancel()

        completed = 0
        async with open_lab(engine, max_concurrent=1) as runtime, trio.open_nursery() as nursery:
            for passes in range(80):
                with nothing_leaks(runtime), trio.CancelScope() as leaving:
                    nursery.start_soon(cancel_after, passes, leaving)
                    await complete(runtime, list(range(12)))
                    completed += 1
            await complete(runtime, [1])
        assert completed < 80

    async def test_cancelled_in_a_forward_frees_permit_and_slab_when_it_ends(
        self, engine: LedgerEngine, nursery: trio.Nursery
    ) -> None:
        leaving, left = trio.CancelScope(), trio.Event()

        async def complete_and_leave(runtime: Runtime) -> None:
            with leaving:
                await complete(runtime, list(range(12)))
            left.set()

        async with open_lab(engine, max_concurrent=1) as runtime:
            engine.hold()
            nursery.start_soon(complete_and_leave, runtime)
            await engine.begun()
            leaving.cancel()
            await wait_all_tasks_blocked()
            with pytest.raises(Saturated):
                await complete(runtime, [1])
            engine.open()
            await left.wait()
            assert await complete(runtime, [1]) == engine.continued([1], 3)
        # The one under way when its client left; then the other's prompt and its three tokens.
        assert len(engine.batches) == 1 + 4

    async def test_that_waits_for_a_permit_gets_one_with_a_slab(self, engine: LedgerEngine) -> None:
        answers: list[list[int]] = []

        async def record(runtime: Runtime) -> None:
            answers.append(await complete(runtime, [1, 2, 3]))

        async with open_lab(engine, max_concurrent=2, admission_policy="queue") as runtime:
            with nothing_leaks(runtime):
                async with trio.open_nursery() as askers:
                    for _ in range(20):
                        askers.start_soon(record, runtime)
        assert answers == [engine.continued([1, 2, 3], 3)] * 20

    async def test_of_several_answers_reads_its_prompt_once(self, engine: LedgerEngine) -> None:
        async with open_lab(engine, max_concurrent=3) as runtime:
            with nothing_leaks(runtime):
                async with runtime.completion((), Overflow.ERROR, 3) as completion:
                    session, _ = await having_read(completion, [1, 2, 3])
                    rows_of_the_prompt = sum(len(batch.rows) for batch in engine.batches)
                    sessions = await completion.fork(session)

                    answers = [
                        await generated(session, 3, temperature=1.0, seed=seed) for seed, session in enumerate(sessions)
                    ]

        assert rows_of_the_prompt == 3
        assert answers == [engine.continued([1, 2, 3], 3, Sampling(temperature=1.0, seed=seed)) for seed in range(3)]

    async def test_of_several_answers_frees_all_where_one_session_fails(self, engine: LedgerEngine) -> None:
        async def fail(runtime: Runtime) -> None:
            async with runtime.completion((), Overflow.ERROR, 2) as completion:
                session, _ = await having_read(completion, [1])
                _, second = await completion.fork(session)
                await second.append([SKIPS_A_LAYER])

        async with open_lab(engine, max_concurrent=2) as runtime:
            for _ in range(3):
                with nothing_leaks(runtime), pytest.raises(InvariantViolation):
                    await fail(runtime)

    async def test_beyond_the_permits_is_refused(self, engine: LedgerEngine) -> None:
        async with open_lab(engine, max_concurrent=1) as runtime, runtime.completion((), Overflow.ERROR):
            with pytest.raises(Saturated):
                await complete(runtime, [1])


PROMPT = [5, 6, 7, *range(100, 130)]
SAMPLINGS = {"greedy": Sampling(), "sampled": Sampling(temperature=1.0, seed=11)}


def one_row_at_a_time(engine: Engine, sampling: Sampling) -> list[int]:
    """The 40 tokens that follow PROMPT, past the window, without any actor."""
    slab = engine.new_pool(1).acquire()
    history = list(PROMPT)
    for position in range(len(PROMPT) + 39):
        draw = Draw(sampling) if position == len(history) - 1 else None
        history += [
            token.token_id for token in engine.forward(RowBatch((Row(slab, position, history[position], draw),)))
        ]
    return history[len(PROMPT) :]


@pytest.fixture(scope="module")
def expected(seedling: Engine) -> dict[str, list[int]]:
    return {name: one_row_at_a_time(seedling, sampling) for name, sampling in SAMPLINGS.items()}


@asynccontextmanager
async def open_seedling(engine: Engine, new_proposals: NewProposals = lambda: None) -> AsyncIterator[Runtime]:
    with EngineThread() as thread:
        async with open_sessions(SEEDLING, engine, thread, tiny_text(), Metrics(), new_proposals) as runtime:
            yield runtime


async def be_busy(session: SessionHandle, number: int) -> None:
    """Appends and generates without end, each number in its own way."""
    await session.append(range(10 * number, 10 * number + 5 + number))
    while True:
        await generated(session, 3 + number, temperature=0.5 * (number % 3), seed=number)
        await session.append(range(number, 40 + number))


async def continue_prompt(
    engine: Engine,
    sampling: Sampling,
    cuts: Sequence[int],
    neighbours: int,
    new_proposals: NewProposals = lambda: None,
) -> list[int]:
    """The 40 tokens after PROMPT, appended in pieces, among neighbours at work."""
    async with open_seedling(engine, new_proposals) as runtime, trio.open_nursery() as nursery:
        for number in range(neighbours):
            nursery.start_soon(be_busy, await runtime.create_session(), number)
        session = await runtime.create_session()
        for start, end in pairwise([0, *cuts, len(PROMPT)]):
            await session.append(PROMPT[start:end])
        tokens = await generated(session, 40, temperature=sampling.temperature, seed=sampling.seed)
        nursery.cancel_scope.cancel()
    return tokens


@pytest.mark.parametrize("drawn", SAMPLINGS)
class TestBits:
    @pytest.mark.parametrize("neighbours", [0, 7])
    async def test_do_not_depend_on_the_neighbours(
        self, seedling: Engine, expected: dict[str, list[int]], drawn: str, neighbours: int
    ) -> None:
        assert await continue_prompt(seedling, SAMPLINGS[drawn], [], neighbours) == expected[drawn]

    @pytest.mark.parametrize("cuts", [[1], [7, 8, 20], [0, 32]], ids=str)
    async def test_do_not_depend_on_how_the_history_was_cut(
        self, seedling: Engine, expected: dict[str, list[int]], drawn: str, cuts: list[int]
    ) -> None:
        assert await continue_prompt(seedling, SAMPLINGS[drawn], cuts, 1) == expected[drawn]

    @pytest.mark.parametrize("neighbours", [0, 7])
    @pytest.mark.parametrize("wrong", [0.0, 0.3, 1.0])
    async def test_do_not_depend_on_a_proposer(
        self, seedling: Engine, expected: dict[str, list[int]], drawn: str, wrong: float, neighbours: int
    ) -> None:
        whole = [*PROMPT, *expected[drawn]]

        def new() -> Proposals:
            knowing = erring(lambda history, count: whole[len(history) :][:count], wrong)
            return eager(knowing, 8, seedling.facts.vocabulary)

        assert await continue_prompt(seedling, SAMPLINGS[drawn], [7], neighbours, new) == expected[drawn]

    async def test_do_not_depend_on_prompt_lookup(
        self, seedling: Engine, expected: dict[str, list[int]], drawn: str
    ) -> None:
        def new() -> Proposals:
            return eager(NgramProposer(PromptLookup(2, 1)), 8, seedling.facts.vocabulary)

        assert await continue_prompt(seedling, SAMPLINGS[drawn], [7], 3, new) == expected[drawn]

    async def test_do_not_depend_on_a_generation_that_was_left(
        self, seedling: Engine, expected: dict[str, list[int]], drawn: str
    ) -> None:
        how: dict[str, Any] = {"temperature": SAMPLINGS[drawn].temperature, "seed": SAMPLINGS[drawn].seed}
        async with open_seedling(seedling) as runtime:
            session = await runtime.create_session()
            await session.append(PROMPT)
            async with session.generate(40, **how) as events:
                received = [await anext(events) for _ in range(13)]
            rest = await generated(session, 27, **how)
        assert [*received, *map(Token, rest)] == list(map(Token, expected[drawn]))
