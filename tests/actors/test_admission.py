"""Permits for completions: who gets one, who waits, and that none is ever lost."""

from __future__ import annotations

import math
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from actors.admission import Admission
from runtime import Settings
from runtime.errors import Saturated
from runtime.metrics import Metrics
from tests.actors.engines import sample


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


def rejecting(metrics: Metrics, count: int = 1) -> Admission:
    return Admission(Settings(max_concurrent=count, admission_policy="reject"), metrics)


def queueing(metrics: Metrics, count: int = 1, longest_wait_s: float = 0) -> Admission:
    return Admission(Settings(max_concurrent=count, admission_policy="queue", queue_max_wait_s=longest_wait_s), metrics)


async def hold(admission: Admission, until: trio.Event) -> None:
    async with admission.permits():
        await until.wait()


async def take(admission: Admission) -> None:
    """Takes a permit and gives it back."""
    async with admission.permits():
        pass


async def test_as_many_run_at_once_as_there_are_permits(metrics: Metrics) -> None:
    admission = rejecting(metrics, 3)
    async with AsyncExitStack() as stack:
        for _ in range(3):
            await stack.enter_async_context(admission.permits())
        with pytest.raises(Saturated):
            await take(admission)


async def test_a_permit_is_free_when_its_block_has_ended(metrics: Metrics) -> None:
    admission = rejecting(metrics)
    for _ in range(3):
        await take(admission)
    assert sample(metrics, "admission_total", result="admitted") == 3


async def test_a_permit_is_free_when_its_block_has_failed(metrics: Metrics) -> None:
    admission = rejecting(metrics)

    async def fail() -> None:
        async with admission.permits():
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    await take(admission)


async def test_a_permit_is_free_when_its_block_was_cancelled(metrics: Metrics) -> None:
    admission = rejecting(metrics)
    with trio.CancelScope() as leaving:
        async with admission.permits():
            leaving.cancel()
            await trio.sleep_forever()
    await take(admission)


async def test_under_reject_nobody_waits(metrics: Metrics) -> None:
    admission = rejecting(metrics)
    async with admission.permits():
        with pytest.raises(Saturated):
            await take(admission)
        assert sample(metrics, "admission_total", result="rejected") == 1
        assert sample(metrics, "admission_pending") == 0


async def test_under_queue_waiters_are_served_in_the_order_in_which_they_came(
    metrics: Metrics, nursery: trio.Nursery
) -> None:
    admission = queueing(metrics)
    served: list[int] = []

    async def wait(number: int) -> None:
        async with admission.permits():
            served.append(number)
            await trio.lowlevel.checkpoint()

    async with admission.permits():
        for number in range(5):
            nursery.start_soon(wait, number)
            await wait_all_tasks_blocked()
        assert sample(metrics, "admission_pending") == 5
    await wait_all_tasks_blocked()
    assert served == [0, 1, 2, 3, 4]


async def test_a_newcomer_does_not_pass_those_who_wait(metrics: Metrics, nursery: trio.Nursery) -> None:
    admission = queueing(metrics)
    served: list[str] = []

    async def wait() -> None:
        async with admission.permits():
            served.append("waiter")

    async with admission.permits():
        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
    # In the same step in which the permit was given back.
    async with admission.permits():
        served.append("newcomer")
    assert served == ["waiter", "newcomer"]


async def test_a_waiter_is_refused_after_the_longest_wait(metrics: Metrics, autojump_clock: MockClock) -> None:
    admission = queueing(metrics, longest_wait_s=7)
    async with admission.permits():
        began = trio.current_time()
        with pytest.raises(Saturated, match="7 s"):
            await take(admission)
        assert trio.current_time() - began == pytest.approx(7)
        assert sample(metrics, "admission_total", result="timed_out") == 1
        assert sample(metrics, "admission_pending") == 0


async def test_a_longest_wait_of_zero_is_none(
    metrics: Metrics, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    admission = queueing(metrics, longest_wait_s=0)
    done = trio.Event()
    nursery.start_soon(hold, admission, done)
    await wait_all_tasks_blocked()
    nursery.start_soon(take, admission)
    await trio.sleep(3600)
    assert sample(metrics, "admission_pending") == 1
    done.set()
    await wait_all_tasks_blocked()
    assert sample(metrics, "admission_total", result="admitted") == 2


async def test_a_waiter_that_leaves_is_gone_at_once_and_takes_no_permit(
    metrics: Metrics, nursery: trio.Nursery
) -> None:
    admission = queueing(metrics)
    leaving = trio.CancelScope()

    async def wait_and_leave() -> None:
        with leaving:
            await take(admission)

    async with admission.permits():
        nursery.start_soon(wait_and_leave)
        await wait_all_tasks_blocked()
        leaving.cancel()
        await wait_all_tasks_blocked()
        assert sample(metrics, "admission_pending") == 0
    await take(admission)
    assert sample(metrics, "admission_total", result="admitted") == 2


@dataclass(frozen=True)
class Visit:
    """A completion that comes, may be left by its client, and may fail."""

    comes_at: int
    stays_s: int
    leaves_after_s: int | None
    fails: bool


VISITS = st.lists(
    st.builds(
        Visit,
        comes_at=st.integers(0, 10),
        stays_s=st.integers(0, 5),
        leaves_after_s=st.none() | st.integers(0, 8),
        fails=st.booleans(),
    ),
    max_size=25,
)


class GoneWrong(Exception):
    pass


@given(
    visits=VISITS,
    count=st.integers(1, 4),
    policy=st.sampled_from(["reject", "queue"]),
    longest_wait_s=st.sampled_from([0, 1, 4]),
)
def test_no_permit_is_ever_lost_or_made(visits: list[Visit], count: int, policy: str, longest_wait_s: int) -> None:
    async def main() -> None:
        metrics = Metrics()
        admission = Admission(
            Settings(max_concurrent=count, admission_policy=policy, queue_max_wait_s=longest_wait_s), metrics
        )
        running = 0
        most_running = 0

        async def stay(visit: Visit) -> None:
            nonlocal running, most_running
            async with admission.permits():
                running += 1
                most_running = max(most_running, running)
                try:
                    await trio.sleep(visit.stays_s)
                    if visit.fails:
                        raise GoneWrong
                finally:
                    running -= 1

        async def come(visit: Visit) -> None:
            await trio.sleep(visit.comes_at)
            longest = math.inf if visit.leaves_after_s is None else visit.leaves_after_s
            with trio.move_on_after(longest):
                with suppress(Saturated, GoneWrong):
                    await stay(visit)

        async with trio.open_nursery() as nursery:
            for visit in visits:
                nursery.start_soon(come, visit)
        assert most_running <= count
        assert sample(metrics, "admission_pending") == 0
        async with AsyncExitStack() as stack:
            for _ in range(count):
                with trio.fail_after(0):
                    await stack.enter_async_context(admission.permits())

    trio.run(main, clock=MockClock(autojump_threshold=0))


async def test_what_runs_and_what_waits_is_told(metrics: Metrics, nursery: trio.Nursery) -> None:
    admission = queueing(metrics, 2)
    until = trio.Event()
    for _ in range(3):
        nursery.start_soon(hold, admission, until)
    await wait_all_tasks_blocked()

    assert (admission.running, admission.waiting) == (2, 1)
    until.set()
    await wait_all_tasks_blocked()
    assert (admission.running, admission.waiting) == (0, 0)
