"""Bundles: what was written is read or is told to be damaged; one appears whole or not at all; room is made for a new one."""

import os
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.bundles import Bundle, BundleDamaged, BundleName, let_go, new_bundle, remove_bundle
from tests.runtime.disks import set_disk

pytestmark = pytest.mark.usefixtures("roomy_disk")

NAME = BundleName("model", "state", "int8")
PARTS = {"head": b"\x07" * 10_000, "first": bytes(range(256)) * 40}
FACTS = {"widths": [1, 2], "scaling": 0.1}


def written(folder: Path, name: BundleName = NAME, facts: Mapping[str, object] = FACTS, most_bytes: int = 0) -> Path:
    with new_bundle(folder, most_bytes, lambda facts: facts.get("use", True)) as writer:
        for part, content in PARTS.items():
            assert writer.add(part, memoryview(content))[:] == content
        writer.finish(name, facts)
    return folder / str(name)


def opened(place: Path) -> Bundle:
    bundle = Bundle.open(place)
    assert bundle is not None
    return bundle


def folders(of: Path) -> set[Path]:
    return {one for one in of.iterdir() if one.is_dir()}


def held(bundle: Bundle) -> dict[str, bytes]:
    return {name: bundle.part(name)[:] for name in PARTS}


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.from_regex(r"\A[a-z][a-z0-9-]{0,9}\Z"), st.binary(min_size=1), max_size=4))
def test_what_was_written_is_read(parts: dict[str, bytes]) -> None:
    with TemporaryDirectory() as folder:
        with new_bundle(Path(folder), 0, bool) as writer:
            for name, content in parts.items():
                writer.add(name, memoryview(content))
            writer.finish(NAME, FACTS)
        bundle = opened(Path(folder) / str(NAME))

        assert dict(bundle.facts) == FACTS
        assert {name: bundle.part(name)[:] for name in parts} == parts


def test_a_part_that_was_let_go_is_read_again(tmp_path: Path) -> None:
    part = opened(written(tmp_path)).part("head")
    let_go(part)

    assert part[:] == PARTS["head"]


def test_one_that_is_not_there_is_none(tmp_path: Path) -> None:
    assert Bundle.open(tmp_path / "none") is None


def test_one_that_was_not_finished_leaves_nothing(tmp_path: Path) -> None:
    with suppress(KeyboardInterrupt), new_bundle(tmp_path, 0, bool) as writer:
        writer.add("head", memoryview(PARTS["head"]))
        raise KeyboardInterrupt

    assert not folders(tmp_path)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(part=st.sampled_from(["index.json", *PARTS]), at=st.floats(0, 0.999), bit=st.integers(0, 7), cut=st.booleans())
def test_a_flipped_bit_or_a_lost_end_is_found(part: str, at: float, bit: int, cut: bool) -> None:
    with TemporaryDirectory() as folder:
        file = written(Path(folder)) / part
        content = bytearray(file.read_bytes())
        place = int(at * len(content))
        if cut:
            del content[place:]
        else:
            content[place] ^= 1 << bit
        file.write_bytes(content)

        with pytest.raises(BundleDamaged):
            held(opened(file.parent))


@pytest.mark.parametrize("part", ["head", "index.json"])
def test_one_that_lacks_a_part_is_damaged(tmp_path: Path, part: str) -> None:
    (written(tmp_path) / part).unlink()

    with pytest.raises(BundleDamaged):
        Bundle.open(tmp_path / str(NAME))


def test_of_two_that_are_written_at_once_one_stays(tmp_path: Path) -> None:
    with new_bundle(tmp_path, 0, bool) as first:
        mapped = first.add("head", memoryview(PARTS["head"]))
        place = written(tmp_path)
        first.finish(NAME, FACTS)

    assert held(opened(place)) == PARTS
    assert mapped[:] == PARTS["head"]
    assert folders(tmp_path) == {place}


def test_those_of_another_state_are_cleared_away_unless_they_are_open(tmp_path: Path) -> None:
    old = written(tmp_path, BundleName("model", "before", "int8"))
    bundle = opened(old)
    kinds = ("other", "before", "int8"), ("model", "state", "int4"), ("model", "state", "int8")
    others = {written(tmp_path, BundleName(*kind)) for kind in kinds}
    assert folders(tmp_path) == {old, *others}

    del bundle
    remove_bundle(tmp_path / str(NAME))
    written(tmp_path)
    assert folders(tmp_path) == others


def test_those_of_no_use_go_when_another_is_written(tmp_path: Path) -> None:
    written(tmp_path, facts={"use": False})
    other = written(tmp_path, BundleName("other", "state", "int8"))

    assert folders(tmp_path) == {other}


def test_room_is_made_by_those_not_opened_for_longest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = [written(tmp_path, BundleName(f"model{number}", "state", "int8")) for number in range(3)]
    for age, place in enumerate(places):
        os.utime(place / "index.json", (1e9 - age, 1e9 - age))
    opened(places[2])
    size = sum(file.stat().st_size for file in places[0].iterdir())
    # A quarter of the disk is room for three.
    set_disk(monkeypatch, 14 * size, 14 * size)
    new = written(tmp_path, most_bytes=size)

    assert folders(tmp_path) == {places[0], places[2], new}


@pytest.mark.parametrize(
    ("total", "free"),
    [(2**40, 4 * 2**30), (20 * 2**30, 2**30), (2**40, 0), (2**12, 2**12)],
    ids=["a large one's last", "a twentieth", "a full one", "one too small"],
)
def test_what_would_fill_the_disk_is_refused_and_clears_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, total: int, free: int
) -> None:
    place = written(tmp_path)
    set_disk(monkeypatch, total, free)

    with pytest.raises(OSError, match="No space left"):
        written(tmp_path, BundleName("other", "state", "int8"), most_bytes=2**20)
    assert folders(tmp_path) == {place}


def test_a_part_that_would_fill_the_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_disk(monkeypatch, 2**40, 4 * 2**30)

    with pytest.raises(OSError, match="No space left"):
        written(tmp_path)
    assert not folders(tmp_path)


def test_of_a_large_disk_that_is_all_but_full_some_gigabytes_are_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_disk(monkeypatch, 2**40, 5 * 2**30)

    assert held(opened(written(tmp_path, most_bytes=2**29))) == PARTS


def test_a_part_that_cannot_be_written_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with small_files(1000), pytest.raises(OSError, match="File too large"):
        written(tmp_path)

    assert not folders(tmp_path)


@contextmanager
def small_files(most_bytes: int) -> Iterator[None]:
    """In the block no file can be written that is longer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
