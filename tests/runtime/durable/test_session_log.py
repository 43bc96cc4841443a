"""A session's log in an object store: what was recorded is there, and of two who write it one fails."""

from __future__ import annotations

from array import array
from concurrent.futures import ThreadPoolExecutor

import pytest
from obstore.store import ObjectStore

from runtime.durable import HistoryIdentity, Terms
from runtime.durable.framing import CHECKSUM_BYTES, Damaged, Unknown, checksum
from runtime.durable.segments import MAGIC, VERSION
from runtime.durable.session_log import MOST_SEGMENTS, Lease, SessionLog, read_log
from runtime.errors import SessionMoved, SessionNotFound
from tests.runtime.durable.buckets import Fault, FaultyObjects

MODEL = HistoryIdentity("a model", 100)
TERMS = Terms(frozenset({2}), label="kept")
ID = "an-id-that-nobody-guesses"


def tokens(*token_ids: int) -> array[int]:
    return array("I", token_ids)


def created(objects: FaultyObjects, *token_ids: int, holder: str = "one") -> SessionLog:
    return SessionLog.create(objects, ID, MODEL, TERMS, holder, tokens(*token_ids))


def claimed(objects: FaultyObjects, holder: str, *, has_lapsed: bool = False) -> tuple[SessionLog, list[int]]:
    log, history = SessionLog.claim(objects, ID, MODEL, holder, lambda _: True, lambda _: has_lapsed)
    return log, history.tolist()


def test_what_was_recorded_is_read_by_the_next_holder(bucket: ObjectStore) -> None:
    one, two = FaultyObjects(bucket), FaultyObjects(bucket)
    log = created(one, 1, 2, 3)
    log.record(3, tokens(4, 5))
    log.record(4, tokens(6))
    log.release()

    again, history = claimed(two, "two")

    assert history == [1, 2, 3, 4, 6]
    assert (again.terms, again.epoch, again.taken_from) == (TERMS, 2, "one")


def test_a_session_that_is_held_is_refused_until_its_lease_has_lapsed(bucket: ObjectStore) -> None:
    one, two = FaultyObjects(bucket), FaultyObjects(bucket)
    created(one).record(0, tokens(1))

    with pytest.raises(SessionMoved, match="another server holds"):
        claimed(two, "two")

    assert claimed(two, "two", has_lapsed=True)[1] == [1]


def test_of_servers_that_claim_a_session_at_once_one_has_it(bucket: ObjectStore) -> None:
    log = created(FaultyObjects(bucket), 1, 2, 3)
    log.release()

    def has_it(holder: str) -> bool:
        try:
            return claimed(FaultyObjects(bucket), holder)[1] == [1, 2, 3]
        except SessionMoved:
            return False

    with ThreadPoolExecutor() as servers:
        have_it = list(servers.map(has_it, ["two", "three", "four"]))

    assert have_it.count(True) == 1


def test_what_others_left_beside_a_session_is_no_part_of_it(bucket: ObjectStore) -> None:
    objects = FaultyObjects(bucket)
    created(objects, 1).release()
    objects.put(f"sessions/{ID}/log/notes.txt", b"mine")

    assert claimed(objects, "two")[1] == [1]


def test_the_lease_says_who_holds_a_session_since_when(bucket: ObjectStore) -> None:
    one = FaultyObjects(bucket)
    log = created(one)
    log.record(0, tokens(1))
    seen: list[Lease] = []

    def has_lapsed(lease: Lease) -> bool:
        seen.append(lease)
        return False

    with pytest.raises(SessionMoved):
        SessionLog.claim(one, ID, MODEL, "two", lambda _: True, has_lapsed)
    log.release()

    assert [(lease.holder, lease.epoch, lease.is_released) for lease in seen] == [("one", 1, False)]
    assert read_log(one, ID, MODEL).lease.is_released


def test_a_session_that_was_made_and_not_used_is_anybodys_and_its_makers_late_write_is_kept_out() -> None:
    one = FaultyObjects()
    two = FaultyObjects(one.store)
    maker = created(one, 1, 2)
    history = tokens(1, 2)

    log, found = claimed(two, "two")
    for _ in range(MOST_SEGMENTS):
        log.record(len(history), tokens(3))
        history.append(3)
    log.gather(history)

    assert found == [1, 2]
    with pytest.raises(SessionMoved):
        maker.record(2, tokens(9))


@pytest.mark.parametrize("write", ["record", "release", "end", "check"])
def test_who_lost_the_lease_can_do_nothing_more(bucket: ObjectStore, write: str) -> None:
    one, two = FaultyObjects(bucket), FaultyObjects(bucket)
    log = created(one, 1)
    taken, _ = claimed(two, "two", has_lapsed=True)
    taken.record(1, tokens(2))

    writes = {"record": lambda: log.record(1, tokens(9)), "release": log.release, "end": log.end, "check": log.check}
    for _ in range(2):
        with pytest.raises(SessionMoved, match=r"^moved"):
            writes[write]()

    assert read_log(two, ID, MODEL).history.tolist() == [1, 2]


