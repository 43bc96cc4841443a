"""Servers that many tests share: each takes seconds to start."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.contract.servers import KINDS, ServerProcess, started
from tests.contract.stubs import Stubs, make_stubs


@pytest.fixture(scope="session", params=KINDS)
def server(request: pytest.FixtureRequest) -> Iterator[ServerProcess]:
    """A server of each kind, as it is without any setting."""
    with started(request.param) as server:
        yield server


@pytest.fixture(scope="session")
def plain() -> Iterator[ServerProcess]:
    """`perennial serve` without any setting."""
    with started("perennial") as server:
        yield server


@pytest.fixture(scope="session")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Stubs:
    """A stock gRPC client's modules."""
    return make_stubs(tmp_path_factory.mktemp("stubs"))
