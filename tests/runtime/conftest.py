"""Fixtures of the runtime's tests."""

import pytest

from tests.runtime.disks import set_disk


@pytest.fixture
def roomy_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk with room for every bundle, however full this machine's is."""
    set_disk(monkeypatch, 2**40, 2**39)
