"""Ask, stream and offer, and cancellation at each stage of a message's life."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import outcome
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from actors.mailbox import ActorFailed, ActorStopped, Envelope, Inbox, Mailbox, Message, Reply, open_mailbox
from runtime.errors import InvalidRequest, InvariantViolation


@dataclass(frozen=True, slots=True)
class Double(Message[int]):
    number: int


@dataclass(frozen=True, slots=True)
class CountTo(Message[int]):
    number: int


@dataclass(frozen=True, slots=True)
class Wait(Message[str]):
    """Tells that it was taken, and answers when told to."""

    taken: trio.Event = field(default_factory=trio.Event)
    go_on: trio.Event = field(default_factory=trio.Event)


@dataclass(frozen=True, slots=True)
class Fail(Message[None]):
    error: Exception
    go_on: trio.Event | None = None


class Desk:
    """An actor that keeps a record of what it took and what it completed."""

    def __init__(self, inbox: Inbox) -> None:
        self.taken: list[Message[Any]] = []
        self.completed: list[Message[Any]] = []
        self._inbox = inbox

    async def run(self) -> None:
        with self._inbox:
            while True:
                await self._inbox.handle(await self._inbox.take(), self._handle)

    async def _handle(self, message: Message[Any], reply: Reply[Any]) -> None:
        self.taken.append(message)
        match message:
            case Double():
                await reply(2 * message.number)
            case CountTo():
                for number in range(message.number):
                    await reply(number)
            case Wait():
                message.taken.set()
                await message.go_on.wait()
                await reply("done")
            case Fail():
                if message.go_on is not None:
                    with trio.CancelScope(shield=True):
                        await message.go_on.wait()
                raise message.error
        self.completed.append(message)


@pytest.fixture
def ends() -> tuple[Mailbox, Inbox]:
    return open_mailbox()


@pytest.fixture
def mailbox(ends: tuple[Mailbox, Inbox]) -> Mailbox:
    return ends[0]


@pytest.fixture
def inbox(ends: tuple[Mailbox, Inbox]) -> Inbox:
    return ends[1]


@pytest.fixture
def desk(inbox: Inbox, nursery: trio.Nursery) -> Desk:
    desk = Desk(inbox)
    nursery.start_soon(desk.run)
    return desk


async def run_until_it_fails(desk: Desk, error: Exception, ended: trio.Event) -> None:
    with pytest.raises(type(error)) as caught:
        await desk.run()
    assert caught.value is error
    ended.set()


def finish(envelope: Envelope[int], value: int) -> None:
    with envelope.replies:
        envelope.replies.send_nowait(outcome.Value(value))


async def told(ask: Callable[[], Awaitable[object]], into: list[object]) -> None:
    """Adds the answer, or the error that came instead."""
    try:
        into.append(await ask())
    except Exception as error:
        into.append(type(error))


async def test_an_ask_returns_the_reply(mailbox: Mailbox, desk: Desk) -> None:
    assert await mailbox.ask(Double(21)) == 42


async def test_a_stream_gives_every_reply_in_order(mailbox: Mailbox, desk: Desk) -> None:
    async with mailbox.stream(CountTo(3)) as replies:
        assert [await replies.receive() for _ in range(3)] == [0, 1, 2]


async def test_a_stream_that_ends_without_a_last_word_is_an_error(mailbox: Mailbox, desk: Desk) -> None:
    async with mailbox.stream(CountTo(1)) as replies:
        await replies.receive()
        with pytest.raises(ActorFailed):
            await replies.receive()


async def test_messages_are_served_in_the_order_in_which_askers_came(
    mailbox: Mailbox, desk: Desk, nursery: trio.Nursery
) -> None:
    first = Wait()
    others = [Double(number) for number in range(5)]
    messages: list[Message[Any]] = [first, *others]
    for message in messages:
        nursery.start_soon(mailbox.ask, message)
        await wait_all_tasks_blocked()
    first.go_on.set()
    await wait_all_tasks_blocked()
    assert desk.completed == messages


async def test_an_asker_that_leaves_before_its_message_is_taken_takes_it_along(
    mailbox: Mailbox, desk: Desk, nursery: trio.Nursery
) -> None:
    first, withdrawn, last = Wait(), Double(1), Double(2)
    leaving = trio.CancelScope()

    async def ask_and_leave() -> None:
        with leaving:
            await mailbox.ask(withdrawn)

    nursery.start_soon(mailbox.ask, first)
    await first.taken.wait()
    nursery.start_soon(ask_and_leave)
    await wait_all_tasks_blocked()
    nursery.start_soon(mailbox.ask, last)
    await wait_all_tasks_blocked()
    leaving.cancel()
    await wait_all_tasks_blocked()
    first.go_on.set()
    await wait_all_tasks_blocked()
    assert desk.taken == [first, last]


async def test_an_asker_that_leaves_while_it_is_handled_cancels_the_handler(
    mailbox: Mailbox, desk: Desk, nursery: trio.Nursery
) -> None:
    message = Wait()
    with trio.CancelScope() as leaving:
        nursery.start_soon(cancel_when, message.taken, leaving)
        await mailbox.ask(message)
    assert await mailbox.ask(Double(1)) == 2
    assert message not in desk.completed


async def cancel_when(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()


async def test_a_deadline_around_an_ask_is_a_deadline_of_its_handler(
    mailbox: Mailbox, desk: Desk, autojump_clock: trio.testing.MockClock
) -> None:
    with pytest.raises(trio.TooSlowError):
        with trio.fail_after(5):
            await mailbox.ask(Wait())
    assert await mailbox.ask(Double(1)) == 2


async def test_leaving_a_stream_cancels_a_handler_whose_reply_waits(mailbox: Mailbox, desk: Desk) -> None:
    message = CountTo(3)
    async with mailbox.stream(message) as replies:
        await replies.receive()
        await wait_all_tasks_blocked()
    await mailbox.ask(Double(1))
    assert message not in desk.completed


async def test_a_handler_goes_on_only_once_its_reply_has_been_taken(mailbox: Mailbox, desk: Desk) -> None:
    message = CountTo(1)
    async with mailbox.stream(message) as replies:
        await wait_all_tasks_blocked()
        assert message not in desk.completed
        await replies.receive()
        await wait_all_tasks_blocked()
        assert message in desk.completed


async def test_a_slow_asker_holds_up_the_next_one(mailbox: Mailbox, desk: Desk, nursery: trio.Nursery) -> None:
    async with mailbox.stream(CountTo(2)) as replies:
        await replies.receive()
        nursery.start_soon(mailbox.ask, Double(1))
        await wait_all_tasks_blocked()
        assert Double(1) not in desk.taken
        await replies.receive()
        await wait_all_tasks_blocked()
        assert Double(1) in desk.taken


async def test_a_request_error_goes_to_the_asker_and_the_actor_lives(mailbox: Mailbox, desk: Desk) -> None:
    with pytest.raises(InvalidRequest, match="too odd"):
        await mailbox.ask(Fail(InvalidRequest("too odd")))
    assert await mailbox.ask(Double(1)) == 2


async def test_a_request_error_for_an_asker_that_has_left_is_dropped_and_the_actor_lives(
    mailbox: Mailbox, desk: Desk
) -> None:
    go_on = trio.Event()
    async with mailbox.stream(Fail(InvalidRequest("too late"), go_on)):
        await wait_all_tasks_blocked()
    go_on.set()
    assert await mailbox.ask(Double(1)) == 2


async def test_any_other_error_of_ours_goes_to_the_asker_and_ends_the_actor(mailbox: Mailbox, inbox: Inbox) -> None:
    error, ended = InvariantViolation("INV-1", "inv1"), trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run_until_it_fails, Desk(inbox), error, ended)
        with pytest.raises(InvariantViolation):
            await mailbox.ask(Fail(error))
        await ended.wait()


async def test_such_an_error_ends_the_actor_also_when_its_asker_has_left(mailbox: Mailbox, inbox: Inbox) -> None:
    error, ended = InvariantViolation("INV-1", "inv1"), trio.Event()
    go_on = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run_until_it_fails, Desk(inbox), error, ended)
        async with mailbox.stream(Fail(error, go_on)):
            await wait_all_tasks_blocked()
        go_on.set()
        await ended.wait()


async def test_such_an_error_ends_the_actor_also_when_its_asker_leaves_without_taking_it(
    mailbox: Mailbox, inbox: Inbox
) -> None:
    error, ended = InvariantViolation("INV-1", "inv1"), trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run_until_it_fails, Desk(inbox), error, ended)
        async with mailbox.stream(Fail(error)):
            await wait_all_tasks_blocked()
        await ended.wait()


async def test_an_asker_is_told_such_an_error_even_while_the_actor_is_cancelled(mailbox: Mailbox, inbox: Inbox) -> None:
    go_on = trio.Event()
    message = Fail(InvariantViolation("INV-1", "inv1"), go_on)
    answers: list[object] = []

    async def run_cancelled(scope: trio.CancelScope) -> None:
        with scope, suppress(InvariantViolation):
            await Desk(inbox).run()

    ending = trio.CancelScope()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run_cancelled, ending)
        nursery.start_soon(told, lambda: mailbox.ask(message), answers)
        await wait_all_tasks_blocked()
        ending.cancel()
        go_on.set()
    assert answers == [InvariantViolation]


async def test_a_bug_ends_the_actor_and_everyone_who_waits_is_told(mailbox: Mailbox, inbox: Inbox) -> None:
    error, ended, go_on = ZeroDivisionError("a bug"), trio.Event(), trio.Event()
    answers: list[object] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run_until_it_fails, Desk(inbox), error, ended)
        nursery.start_soon(told, lambda: mailbox.ask(Fail(error, go_on)), answers)
        await wait_all_tasks_blocked()
        for _ in range(3):
            nursery.start_soon(told, lambda: mailbox.ask(Double(1)), answers)
        await wait_all_tasks_blocked()
        go_on.set()
        await ended.wait()
    assert sorted(map(str, answers)) == sorted(map(str, [ActorFailed, *[ActorStopped] * 3]))


async def test_asking_an_actor_that_has_ended_says_that_nothing_was_done(mailbox: Mailbox, inbox: Inbox) -> None:
    with inbox:
        pass
    with pytest.raises(ActorStopped):
        await mailbox.ask(Double(1))


async def test_an_asker_to_the_end_leaves_at_once_while_nothing_has_begun(mailbox: Mailbox, inbox: Inbox) -> None:
    with trio.CancelScope() as leaving:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mailbox.ask_to_the_end, Double(1))
            envelope = await inbox.take()
            leaving.cancel()
    assert not envelope.begin()


async def test_an_asker_to_the_end_that_is_cancelled_stays_until_its_reply_and_gets_it(
    mailbox: Mailbox, inbox: Inbox
) -> None:
    answers: list[object] = []
    with trio.CancelScope() as leaving:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(told, lambda: mailbox.ask_to_the_end(Double(1)), answers)
            envelope = await inbox.take()
            assert envelope.begin()
            leaving.cancel()
            with trio.CancelScope(shield=True):
                await wait_all_tasks_blocked()
                assert not answers
            finish(envelope, 2)
    assert answers == [2]


async def test_an_asker_to_the_end_that_is_cancelled_does_not_outlive_the_actor(mailbox: Mailbox, inbox: Inbox) -> None:
    answers: list[object] = []
    with trio.CancelScope() as leaving:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(told, lambda: mailbox.ask_to_the_end(Double(1)), answers)
            envelope = await inbox.take()
            assert envelope.begin()
            leaving.cancel()
            with trio.CancelScope(shield=True):
                await wait_all_tasks_blocked()
            envelope.replies.close()
    assert answers == [ActorFailed]


async def test_a_cancelled_asker_to_the_end_is_cancelled_at_its_next_step(mailbox: Mailbox, inbox: Inbox) -> None:
    steps: list[str] = []

    async def ask_twice() -> None:
        await mailbox.ask_to_the_end(Double(1))
        steps.append("first")
        await mailbox.ask_to_the_end(Double(2))
        steps.append("second")

    with trio.CancelScope() as leaving:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask_twice)
            envelope = await inbox.take()
            assert envelope.begin()
            leaving.cancel()
            finish(envelope, 2)
    assert steps == ["first"]


async def test_an_offered_reply_is_taken_by_an_asker_that_waits_for_it_just_now(
    mailbox: Mailbox, inbox: Inbox, nursery: trio.Nursery
) -> None:
    answers: list[object] = []
    nursery.start_soon(told, lambda: mailbox.ask(Double(1)), answers)
    reply: Reply[int] = Reply(await inbox.take())
    await wait_all_tasks_blocked()
    assert [reply.offer(2), reply.offer(3)] == [True, False]
    await wait_all_tasks_blocked()
    assert answers == [2]


async def test_an_offer_is_taken_by_an_actor_that_waits_at_its_inbox(mailbox: Mailbox, desk: Desk) -> None:
    await wait_all_tasks_blocked()
    assert mailbox.offer(Fail(InvalidRequest("taken"))) is True
    await wait_all_tasks_blocked()
    assert len(desk.taken) == 1


async def test_an_offer_to_an_actor_at_work_leaves_no_trace(
    mailbox: Mailbox, desk: Desk, nursery: trio.Nursery
) -> None:
    message = Wait()
    nursery.start_soon(mailbox.ask, message)
    await message.taken.wait()
    assert mailbox.offer(Fail(InvalidRequest("refused"))) is False
    message.go_on.set()
    await mailbox.ask(Double(1))
    assert desk.taken == [message, Double(1)]


async def test_an_offer_to_an_actor_that_has_ended_is_refused(mailbox: Mailbox, inbox: Inbox) -> None:
    with inbox:
        pass
    assert mailbox.offer(Fail(InvalidRequest("refused"))) is False
