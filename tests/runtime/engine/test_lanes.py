"""Where what numba compiles is kept."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis.strategies import floats, integers, lists
from numba import config

import runtime
from runtime.engine.lanes import LANES, full, kernel, largest, load, store


@kernel
def largest_of(numbers: Any) -> Any:
    return largest(load(numbers, 0))


@given(lists(floats(width=32, allow_nan=False), min_size=LANES, max_size=LANES), integers(0, LANES - 1))
def test_the_largest_of_some_is_that_of_all_of_them_that_are_numbers(numbers: list[float], place: int) -> None:
    array = np.array(numbers, np.float32)
    assert largest_of(array) == array.max()

    array[place] = np.nan
    assert largest_of(array) == np.nanmax(array)


def test_a_kernel_that_cannot_be_kept_is_compiled_each_time() -> None:
    scope: dict[str, Any] = {"full": full, "store": store}
    # numba keeps nothing of what has no file.
    exec("def fill(array, number):\n    store(array, 1, full(number))", scope)
    array = np.zeros(18, np.float32)

    kernel(scope["fill"])(array, np.float32(3))

    assert array.tolist() == [0, *[3] * 16, 0]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Our folder in the cache, where nothing is yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "perennial"


def new_kernel(folder: Path) -> Any:
    """A kernel that calls another one, as a new process has it."""
    source = folder / "source.py"
    source.write_text(
        "@kernel\ndef put(array, number):\n    store(array, 1, full(number))\n"
        "@kernel\ndef fill(array, number):\n    put(array, number)\n"
    )
    scope: dict[str, Any] = {"full": full, "store": store, "kernel": kernel}
    exec(compile(source.read_text(), source, "exec"), scope)
    return scope["fill"]


def called(fill: Any) -> Any:
    array = np.zeros(18, np.float32)
    fill(array, np.float32(3))
    assert array.tolist() == [0, *[3] * 16, 0]
    return fill


def started(folder: Path) -> Any:
    return called(new_kernel(folder))


def was_compiled(fill: Any) -> bool:
    return not fill.stats.cache_hits


def test_a_kernel_is_kept_in_the_users_cache_and_not_beside_its_source(cache: Path, tmp_path: Path) -> None:
    before = config.CACHE_DIR

    assert [was_compiled(started(tmp_path)) for _ in range(2)] == [True, False]
    assert [*cache.glob("kernels/*/**/*.nbi")]
    assert not [*tmp_path.glob("__pycache__/*")]
    assert before == config.CACHE_DIR


PREPARING = """
import sys
from runtime.engine.row_attention import prepare_kernels
from runtime.slab_spec import SlabSpec

prepare_kernels(SlabSpec(layers=1, kv_heads=1, head_dim=32, sink=0, window=48, row_tile=16, dtype="float32"))
print("numba.np.linalg" in sys.modules)
"""


def test_a_process_that_finds_its_kernels_does_not_load_all_that_numba_compiles_with(cache: Path) -> None:
    run = [
        subprocess.run([sys.executable, "-c", PREPARING], capture_output=True, text=True, check=True) for _ in range(2)
    ]

    assert [one.stdout for one in run] == ["True\n", "False\n"]


@pytest.mark.parametrize("kept", ["nothing", "half"])
@pytest.mark.parametrize("of", ["fill*.nbi", "fill*.nbc", "put*.nb?"])
def test_a_kernel_whose_file_is_damaged_is_compiled_and_kept_anew(
    cache: Path, tmp_path: Path, of: str, kept: str
) -> None:
    started(tmp_path)
    damaged = [*cache.glob(f"kernels/*/**/source.{of}")]
    assert damaged
    # The inner kernel's files are read only where the outer one is compiled.
    for file in {*damaged, *(cache.glob("kernels/*/**/source.fill*") if of.startswith("put") else [])}:
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2] if kept == "half" else b"")

    assert [was_compiled(started(tmp_path)) for _ in range(2)] == [True, False]


@pytest.mark.parametrize("kept", ["nothing", "a file of no bytes"])
def test_a_kernel_is_compiled_where_the_disk_is_full(cache: Path, tmp_path: Path, kept: str) -> None:
    if kept != "nothing":
        started(tmp_path)
        for file in cache.glob("kernels/*/**/*.nb?"):
            file.write_bytes(b"")
    fill = new_kernel(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        called(fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert was_compiled(fill)


def test_kernels_of_other_code_are_cleared_away(cache: Path, tmp_path: Path) -> None:
    """Numba knows a kernel by its own source alone, and not by those of the functions that it is made of."""
    code = shutil.copytree(Path(runtime.__file__).parent, tmp_path / "code" / "runtime")
    environment = os.environ | {"PYTHONPATH": str(code.parent)}

    def folders() -> set[str]:
        program = [sys.executable, "-c", "import runtime.engine.row_kernel"]
        subprocess.run(program, env=environment, cwd=tmp_path, check=True)
        return {one.name for one in (cache / "kernels").iterdir()}

    (cache / "kernels" / "of other code").mkdir(parents=True)
    found = [folders()]
    for name in ("lanes.py", "row_kernel.py"):
        with (code / "engine" / name).open("a") as source:
            source.write("# otherwise\n")
        found += [folders(), folders()]

    assert [len(one) for one in found] == [1] * 5
    assert found[1] == found[2]
    assert found[3] == found[4]
    assert len(set.union(*found)) == 3
