"""Conversations: the session that has read most goes on, and what it draws is what a new one would."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from actors import Runtime
from runtime.errors import CapacityExhausted
from runtime.items import Message
from runtime.points import Point
from runtime.script import Head
from tests.actors.engines import LedgerEngine, generated, open_lab, sample
from tests.actors.test_durable import open_durable

CUE = array("I", [88])
LONG = [*range(10, 60)]


@pytest.fixture
def engine() -> LedgerEngine:
    return LedgerEngine(window=2000)


def point_after(runtime: Runtime, *parts: Sequence[int]) -> Point:
    """The point of a conversation of which each part has these tokens."""
    points = runtime.conversations.points
    point = points.root(Head())
    for part in parts:
        point = points.grow(point, [Message("user", str(part))], array("I", part))
    return point


async def turn(runtime: Runtime, point: Point, count: int = 3) -> tuple[list[int], int]:
    """What is drawn after a point, and how much of the prompt needed no reading. The session stands at the point then."""
    async with runtime.conversations.stand(point, CUE) as stand:
        stand.point = point
        await stand.session.append((point.history + CUE)[stand.length :])
        return await generated(stand.session, count), stand.reused


async def checked_turn(runtime: Runtime, engine: LedgerEngine, point: Point) -> int:
    """How much of a prompt needed no reading, in a turn whose tokens are those of a new session."""
    drawn, reused = await turn(runtime, point)
    assert drawn == engine.continued([*point.history, *CUE], 3)
    return reused


async def test_a_conversation_goes_on_where_a_session_stands(engine: LedgerEngine) -> None:
    async with open_lab(engine) as runtime:
        assert await checked_turn(runtime, engine, point_after(runtime, LONG)) == 0
        assert await checked_turn(runtime, engine, point_after(runtime, LONG, [1, 2])) == len(LONG)
        assert await checked_turn(runtime, engine, point_after(runtime, LONG, [1, 2], [3])) == len(LONG) + 2
        assert sample(runtime.metrics, "session_active") == 1


async def test_who_goes_back_a_little_gives_up_what_came_after(engine: LedgerEngine) -> None:
    async with open_lab(engine) as runtime:
        await turn(runtime, point_after(runtime, LONG, [1, 2, 3]))

        assert await checked_turn(runtime, engine, point_after(runtime, LONG, [1, 9])) == len(LONG) + 1
        assert sample(runtime.metrics, "session_active") == 1


async def test_a_long_branch_keeps_its_slab_and_its_sibling_begins_on_a_copy(engine: LedgerEngine) -> None:
    async with open_lab(engine) as runtime:
        branch = point_after(runtime, LONG, [5] * 400)
        await turn(runtime, branch)

        assert await checked_turn(runtime, engine, point_after(runtime, LONG, [6])) == len(LONG)
        assert sample(runtime.metrics, "session_active") == 2
        assert await checked_turn(runtime, engine, branch) == len(branch.history)


async def test_where_no_slab_is_left_a_long_branch_is_given_up(engine: LedgerEngine) -> None:
    async with open_lab(engine, capacity=1) as runtime:
        await turn(runtime, point_after(runtime, LONG, [5] * 400))

        assert await checked_turn(runtime, engine, point_after(runtime, LONG, [6])) == len(LONG)
        assert sample(runtime.metrics, "session_active") == 1


async def test_what_the_window_has_left_behind_is_read_again() -> None:
    engine = LedgerEngine(window=14)
    async with open_lab(engine, capacity=1) as runtime:
        await turn(runtime, point_after(runtime, LONG, [*range(1, 80)] * 4))

        assert await checked_turn(runtime, engine, point_after(runtime, LONG, [7])) == 0


async def test_another_conversation_gets_a_session_of_its_own(engine: LedgerEngine) -> None:
    async with open_lab(engine) as runtime:
        await turn(runtime, point_after(runtime, LONG))

        assert await checked_turn(runtime, engine, point_after(runtime, [70, *LONG])) == 0
        assert sample(runtime.metrics, "session_active") == 2
        assert await checked_turn(runtime, engine, point_after(runtime, LONG)) == len(LONG)


async def test_two_turns_at_one_point_at_once_are_two_sessions(engine: LedgerEngine) -> None:
    async with open_lab(engine) as runtime:
        point = point_after(runtime, LONG)
        await turn(runtime, point)
        async with runtime.conversations.stand(point, CUE) as one, runtime.conversations.stand(point, CUE) as other:
            assert one.session.id != other.session.id
            assert (one.reused, other.reused) == (len(LONG), 0)


async def test_a_turn_that_is_broken_off_leaves_its_session_where_it_says(engine: LedgerEngine) -> None:
    async with open_lab(engine) as runtime:
        point = point_after(runtime, LONG)
        engine.hold()
        async with trio.open_nursery() as leaving:
            leaving.start_soon(turn, runtime, point, 1000)
            await engine.begun()
            leaving.cancel_scope.cancel()
            engine.open()

        assert await checked_turn(runtime, engine, point) > 0
        assert sample(runtime.metrics, "session_active") == 1


async def test_a_turn_that_does_not_say_where_it_stands_leaves_no_session(engine: LedgerEngine) -> None:
    async with open_lab(engine) as runtime:
        async with runtime.conversations.stand(point_after(runtime, LONG), CUE):
            pass
        assert sample(runtime.metrics, "session_active") == 0


async def test_who_goes_on_from_what_is_being_read_waits_for_it(engine: LedgerEngine, nursery: trio.Nursery) -> None:
    reused: list[int] = []

    async def go_on(runtime: Runtime, point: Point) -> None:
        reused.append(await checked_turn(runtime, engine, point))

    async with open_lab(engine) as runtime:
        head = point_after(runtime, LONG)
        engine.hold()
        nursery.start_soon(runtime.conversations.read_ahead, head)
        await engine.begun()
        nursery.start_soon(go_on, runtime, point_after(runtime, LONG, [1, 2]))
        await wait_all_tasks_blocked()
        assert not reused

        engine.open()
        await wait_all_tasks_blocked()
        while not reused:
            await trio.lowlevel.checkpoint()
        assert reused == [len(LONG)]


async def test_a_session_that_was_evicted_is_missed_by_nobody(engine: LedgerEngine) -> None:
    async with open_lab(engine, capacity=1) as runtime:
        point = point_after(runtime, LONG)
        await turn(runtime, point)
        await runtime.create_session()

        assert await checked_turn(runtime, engine, point) == 0


async def test_sessions_that_were_evicted_are_not_remembered(engine: LedgerEngine) -> None:
    async with open_lab(engine, capacity=2) as runtime:
        for first in range(6):
            await turn(runtime, point_after(runtime, [first, *LONG]))

        assert sum(one.sessions for one in runtime.conversations.summaries()) == 2
        assert len([name for name in runtime.conversations.points.names() if name.startswith("session ")]) == 2


async def test_who_leaves_while_a_session_wakes_leaves_it_as_it_was(engine: LedgerEngine, tmp_path: Path) -> None:
    async with open_durable(tmp_path, lab=engine, capacity=1) as runtime:
        point = point_after(runtime, LONG)
        await turn(runtime, point)
        await runtime.create_session()
        with trio.CancelScope() as leaving:
            leaving.cancel()
            async with runtime.conversations.stand(point, CUE):
                pass

        assert leaving.cancelled_caught
        async with runtime.conversations.stand(point, CUE) as stand:
            assert stand.length == len(LONG)


async def test_a_turn_is_answered_though_its_session_fell_asleep_and_no_slab_is_free(
    engine: LedgerEngine, tmp_path: Path
) -> None:
    async with open_durable(tmp_path, lab=engine, capacity=1) as runtime:
        point = point_after(runtime, LONG)
        async with AsyncExitStack() as working, runtime.conversations.stand(point, CUE) as stand:
            await stand.session.append([*point.history])
            stand.leave(point)
            other = await runtime.create_session()
            await other.append([1])
            await anext(await working.enter_async_context(other.generate(1000)))
        # It is at work until the forward that ran when its asker left has ended.
        await other.info()

        async with runtime.conversations.stand(point, CUE) as stand:
            assert stand.length == len(LONG)


async def test_damage_to_the_tree_of_conversations_deletes_no_session(engine: LedgerEngine, tmp_path: Path) -> None:
    async with open_durable(tmp_path, lab=engine) as runtime:
        for number in range(3):
            await turn(runtime, point_after(runtime, [number] * 40))
    records = {file.name for file in (tmp_path / "sessions").glob("*.history")}
    assert len(records) == 3
    tree = tmp_path / "conversations.tree"
    tree.write_bytes(tree.read_bytes()[:-40])

    for _ in range(2):
        async with open_durable(tmp_path, lab=LedgerEngine(window=2000)):
            pass

        assert {file.name for file in (tmp_path / "sessions").glob("*.history")} == records


async def test_where_every_slab_is_at_work_there_is_none_for_a_conversation(engine: LedgerEngine) -> None:
    async with open_lab(engine, capacity=1) as runtime:
        session = await runtime.create_session()
        await session.append([1])
        async with session.generate(1000) as events:
            await anext(events)
            with pytest.raises(CapacityExhausted):
                await turn(runtime, point_after(runtime, LONG))


async def test_a_session_that_could_not_be_woken_still_stands_where_it_stood(
    engine: LedgerEngine, tmp_path: Path
) -> None:
    async with open_durable(tmp_path, lab=engine, capacity=1) as runtime:
        point = point_after(runtime, LONG)
        await turn(runtime, point)
        session = await runtime.create_session()
        await session.append([1])
        async with session.generate(1000) as events:
            await anext(events)
            with pytest.raises(CapacityExhausted):
                await turn(runtime, point)

        async with runtime.conversations.stand(point, CUE) as stand:
            assert stand.length == len(LONG)


async def test_two_branches_at_once_of_a_session_with_the_only_slab_are_one_turn_and_one_refusal(
    engine: LedgerEngine,
) -> None:
    refused = trio.Event()

    async def branch(token: int) -> None:
        try:
            async with runtime.conversations.stand(point_after(runtime, LONG, [token]), CUE):
                await refused.wait()
        except CapacityExhausted:
            refused.set()

    async with open_lab(engine, capacity=1) as runtime:
        await turn(runtime, point_after(runtime, LONG, [1] * 300))

        async with trio.open_nursery() as branches:
            branches.start_soon(branch, 2)
            branches.start_soon(branch, 3)

        assert refused.is_set()
