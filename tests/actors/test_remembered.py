"""Slabs that come back with what they have read, and sessions that go back: their tokens are those of fresh ones."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from actors import Runtime, SessionHandle
from actors.handles import Completion
from actors.proposers import NgramProposer
from actors.proposing import Proposals
from runtime import Overflow, Sampling
from runtime.proposers.budget import Budget, Experience
from runtime.proposers.ngram import PromptLookup
from runtime.rows import Row, RowBatch
from runtime.sampling import Draw
from runtime.slab import Slab, SlabPool, common_length
from tests.actors.engines import VOCABULARY, LedgerEngine, generated, open_lab
from tests.actors.test_durable import open_durable

DRAWN = {"greedy": {}, "sampled": {"temperature": 1.0, "seed": 11}}
SAMPLINGS = {"greedy": Sampling(), "sampled": Sampling(temperature=1.0, seed=11)}
TOKENS = st.lists(st.integers(0, 3), max_size=40)


def read(engine: LedgerEngine, slab: Slab, tokens: list[int]) -> None:
    """Has the slab read what it lacks of these tokens."""
    tile = engine.spec.row_tile
    for start in range(slab.frontier, len(tokens), tile):
        rows = [Row(slab, at, tokens[at], None) for at in range(start, min(start + tile, len(tokens)))]
        engine.forward(RowBatch(tuple(rows)))


def next_of(engine: LedgerEngine, slab: Slab, tokens: list[int], sampling: Sampling) -> int:
    """The token drawn behind these, of which the slab has read all."""
    (token,) = engine.forward(RowBatch((Row(slab, len(tokens) - 1, tokens[-1], Draw(sampling)),)))
    return token.token_id


class TestAPool:
    @pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
    @settings(max_examples=60, deadline=None)
    @given(histories=st.lists(TOKENS, min_size=1, max_size=8), count=st.integers(1, 3))
    def test_lends_slabs_whose_draws_are_those_of_empty_ones(
        self, sampling: Sampling, histories: list[list[int]], count: int
    ) -> None:
        engine = trio.run(new_engine)
        pool = engine.new_pool(count)
        for history in histories:
            tokens = [5, *history]
            slab = pool.acquire(array("I", tokens))
            read(engine, slab, tokens)

            assert next_of(engine, slab, tokens, sampling) == engine.continued(tokens, 1, sampling)[0]
            pool.release(slab, array("I", tokens))

    @settings(max_examples=100, deadline=None)
    @given(histories=st.lists(TOKENS, min_size=1, max_size=8), asked=TOKENS)
    def test_lends_the_slab_that_has_read_most(self, histories: list[list[int]], asked: list[int]) -> None:
        engine = trio.run(new_engine)
        pool = engine.new_pool(len(histories))
        held = {pool.acquire(): array("I", history) for history in histories}
        for slab, history in held.items():
            read(engine, slab, history.tolist())
        for slab, history in held.items():
            pool.release(slab, history)
        of_asked = {slab: common_length(history, array("I", asked)) for slab, history in held.items()}
        whole = [history for slab, history in held.items() if engine.spec.is_whole(len(history), of_asked[slab])]
        useful = [common_length(history, array("I", asked)) for history in whole]

        # One that would give up more than it has is spared, where there is another.
        lent = [
            length for length, read in zip(useful, whole, strict=True) if length > len(read) - length or len(held) == 1
        ]
        frontier = pool.acquire(array("I", asked)).frontier
        assert frontier == max(lent) if lent else frontier in (0, *useful)

    def test_lends_an_empty_slab_to_who_names_no_history(self) -> None:
        engine = trio.run(new_engine)
        pool = engine.new_pool(1)
        slab = pool.acquire()
        read(engine, slab, [1, 2, 3])
        pool.release(slab, array("I", [1, 2, 3]))

        assert pool.acquire().frontier == 0

    def test_gives_up_first_what_was_read_longest_ago(self) -> None:
        engine = trio.run(new_engine)
        pool: SlabPool = engine.new_pool(2)
        slabs = [pool.acquire(), pool.acquire()]
        for number, slab in enumerate(slabs, 1):
            read(engine, slab, [number] * 5)
            pool.release(slab, array("I", [number] * 5))

        assert pool.acquire(array("I", [9])) is slabs[0]
        assert pool.acquire(array("I", [2] * 5)).frontier == 5


async def new_engine() -> LedgerEngine:
    # It has a channel, which is made in a run of trio's.
    return LedgerEngine()


async def complete(
    runtime: Runtime, prompt: list[int], drawn: dict[str, float], count: int = 1
) -> tuple[list[list[int]], int]:
    """What each of `count` answers says, and how much of the prompt needed no reading."""
    async with runtime.completion((), Overflow.EVICT, count) as completion:
        session, reused = await having_read(completion, prompt)
        sessions = await completion.fork(session)
        return [await generated(each, 6, **drawn) for each in sessions], reused


async def having_read(completion: Completion, prompt: list[int]) -> tuple[SessionHandle, int]:
    session, length = completion.open(array("I", prompt))
    await session.append(prompt[length:])
    return session, length


@pytest.mark.parametrize("name", DRAWN)
class TestACompletion:
    async def test_goes_on_from_what_an_earlier_one_has_read(self, name: str) -> None:
        engine, prompt = LedgerEngine(), [*range(10)]
        async with open_lab(engine, max_concurrent=1) as runtime:
            first, _ = await complete(runtime, prompt, DRAWN[name])
            longer = [*prompt, *first[0], 7, 8]
            engine.batches.clear()

            second, reused = await complete(runtime, longer, DRAWN[name])

        assert first == [engine.continued(prompt, 6, SAMPLINGS[name])]
        assert second == [engine.continued(longer, 6, SAMPLINGS[name])]
        # Its last token was drawn and never read.
        assert reused == len(prompt) + 5
        assert min(row.position for batch in engine.batches for row in batch.rows) == reused

    async def test_asked_again_is_the_same(self, name: str) -> None:
        engine, prompt = LedgerEngine(), [*range(10)]
        async with open_lab(engine, max_concurrent=1) as runtime:
            answers = [await complete(runtime, prompt, DRAWN[name]) for _ in range(3)]

        assert [answer for answer, _ in answers] == [[engine.continued(prompt, 6, SAMPLINGS[name])]] * 3
        assert [reused for _, reused in answers] == [0, 10, 10]

    async def test_past_the_window_reads_again_what_is_no_more(self, name: str) -> None:
        engine, prompt = LedgerEngine(), [n % 80 for n in range(100)]
        async with open_lab(engine, max_concurrent=1) as runtime:
            first, _ = await complete(runtime, prompt, DRAWN[name])
            earlier = [*prompt[:20], 5]

            second, reused = await complete(runtime, earlier, DRAWN[name])

        assert first == [engine.continued(prompt, 6, SAMPLINGS[name])]
        assert (second, reused) == ([engine.continued(earlier, 6, SAMPLINGS[name])], 0)

    async def test_whose_slab_another_has_taken_is_read_anew(self, name: str) -> None:
        engine, prompt, other = LedgerEngine(), [*range(10)], [50] * 10
        async with open_lab(engine, max_concurrent=1) as runtime:
            await complete(runtime, prompt, DRAWN[name])
            await complete(runtime, other, DRAWN[name])

            answer, reused = await complete(runtime, prompt, DRAWN[name])

        assert (answer, reused) == ([engine.continued(prompt, 6, SAMPLINGS[name])], 0)

    async def test_of_several_answers_goes_on_too(self, name: str) -> None:
        engine, prompt = LedgerEngine(), [*range(10)]
        async with open_lab(engine, max_concurrent=3) as runtime:
            await complete(runtime, prompt, DRAWN[name])

            answers, reused = await complete(runtime, [*prompt, 1], DRAWN[name], 3)

        assert answers == [engine.continued([*prompt, 1], 6, SAMPLINGS[name])] * 3
        assert reused == 10

    async def test_that_was_left_in_a_forward_leaves_nothing_wrong_behind(self, name: str) -> None:
        engine, prompt = LedgerEngine(), [*range(30)]
        async with open_lab(engine, max_concurrent=1) as runtime, trio.open_nursery() as nursery:
            engine.hold()
            nursery.start_soon(complete, runtime, prompt, DRAWN[name])
            await engine.begun()
            nursery.cancel_scope.cancel()
            engine.open()
        async with open_lab(engine, max_concurrent=1) as runtime:
            answer, _ = await complete(runtime, prompt, DRAWN[name])

        assert answer == [engine.continued(prompt, 6, SAMPLINGS[name])]


def no_proposals() -> None:
    return None


def ngram() -> Proposals:
    return Proposals(NgramProposer(PromptLookup(2, 1)), Budget(4, Experience()), VOCABULARY)


@pytest.mark.parametrize("new", [no_proposals, ngram], ids=["alone", "ngram"])
@pytest.mark.parametrize("is_durable", [False, True], ids=["in memory", "durable"])
@settings(max_examples=15, deadline=None)
@given(steps=st.lists(st.tuples(st.floats(0, 1), TOKENS), min_size=1, max_size=5))
def test_a_session_that_goes_back_goes_on_as_a_fresh_one(
    new: Callable[[], Proposals | None],
    is_durable: bool,
    steps: list[tuple[float, list[int]]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    async def main() -> None:
        engine = LedgerEngine()
        opened = (
            open_durable(tmp_path_factory.mktemp("state"), lab=engine, new_proposals=new)
            if is_durable
            else open_lab(engine, new_proposals=new)
        )
        async with opened as runtime:
            session = await runtime.create_session()
            history = [1, 2, 1, 2, 1, 2]
            await session.append(history)
            for share, more in steps:
                length = int(share * len(history))
                rewound = await session.rewind(array("I", history[:length]))
                history = [*history[:length], 3, *more]
                assert rewound.length == length
                assert rewound.read <= length
                await session.append(history[length:])
                drawn = await generated(session, 5)
                assert drawn == engine.continued(history, 5)
                history += drawn
                info = await session.info()
                assert info.history_length == len(history)

    trio.run(main)


async def test_a_durable_session_that_went_back_wakes_where_it_went(tmp_path: Path) -> None:
    async with open_durable(tmp_path) as runtime:
        session = await runtime.create_session()
        await session.append(range(40))
        await session.rewind(array("I", range(20)))
        await session.append([5])
    engine = LedgerEngine()
    async with open_durable(tmp_path, lab=engine) as runtime:
        woken = runtime.find_session(session.id)

        assert await generated(woken, 5) == engine.continued([*range(20), 5], 5)
        assert (await woken.info()).history_length == 26
