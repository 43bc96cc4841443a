"""The journal: what was acknowledged is there, what was refused is not, and a file that was touched is never believed."""

from __future__ import annotations

import random
from array import array
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.durable import HistoryIdentity, Terms
from runtime.durable.files import Files
from runtime.durable.framing import Damaged, Unknown
from runtime.durable.journal import Journal
from runtime.events import Overflow
from tests.runtime.durable.faults import FAULTS, FaultyFiles, Killed

MODEL = HistoryIdentity("model", 1000)
TERMS = Terms(frozenset({2, 7}), Overflow.ERROR, "a label ✓")
NAME = "A" * 32 + ".history"

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.lists(st.integers(0, 999), max_size=20)),
        st.tuples(st.just("take back"), st.integers(0, 5)),
        st.tuples(st.just("use"), st.just(0)),
        st.tuples(st.just("reopen"), st.just(0)),
    ),
    max_size=25,
)
FAULT = st.tuples(st.sampled_from([*FAULTS, None]), st.integers(0, 12), st.integers(1, 3), st.floats(0, 1))


def is_token(history: array[int]) -> bool:
    return not history or max(history) < MODEL.vocabulary


def opened(path: Path, files: Files | None = None) -> tuple[Journal, list[int]]:
    journal, history = Journal.open(files or Files(), path, MODEL, is_token)
    return journal, history.tolist()


def opened_in_the_end(path: Path, files: Files) -> tuple[Journal, list[int]]:
    """As often as it takes: what fails to be read is there still."""
    while True:
        with suppress(OSError):
            return opened(path, files)


def created(path: Path, history: list[int], files: Files | None = None) -> Journal:
    return Journal.create(files or Files(), path, MODEL, TERMS, array("I", history), 1, 2.5)


@settings(max_examples=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=OPERATIONS, fault=st.none() | FAULT)
def test_what_was_acknowledged_is_there_whatever_fails_and_whenever_it_is_killed(
    tmp_path: Path, operations: list[tuple[str, int | list[int]]], fault: tuple[int | None, int, int, float] | None
) -> None:
    path, files = tmp_path / NAME, FaultyFiles()
    journal, history = created(path, [5], files), [5]
    if fault:
        files.fail_next(*fault)
    told = [list(history)]
    try:
        for name, value in operations:
            if name == "reopen":
                journal.close()
                journal, found = opened_in_the_end(path, files)
                assert found in told
                history = found
            elif name == "append":
                assert isinstance(value, list)
                # Killed while it was written, it may be there or not.
                told = [list(history), history + value]
                try:
                    journal.record(len(history), array("I", value))
                except OSError:
                    pass
                else:
                    history += value
            elif name == "use":
                with suppress(OSError):
                    journal.mark_used(9, 9.0)
            else:
                assert isinstance(value, int)
                shorter = history[: max(1, len(history) - value)]
                told = [list(history), shorter]
                journal.take_back(len(shorter))
                history = shorter
            told = [*told, list(history)]
    except Killed:
        files.heal()
        _, found = opened(path)
        assert found in told
        return
    files.heal()
    journal.close()
    again, found = opened(path)
    # Tokens that were taken back while nothing could be written come back with a kill alone.
    assert found == history
    again.close()


def test_terms_and_use_are_known_without_reading_the_history(tmp_path: Path) -> None:
    journal = created(tmp_path / NAME, [1, 2, 3])
    journal.mark_used(77, 1234.5)
    journal.close()

    head = Journal.peek(Files(), tmp_path / NAME, MODEL)

    assert (head.terms, head.tip.length, head.tip.use, head.tip.used_at) == (TERMS, 3, 77, 1234.5)


def written(path: Path, pieces: int) -> tuple[bytes, list[int]]:
    """A journal's file, and the history in it."""
    choice, history = random.Random(pieces), [3]
    journal = created(path, history)
    for _ in range(pieces):
        more = [choice.randrange(1000) for _ in range(choice.randint(1, 9))]
        journal.record(len(history), array("I", more))
        history += more
    journal.close()
    return path.read_bytes(), history


@pytest.mark.parametrize("pieces", [0, 1, 12])
def test_no_flipped_bit_goes_unnoticed(tmp_path: Path, pieces: int) -> None:
    path = tmp_path / NAME
    whole, history = written(path, pieces)
    for byte in range(len(whole)):
        changed = bytearray(whole)
        changed[byte] ^= 1 << byte % 8
        path.write_bytes(changed)
        try:
            journal, found = opened(path)
        except (Damaged, Unknown):
            continue
        journal.close()
        assert found == history


@pytest.mark.parametrize("pieces", [0, 1, 12])
def test_a_file_that_was_cut_anywhere_is_damaged(tmp_path: Path, pieces: int) -> None:
    path = tmp_path / NAME
    whole, _ = written(path, pieces)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises((Damaged, Unknown)):
            opened(path)


def test_a_file_that_was_zeroed_in_part_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / NAME
    whole, history = written(path, 12)
    choice = random.Random(0)
    for _ in range(200):
        first = choice.randrange(len(whole))
        changed = bytearray(whole)
        changed[first : first + 64] = bytes(len(changed[first : first + 64]))
        path.write_bytes(changed)
        try:
            journal, found = opened(path)
        except (Damaged, Unknown):
            continue
        journal.close()
        assert found == history


def test_another_sessions_file_is_not_believed(tmp_path: Path) -> None:
    created(tmp_path / NAME, [1]).close()
    other = tmp_path / ("B" * 32 + ".history")
    (tmp_path / NAME).rename(other)

    with pytest.raises(Damaged, match="another session"):
        opened(other)


def test_another_models_history_is_unknown_and_one_with_strange_tokens_damaged(tmp_path: Path) -> None:
    created(tmp_path / NAME, [999]).close()

    with pytest.raises(Unknown, match="another model"):
        Journal.peek(Files(), tmp_path / NAME, HistoryIdentity("other", 1000))
    created(tmp_path / NAME, [1000]).close()
    with pytest.raises(Damaged, match="tokens that the model does not have"):
        opened(tmp_path / NAME)


def test_a_version_that_is_to_come_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.durable.journal.VERSION", 99)
    created(tmp_path / NAME, [1]).close()
    monkeypatch.undo()

    with pytest.raises(Unknown, match="format 99"):
        opened(tmp_path / NAME)


def test_a_journal_of_many_pieces_is_made_short_when_it_is_opened(tmp_path: Path) -> None:
    path = tmp_path / NAME
    journal, history = created(path, [1]), [1]
    for token in range(5000):
        journal.record(len(history), array("I", [token % 1000]))
        history.append(token % 1000)
    journal.close()
    long = path.stat().st_size

    again, found = opened(path)

    assert found == history
    assert path.stat().st_size < long / 4
    again.record(len(history), array("I", [4]))
    again.close()
    assert opened(path)[1] == [*history, 4]


def test_a_journal_that_cannot_be_made_leaves_nothing_behind(tmp_path: Path) -> None:
    for after in range(6):
        files = FaultyFiles()
        files.fail_next(FAULTS[0], after)
        try:
            created(tmp_path / NAME, [1, 2], files).close()
        except OSError:
            assert list(tmp_path.iterdir()) == []
        else:
            assert opened(tmp_path / NAME)[1] == [1, 2]
            (tmp_path / NAME).unlink()
