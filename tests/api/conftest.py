"""What all tests of the doors have in common."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _a_slow_machine_may_read_long(monkeypatch: pytest.MonkeyPatch) -> None:
    # No test but those of the limit sends what takes long to read, and a slow machine is no fault.
    monkeypatch.setattr("api.reader._LIMIT_S", 300.0)
