"""The bundled model, loaded once for the tests that need real arithmetic."""

from __future__ import annotations

import pytest

from runtime import Settings
from runtime.engine import Engine, load_engine
from runtime.models import find_model

# A window that a test runs past in a few forwards.
SEEDLING = Settings(model="seedling", device="cpu", sink=4, window=44)


@pytest.fixture(scope="session")
def seedling() -> Engine:
    return load_engine(SEEDLING, find_model(SEEDLING.model))
