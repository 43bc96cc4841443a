"""Threads that work through steps together."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import numpy as np
import pytest
from numba import njit

from runtime.engine.crew import Crew, count_up, wait_for
from runtime.engine.machine import Level, hardware_level

pytestmark = pytest.mark.skipif(hardware_level() < Level.AVX2, reason="waiting is of instructions of x86")

STEPS, PARTS, THREADS = 40, 7, 8


@njit(nogil=True)  # type: ignore[untyped-decorator]
def work_through(counters: Any, order: Any, tickets: Any) -> None:
    for number in range(STEPS):
        part = count_up(counters, 2 * number)
        while part < PARTS:
            order[number, part] = count_up(tickets, 0)
            count_up(counters, 2 * number + 1)
            part = count_up(counters, 2 * number)
        wait_for(counters, 2 * number + 1, PARTS)


def began() -> tuple[Any, Any, Any]:
    return np.zeros(2 * STEPS, np.int64), np.full((STEPS, PARTS), -1), np.zeros(1, np.int64)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_each_part_is_done_once_and_no_step_begins_before_the_one_before_is_whole(threads: int) -> None:
    crew = Crew(threads)
    for _ in range(50):
        counters, order, tickets = began()

        crew.run(partial(work_through, counters, order, tickets), THREADS)

        assert sorted(order.flatten()) == list(range(STEPS * PARTS))
        assert np.all(order[:-1].max(axis=1) < order[1:].min(axis=1))


def test_a_thread_that_comes_after_all_is_done_does_nothing() -> None:
    counters, order, tickets = began()
    work_through(counters, order, tickets)
    before = order.copy()

    work_through(counters, order, tickets)

    assert np.array_equal(order, before)
    assert tickets[0] == STEPS * PARTS


def test_a_thread_that_does_not_wake_holds_nobody_up() -> None:
    crew = Crew(2)
    is_held, may_go_on = threading.Event(), threading.Event()

    def hold() -> None:
        is_held.set()
        may_go_on.wait()

    holder = threading.Thread(target=crew.run, args=[hold, THREADS])
    holder.start()
    # By now the crew's own thread has it too, or has it before what comes next.
    is_held.wait()
    counters, order, tickets = began()

    crew.run(partial(work_through, counters, order, tickets), THREADS)

    may_go_on.set()
    holder.join()
    assert tickets[0] == STEPS * PARTS


def test_when_work_fails_here_no_other_thread_goes_on_after_it() -> None:
    crew = Crew(2)
    own, is_elsewhere = threading.get_ident(), threading.Event()
    ended = []

    def fail_here() -> None:
        if threading.get_ident() == own:
            is_elsewhere.wait()
            raise MemoryError
        is_elsewhere.set()
        ended.append(True)

    with pytest.raises(MemoryError):
        crew.run(fail_here, THREADS)

    assert ended


def test_an_error_of_another_thread_is_raised_here() -> None:
    crew = Crew(2)
    own, is_elsewhere = threading.get_ident(), threading.Event()

    def fail_elsewhere() -> None:
        if threading.get_ident() == own:
            is_elsewhere.wait()
        else:
            is_elsewhere.set()
            raise MemoryError

    with pytest.raises(MemoryError):
        crew.run(fail_elsewhere, THREADS)
