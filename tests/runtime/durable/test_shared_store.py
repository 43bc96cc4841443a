"""A store that servers share, called as actors call it."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from runtime.durable import SharedStore, Terms
from runtime.durable.shared import SharedDurable
from runtime.errors import SessionNotFound
from tests.actors.test_durable import ENGINE, MODEL
from tests.runtime.durable.buckets import FaultyObjects

TERMS = Terms(frozenset({2}))


@pytest.fixture
def objects() -> FaultyObjects:
    return FaultyObjects()


@pytest.fixture
def clock() -> Iterator[float]:
    """Each time is an hour after the one before."""
    return (hours * 3600.0 for hours in range(1000))


@pytest.fixture
def store(objects: FaultyObjects, clock: Iterator[float]) -> SharedStore:
    return SharedStore(objects, MODEL, ENGINE, lease_s=1e9, now=lambda: next(clock))


def asleep(store: SharedStore) -> str:
    """A session that this server was the last to hold."""
    durable = store.create(TERMS)
    durable.record(0, array("I", [1]))
    durable.close()
    return durable.id


def test_sessions_that_slept_too_long_are_deleted(store: SharedStore, objects: FaultyObjects) -> None:
    for _ in range(3):
        asleep(store)

    assert store.expire(60) == 3
    assert not store.sleeping()
    assert not objects.list("sessions/")


def test_a_session_that_is_woken_while_older_ones_are_deleted_is_kept(
    store: SharedStore, objects: FaultyObjects
) -> None:
    first, second = asleep(store), asleep(store)
    woken: list[SharedDurable] = []

    def wake_the_second(name: str, key: str) -> None:
        if first in key and not woken:
            objects.heal()
            woken.append(store.wake(second)[0])
            woken[0].record(1, array("I", [5]))

    objects.fault = wake_the_second

    assert store.expire(60) == 1

    woken[0].record(2, array("I", [6]))
    woken[0].close()
    assert store.wake(second)[1].tolist() == [1, 5, 6]


def test_who_wakes_a_session_that_is_being_deleted_waits_and_does_not_find_it(
    store: SharedStore, objects: FaultyObjects
) -> None:
    session_id = asleep(store)
    asked: list[Future[object]] = []
    with ThreadPoolExecutor(1) as other:

        def wake_it_too(name: str, key: str) -> None:
            if name == "create" and not asked:
                asked.append(other.submit(store.wake, session_id))

        objects.fault = wake_it_too

        assert store.expire(60) == 1
        with pytest.raises(SessionNotFound):
            asked[0].result()
    assert not objects.list("sessions/")
