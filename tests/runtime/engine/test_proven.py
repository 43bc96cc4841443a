"""What the probe found is asked for once for each machine, model and shape; a file that lies or is torn costs nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from runtime.engine.probe import RowSizes
from runtime.engine.proven import first_proven, proven
from runtime.slab import SlabSpec
from tests.runtime.engine.test_probe import SPEC

SIZES = RowSizes((1, 2, 32), (4, 32))


class Probe:
    def __init__(self, found: RowSizes | None = SIZES) -> None:
        self.count = 0
        self._found = found

    def __call__(self, spec: SlabSpec) -> RowSizes | None:
        self.count += 1
        return self._found


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_what_was_found_is_not_looked_for_again(home: Path) -> None:
    probe = Probe()

    assert [proven("a model", SPEC, probe) for _ in range(3)] == [SIZES] * 3
    assert probe.count == 1


def test_another_model_shape_or_thread_count_is_looked_for(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = Probe()
    proven("a model", SPEC, probe)
    proven("another", SPEC, probe)
    proven("a model", replace(SPEC, window=301), probe)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    proven("a model", SPEC, probe)

    assert probe.count == 4


def test_the_first_shape_for_which_sizes_are_found_is_taken_and_one_layer_of_it_is_probed(home: Path) -> None:
    asked: list[SlabSpec] = []

    def only_small_tiles(spec: SlabSpec) -> RowSizes | None:
        asked.append(spec)
        return SIZES if spec.row_tile == 32 else None

    specs = [replace(SPEC, layers=5, row_tile=tile) for tile in (256, 32, 16)]

    assert first_proven(specs, "a model", only_small_tiles) == (specs[1], SIZES)
    assert asked == [replace(spec, layers=1) for spec in specs[:2]]
    assert first_proven(specs[:1], "a model", only_small_tiles) is None


def test_that_nothing_was_found_is_not_kept(home: Path) -> None:
    assert proven("a model", SPEC, Probe(None)) is None
    assert proven("a model", SPEC, Probe()) == SIZES


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"a": 1}'])
def test_a_file_that_says_nothing_is_written_anew(home: Path, content: bytes) -> None:
    file = home / "perennial" / "proven.json"
    file.parent.mkdir()
    file.write_bytes(content)
    probe = Probe()

    assert [proven("a model", SPEC, probe) for _ in range(2)] == [SIZES] * 2
    assert probe.count == 1


def test_where_no_file_can_be_written_it_is_looked_for_each_time(home: Path) -> None:
    (home / "perennial").write_text("in the way")
    probe = Probe()

    assert [proven("a model", SPEC, probe) for _ in range(2)] == [SIZES] * 2
    assert probe.count == 2
