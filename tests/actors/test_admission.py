"""Permits for completions: who gets one, who waits, and that none is ever lost."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from actors.admission import Admission
from runtime import Settings
from runtime.errors import InvalidRequest, Saturated
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


async def take(admission: Admission, count: int = 1) -> None:
    """Takes permits and gives them back."""
    async with admission.permits(count):
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


@pytest.mark.parametrize("make", [rejecting, queueing])
async def test_more_permits_than_there_are_is_refused_at_once_and_for_good(
    make: Callable[[Metrics, int], Admission], metrics: Metrics
) -> None:
    admission = make(metrics, 3)

    with pytest.raises(InvalidRequest, match="n is 4") as caught:
        await take(admission, 4)

    assert caught.value.param == "n"
    assert sample(metrics, "admission_total", result="rejected") == 0
    await take(admission, 3)


async def test_a_newcomer_does_not_take_the_free_permit_of_one_that_waits_for_several(
    metrics: Metrics, nursery: trio.Nursery
) -> None:
    admission = queueing(metrics, 2)
    served: list[str] = []

    async def wait(name: str, count: int) -> None:
        async with admission.permits(count):
            served.append(name)

    async with admission.permits():
        nursery.start_soon(wait, "both", 2)
        await wait_all_tasks_blocked()
        nursery.start_soon(wait, "one", 1)
        await wait_all_tasks_blocked()
        assert served == []
        assert sample(metrics, "admission_pending") == 2
    await wait_all_tasks_blocked()
    assert served == ["both", "one"]


async def test_one_that_leaves_half_way_gives_back_what_it_had_taken(metrics: Metrics, nursery: trio.Nursery) -> None:
    admission = queueing(metrics, 3)
    leaving = trio.CancelScope()
    served: list[str] = []

    async def wait_and_leave() -> None:
        with leaving:
            await take(admission, 3)

    async def wait() -> None:
        async with admission.permits(2):
            served.append("next")

    async with admission.permits():
        nursery.start_soon(wait_and_leave)
        await wait_all_tasks_blocked()
        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        assert served == []
        leaving.cancel()
        await wait_all_tasks_blocked()
        assert served == ["next"]
        assert sample(metrics, "admission_pending") == 0
    await take(admission, 3)


async def test_one_that_has_waited_its_longest_half_way_gives_back_what_it_had_taken(
    metrics: Metrics, autojump_clock: MockClock
) -> None:
    admission = queueing(metrics, 3, longest_wait_s=7)
    async with admission.permits():
        with pytest.raises(Saturated, match="7 s"):
            await take(admission, 3)
        with trio.fail_after(0):
            await take(admission, 2)
        assert sample(metrics, "admission_total", result="timed_out") == 1
        assert sample(metrics, "admission_pending") == 0
    await take(admission, 3)


@dataclass(frozen=True, eq=False)
class Visit:
    """A completion that comes and wants permits, may be left by its client, and may fail."""

    comes_at: int
    wants: int
    stays_s: int
    leaves_after_s: int | None
    fails: bool


VISITS = st.lists(
    st.builds(
        Visit,
        comes_at=st.integers(0, 10),
        wants=st.integers(1, 5),
        stays_s=st.integers(0, 5),
        leaves_after_s=st.none() | st.integers(0, 8),
        fails=st.booleans(),
    ),
    max_size=25,
)


class GoneWrong(Exception):
    pass


class Hall:
    """An admission with its visitors, who see that what its docstring promises is kept."""

    def __init__(self, count: int, policy: str, longest_wait_s: int) -> None:
        settings = Settings(max_concurrent=count, admission_policy=policy, queue_max_wait_s=longest_wait_s)
        self.metrics = Metrics()
        self.admission = Admission(settings, self.metrics)
        self._count = count
        self._is_queue = policy == "queue"
        self._longest_wait_s = longest_wait_s or math.inf
        # Each with the moment in which its client leaves or its wait has been the longest. Who goes in this moment may be
        # passed: that it has gone is known here a little later.
        self._line: dict[Visit, float] = {}
        self._taken = 0

    async def come(self, visit: Visit) -> None:
        await trio.sleep(visit.comes_at)
        with trio.move_on_after(math.inf if visit.leaves_after_s is None else visit.leaves_after_s) as leaving:
            if visit.wants > self._count:
                with pytest.raises(InvalidRequest):
                    await take(self.admission, visit.wants)
            else:
                with suppress(GoneWrong):
                    await self._stay(visit, leaving.deadline)

    async def _stay(self, visit: Visit, leaves_at: float) -> None:
        # From here to its place in the line there is no checkpoint, unless it leaves in this moment and has no place.
        self._line[visit] = min(leaves_at, trio.current_time() + self._longest_wait_s)
        try:
            async with self.admission.permits(visit.wants):
                now = trio.current_time()
                first = next(each for each, goes_at in self._line.items() if each is visit or goes_at > now)
                assert first is visit, "somebody was overtaken"
                del self._line[visit]
                self._taken += visit.wants
                assert self._taken <= self._count
                try:
                    await trio.sleep(visit.stays_s)
                    if visit.fails:
                        raise GoneWrong
                finally:
                    self._taken -= visit.wants
        except Saturated:
            assert self._is_queue or self._taken + visit.wants > self._count, "refused for nothing"
        finally:
            self._line.pop(visit, None)

    async def watch(self) -> None:
        """Looks between the whole seconds, in which nothing happens: whoever is first in the line waits for a reason."""
        await trio.sleep(0.5)
        while True:
            assert sample(self.metrics, "admission_pending") == len(self._line)
            assert not self._line or self._taken + next(iter(self._line)).wants > self._count, "a permit is lost"
            await trio.sleep(1)


@given(
    visits=VISITS,
    count=st.integers(1, 4),
    policy=st.sampled_from(["reject", "queue"]),
    longest_wait_s=st.sampled_from([0, 1, 4]),
)
def test_no_permit_is_ever_lost_or_made_and_nobody_is_overtaken(
    visits: list[Visit], count: int, policy: str, longest_wait_s: int
) -> None:
    async def main() -> None:
        hall = Hall(count, policy, longest_wait_s)
        async with trio.open_nursery() as watching:
            watching.start_soon(hall.watch)
            async with trio.open_nursery() as coming:
                for visit in visits:
                    coming.start_soon(hall.come, visit)
            watching.cancel_scope.cancel()
        with trio.fail_after(0):
            await take(hall.admission, count)

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