def test_a_write_that_comes_late_finds_its_place_taken_even_when_all_else_was_made_one_object() -> None:
    one = FaultyObjects()
    two = FaultyObjects(one.store)
    log = created(one, 1)
    one.fail_next(Fault.LATE)
    with pytest.raises(TimeoutError):
        log.record(1, tokens(9))
    taken, history = claimed(two, "two", has_lapsed=True)
    for number in range(MOST_SEGMENTS):
        taken.record(1 + number, tokens(7))
        history.append(7)
    taken.gather(array("I", history))

    one.arrive()
    with pytest.raises(SessionMoved):
        log.record(1, tokens(9))

    assert len([key for name, key in two.operations if name == "delete"]) == 1
    assert read_log(two, ID, MODEL).history.tolist() == history


def of_a_newer_format(content: bytes) -> bytes:
    """The same segment as a server with the next format would write it."""
    newer = bytearray(content[:-CHECKSUM_BYTES])
    newer[len(MAGIC) : len(MAGIC) + 4] = (VERSION + 1).to_bytes(4, "little")
    return bytes(newer) + checksum(bytes(newer))


@pytest.mark.parametrize("write", ["record", "release", "end", "check"])
def test_who_lost_the_session_to_a_server_with_a_newer_format_is_told_so(write: str) -> None:
    one = FaultyObjects()
    log = created(one, 1)
    claimed(FaultyObjects(one.store), "two", has_lapsed=True)
    claim = f"sessions/{ID}/log/{1:012d}"
    one.put(claim, of_a_newer_format(one.read(claim)))

    writes = {"record": lambda: log.record(1, tokens(9)), "release": log.release, "end": log.end, "check": log.check}
    with pytest.raises(SessionMoved, match="format 2"):
        writes[write]()


@pytest.mark.parametrize("then", [[2, 3], [8, 8]], ids=["others", "the same"])
@pytest.mark.parametrize("fault", Fault)
def test_a_write_whose_answer_was_lost_gives_way_to_what_is_written_then(
    bucket: ObjectStore, fault: Fault, then: list[int]
) -> None:
    objects = FaultyObjects(bucket)
    log = created(objects, 1)
    objects.fail_next(fault)
    with pytest.raises(TimeoutError):
        log.record(1, tokens(8, 8))
    objects.arrive()

    log.record(1, tokens(*then))
    log.release()

    assert claimed(objects, "two")[1] == [1, *then]


@pytest.mark.parametrize("fault", Fault)
def test_what_was_refused_is_not_there_once_the_session_was_given_up(bucket: ObjectStore, fault: Fault) -> None:
    objects = FaultyObjects(bucket)
    log = created(objects, 1)
    objects.fail_next(fault)
    with pytest.raises(TimeoutError):
        log.record(1, tokens(8))
    objects.arrive()

    log.check()
    log.release()

    assert claimed(objects, "two")[1] == [1]


def test_many_segments_become_one_object(bucket: ObjectStore) -> None:
    objects = FaultyObjects(bucket)
    log = created(objects)
    history = tokens()
    for number in range(3 * MOST_SEGMENTS):
        log.record(number, tokens(number % 100))
        history.append(number % 100)
        log.gather(history)
    log.release()

    assert len(objects.list(f"sessions/{ID}/")) < MOST_SEGMENTS
    assert claimed(objects, "two")[1] == history.tolist()


def test_a_session_that_moves_often_keeps_few_objects_when_it_is_given_up_each_time() -> None:
    objects = FaultyObjects()
    created(objects, 1).release()
    for number in range(2 * MOST_SEGMENTS):
        log, _ = claimed(objects, f"holder {number}")
        log.release()

    assert len(objects.list(f"sessions/{ID}/")) < MOST_SEGMENTS + 3


def test_of_a_session_that_has_ended_nothing_is_left(bucket: ObjectStore) -> None:
    objects = FaultyObjects(bucket)
    log = created(objects, 1)
    log.end()
    with pytest.raises(SessionNotFound):
        claimed(objects, "two")
    log.delete()

    assert objects.list("sessions/") == []
    with pytest.raises(SessionNotFound):
        claimed(objects, "two")


def test_of_a_session_that_was_taken_from_its_holder_the_end_keeps_that_one_out(bucket: ObjectStore) -> None:
    one, two = FaultyObjects(bucket), FaultyObjects(bucket)
    stale = created(one, 1)
    taken, _ = claimed(two, "two", has_lapsed=True)
    taken.record(1, tokens(2))
    taken.end()
    taken.delete()

    with pytest.raises(SessionMoved):
        stale.record(1, tokens(9))
    with pytest.raises(SessionNotFound):
        claimed(two, "three", has_lapsed=True)


@pytest.mark.parametrize("damage", ["flip", "cut", "swap", "missing"])
def test_damage_is_told_from_what_was_written(bucket: ObjectStore, damage: str) -> None:
    objects = FaultyObjects(bucket)
    log = created(objects, 1, 2)
    log.record(2, tokens(3))
    log.record(3, tokens(4))
    log.release()
    key, other = (f"sessions/{ID}/log/{number:012d}" for number in (1, 2))
    content = objects.read(key)
    match damage:
        case "flip":
            objects.put(key, content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
        case "cut":
            objects.put(key, content[:-1])
        case "swap":
            objects.put(key, objects.read(other))
        case _:
            objects.delete([key])

    with pytest.raises(Damaged):
        claimed(objects, "two")


def test_a_session_of_another_model_stays_as_it_is(bucket: ObjectStore) -> None:
    objects = FaultyObjects(bucket)
    created(objects, 1).release()

    with pytest.raises(Unknown):
        SessionLog.claim(objects, ID, HistoryIdentity("another", 100), "two", lambda _: True, lambda _: False)

    assert claimed(objects, "two")[1] == [1]
