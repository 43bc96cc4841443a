"""What a probe found is asked for once for each machine and subject; a file that lies or is torn costs nothing."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch

import runtime
from runtime.engine.findings import find_or_probe


class Probe:
    def __init__(self, holds: bool = True) -> None:
        self.count = 0
        self._holds = holds

    def __call__(self) -> bool:
        self.count += 1
        return self._holds


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("holds", [True, False])
def test_what_was_found_is_not_looked_for_again(home: Path, holds: bool) -> None:
    probe = Probe(holds)

    assert [find_or_probe("a linear", probe) for _ in range(3)] == [holds] * 3
    assert probe.count == 1


def test_another_subject_thread_count_or_kernel_class_is_looked_for(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = Probe()
    find_or_probe("a linear", probe)
    find_or_probe("another", probe)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    find_or_probe("a linear", probe)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    find_or_probe("a linear", probe)

    assert probe.count == 4


@pytest.mark.parametrize("library", ["numba", "llvmlite"])
def test_what_was_found_with_another_compiler_is_looked_for(
    home: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    probe = Probe()
    find_or_probe("a linear", probe)
    installed = home / "packages" / f"{library}-99.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text(f"Name: {library}\nVersion: 99\n")
    monkeypatch.syspath_prepend(str(installed.parent))
    find_or_probe("a linear", probe)

    assert probe.count == 2


@pytest.mark.parametrize("name", ["engine/exact.py", "slab.py", "slab_spec.py"])
def test_what_was_found_of_other_code_is_looked_for(home: Path, tmp_path: Path, name: str) -> None:
    """A release that draws up its graphs in another way has not been tried by what the one before found."""
    code = tmp_path / "code"
    shutil.copytree(Path(runtime.__file__).parent, code / "runtime")
    program = (
        "from runtime.engine.findings import find_or_probe\n"
        "find_or_probe('a linear', lambda: bool(print('tried')) or True)"
    )

    def tried() -> bool:
        environment = os.environ | {"PYTHONPATH": str(code)}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, cwd=tmp_path, check=True, capture_output=True
        )
        return b"tried" in done.stdout

    assert [tried(), tried()] == [True, False]
    with (code / "runtime" / name).open("a") as source:
        source.write("# otherwise\n")
    assert tried()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"a": 1}'])
def test_a_file_that_says_nothing_is_written_anew(home: Path, content: bytes) -> None:
    file = home / "perennial" / "findings.json"
    file.parent.mkdir()
    file.write_bytes(content)
    probe = Probe()

    assert [find_or_probe("a linear", probe) for _ in range(2)] == [True] * 2
    assert probe.count == 1


def test_without_a_home_nothing_is_kept_and_nothing_is_written(tmp_path: Path) -> None:
    program = (
        "import os; os.getuid = lambda: 54321\n"
        "from runtime.engine.findings import find_or_probe\n"
        "print([find_or_probe('a linear', lambda: True) for _ in range(2)])"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    paths = [str(Path(__file__).parents[3]), *filter(None, [environment.get("PYTHONPATH")])]
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=True,
    )

    assert run.stdout.strip() == "[True, True]"
    assert list(tmp_path.iterdir()) == []


def test_where_no_file_can_be_written_it_is_looked_for_each_time(home: Path) -> None:
    (home / "perennial").write_text("in the way")
    probe = Probe()

    assert [find_or_probe("a linear", probe) for _ in range(2)] == [True] * 2
    assert probe.count == 2


def test_a_full_disk_keeps_no_piece_of_a_file(home: Path) -> None:
    find_or_probe("a linear", Probe())
    before = {file.name: file.read_bytes() for file in (home / "perennial").iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, hard))
    try:
        find_or_probe("another", Probe())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert {file.name: file.read_bytes() for file in (home / "perennial").iterdir()} == before


def test_servers_that_start_together_keep_what_each_found(home: Path) -> None:
    count = 16
    barrier = Barrier(count)

    def met() -> bool:
        barrier.wait()
        return True

    with ThreadPoolExecutor(count) as pool:
        [*pool.map(lambda name: find_or_probe(f"linear {name}", met), range(count))]

    assert len(json.loads((home / "perennial" / "findings.json").read_text())) == count


def test_where_files_cannot_be_locked_what_was_found_is_kept(home: Path) -> None:
    (home / "perennial" / "findings.lock").mkdir(parents=True)
    probe = Probe()

    assert [find_or_probe("a linear", probe) for _ in range(2)] == [True] * 2
    assert probe.count == 1
