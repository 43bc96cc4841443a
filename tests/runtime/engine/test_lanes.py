"""What numba compiles, where it has no place to keep it."""

from __future__ import annotations

from typing import Any

import numpy as np

from runtime.engine.lanes import full, kernel, store


def test_a_kernel_that_cannot_be_kept_is_compiled_each_time() -> None:
    scope: dict[str, Any] = {"full": full, "store": store}
    # numba keeps nothing of what has no file.
    exec("def fill(array, number):\n    store(array, 1, full(number))", scope)
    array = np.zeros(18, np.float32)

    kernel(scope["fill"])(array, np.float32(3))

    assert array.tolist() == [0, *[3] * 16, 0]
