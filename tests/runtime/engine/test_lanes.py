"""Where what numba compiles is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis.strategies import floats, integers, lists
from numba import config

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


def test_a_kernel_is_kept_in_the_users_cache_and_not_beside_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "source.py"
    source.write_text("def fill(array, number):\n    store(array, 1, full(number))")
    scope: dict[str, Any] = {"full": full, "store": store}
    exec(compile(source.read_text(), source, "exec"), scope)

    before = config.CACHE_DIR
    kernel(scope["fill"])(np.zeros(18, np.float32), np.float32(3))

    assert [*tmp_path.glob("cache/perennial/kernels/**/*.nbi")]
    assert not [*tmp_path.glob("__pycache__/*")]
    assert before == config.CACHE_DIR
