"""A proposer changes what runs in a forward, and nothing of what comes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from actors import SessionHandle
from actors.proposing import Proposals
from runtime import Done, Overflow, Sampling, Token
from runtime.metrics import Metrics
from tests.actors.engines import VOCABULARY, LedgerEngine, generated, open_lab, sample
from tests.actors.proposers import PROMPT, SAMPLINGS, Scripted, asked, converse_as_without, eager, erring


@pytest.fixture
def engine() -> LedgerEngine:
    return LedgerEngine()


def oracle(engine: LedgerEngine, sampling: Sampling, wrong: float = 0.0) -> Scripted:
    """Knows what comes, and errs in a share of the tokens."""
    return erring(lambda history, count: engine.continued(history, count, sampling), wrong)


GARBAGE: dict[str, Callable[[list[int], int], Sequence[int]]] = {
    "nothing": lambda history, count: [],
    "wrong": lambda history, count: [1] * count,
    "too many": lambda history, count: [1] * (count + 50),
    "outside": lambda history, count: [VOCABULARY, -1, 2**40],
    "outside after some": lambda history, count: [1, VOCABULARY],
}


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("make", GARBAGE.values(), ids=GARBAGE)
async def test_garbage_changes_nothing(
    engine: LedgerEngine, make: Callable[[list[int], int], Sequence[int]], sampling: Sampling
) -> None:
    def new() -> Proposals:
        return eager(Scripted(make), 7, VOCABULARY)

    async with open_lab(engine, new_proposals=new) as runtime:
        session = await runtime.create_session()
        await session.append(PROMPT)
        assert await generated(session, 60, **asked(sampling)) == engine.continued(PROMPT, 60, sampling)
        info = await session.info()
        assert info.history_length == len(PROMPT) + 60


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("wrong", [0.0, 0.2, 0.7])
async def test_tokens_are_those_without_a_proposer_past_the_window_and_beside_others(
    engine: LedgerEngine, sampling: Sampling, wrong: float
) -> None:
    metrics = Metrics()

    def new() -> Proposals:
        return eager(oracle(engine, sampling, wrong), 7, VOCABULARY)

    async with open_lab(engine, metrics, new_proposals=new) as runtime:
        await converse_as_without(runtime, engine, sampling)

    assert sample(metrics, "cache_invariant_violations_total", kind="inv1") == 0
    proposed, accepted = (sample(metrics, f"{kind}_tokens_total") for kind in ("proposed", "accepted"))
    assert 0 < accepted <= proposed
    assert (accepted == proposed) == (wrong == 0.0)


async def test_a_right_proposal_takes_one_forward_for_many_tokens(engine: LedgerEngine) -> None:
    async with open_lab(engine, new_proposals=lambda: eager(oracle(engine, Sampling()), 7, VOCABULARY)) as runtime:
        session = await runtime.create_session()
        await session.append([1, 2, 3])
        await generated(session, 1)
        before = len(engine.batches)
        async with session.generate(40) as events:
            last = [event async for event in events][-1]

    assert isinstance(last, Done)
    assert (last.generated_token_count, last.proposed_token_count, last.accepted_token_count) == (40, 35, 35)
    assert len(engine.batches) - before == 5


async def test_an_end_of_turn_inside_a_proposal_ends_the_generation_there(engine: LedgerEngine) -> None:
    expected = engine.continued([1, 2, 3], 20)
    eos = expected[4]
    cut = expected[: expected.index(eos) + 1]
    async with open_lab(engine, new_proposals=lambda: eager(oracle(engine, Sampling()), 7, VOCABULARY)) as runtime:
        session = await runtime.create_session([eos])
        await session.append([1, 2, 3])
        assert await generated(session, 20) == cut
        assert (await session.info()).history_length == 3 + len(cut)
        again = await generated(session, 1)
        assert again == engine.continued([1, 2, 3, *cut], 1)


async def last_word(session: SessionHandle, max_tokens: int, taken: int | None = None) -> Done | None:
    """The last word of a generation, of which no more than `taken` tokens are taken."""
    got = 0
    async with session.generate(max_tokens) as events:
        async for event in events:
            if isinstance(event, Done):
                return event
            got += 1
            if got == taken:
                break
    return None


@pytest.mark.parametrize("place", range(8))
async def test_what_was_proposed_past_the_end_of_a_turn_was_not_accepted(engine: LedgerEngine, place: int) -> None:
    expected = engine.continued([1, 2, 3], 20)
    metrics = Metrics()
    async with open_lab(engine, metrics, new_proposals=lambda: eager(oracle(engine, Sampling()), 7, VOCABULARY)) as lab:
        session = await lab.create_session([expected[place]])
        await session.append([1, 2, 3])
        done = await last_word(session, 20)

    assert done is not None
    count = expected.index(expected[place]) + 1
    assert done.generated_token_count == count
    # Of the 8 tokens of a forward, all but the last were proposed.
    assert done.accepted_token_count == count - count // 8
    assert sample(metrics, "accepted_tokens_total") == done.accepted_token_count <= done.proposed_token_count


async def test_what_was_proposed_past_the_room_of_a_slab_was_not_accepted(engine: LedgerEngine) -> None:
    async with open_lab(engine, new_proposals=lambda: eager(oracle(engine, Sampling()), 7, VOCABULARY)) as runtime:
        session = await runtime.create_session(overflow=Overflow.ERROR)
        await session.append([1] * (engine.spec.visible - 3))
        done = await last_word(session, 20)

    assert done is not None
    assert done.generated_token_count == 3
    assert done.accepted_token_count <= 3


async def test_what_was_proposed_and_not_taken_was_not_accepted(engine: LedgerEngine) -> None:
    metrics = Metrics()
    async with open_lab(engine, metrics, new_proposals=lambda: eager(oracle(engine, Sampling()), 7, VOCABULARY)) as lab:
        session = await lab.create_session()
        await session.append([1, 2, 3])
        await last_word(session, 20, taken=3)
        await session.info()

    assert sample(metrics, "accepted_tokens_total") <= sample(metrics, "generated_tokens_total")


@pytest.mark.parametrize("taken", range(1, 12))
async def test_what_was_drawn_ahead_and_not_taken_never_was(engine: LedgerEngine, taken: int) -> None:
    async with open_lab(engine, new_proposals=lambda: eager(oracle(engine, Sampling()), 7, VOCABULARY)) as runtime:
        session = await runtime.create_session()
        await session.append(PROMPT)
        got = []
        async with session.generate(100) as events:
            async for event in events:
                if isinstance(event, Token):
                    got.append(event.token_id)
                if len(got) == taken:
                    break
        length = (await session.info()).history_length
        fork = await runtime.fork_session(session.id)
        rest = [await generated(one, 20) for one in (session, fork)]

    history = engine.continued(PROMPT, 60)
    assert got == history[:taken]
    # The one that was on its way when its asker left may have been taken.
    assert length - len(PROMPT) in (taken, taken + 1)
    assert rest == [history[length - len(PROMPT) :][:20]] * 2


@settings(max_examples=30)
@given(
    st.lists(st.integers(0, 89), min_size=1, max_size=40),
    st.integers(1, 7),
    st.floats(0, 1),
    st.sampled_from(list(SAMPLINGS.values())),
    st.integers(1, 30),
)
def test_any_history_and_any_block(
    history: list[int], block: int, wrong: float, sampling: Sampling, count: int
) -> None:
    async def run() -> None:
        engine = LedgerEngine()

        def new() -> Proposals:
            return eager(oracle(engine, sampling, wrong), block, VOCABULARY)

        async with open_lab(engine, new_proposals=new) as runtime:
            session = await runtime.create_session()
            await session.append(history)
            assert await generated(session, count, **asked(sampling)) == engine.continued(history, count, sampling)

    trio.run(run)
