"""What every test of an engine runs on: each of the backends."""

from functools import partial

import pytest

from tests.runtime.engine import feeding


@pytest.fixture(scope="session", params=feeding.BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    if name == "mlx":
        pytest.importorskip("mlx_lm")
    return name


@pytest.fixture(scope="session")
def load(backend: str) -> feeding.Load:
    """Loads an engine, once for all tests that ask for the same."""
    return partial(feeding.load, backend=backend)
