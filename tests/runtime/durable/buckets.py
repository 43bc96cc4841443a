"""Object stores for tests, and operations on them that fail when a test wants them to.

Tests run on obstore's own two and on a real S3 server, and on a bucket besides if PERENNIAL_TEST_BUCKET names one, such as
`s3://bucket/folder`.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path

import pytest
from obstore.store import LocalStore, MemoryStore, ObjectStore, from_url

from runtime.durable.objects import Listed, Objects
from tests.s3_server import S3Server

GIVEN = os.environ.get("PERENNIAL_TEST_BUCKET")
BUCKETS = ("memory", "local", "s3", *((GIVEN,) if GIVEN else ()))


@pytest.fixture(params=BUCKETS)
def bucket(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    """An empty store of each kind."""
    match request.param:
        case "memory":
            return MemoryStore()
        case "local":
            return LocalStore(tmp_path, automatic_cleanup=True)
        case "s3":
            server: S3Server = request.getfixturevalue("s3_server")
            return server.opened(secrets.token_hex(8))
        case url:
            return from_url(f"{url}/{secrets.token_hex(8)}", client_options={"allow_http": True})


class Fault(Enum):
    """What becomes of an operation."""

    REFUSED = "refused"
    """It fails, and nothing was done."""
    UNHEARD = "unheard"
    """It is done, and fails all the same: the answer was lost."""
    LATE = "late"
    """It fails, and is done when the test says so: a request that lies in the network."""


class FaultyObjects(Objects):
    """The operations of one server on a store; `fault` says what becomes of each, by its name and its key."""

    def __init__(
        self, store: ObjectStore | None = None, fault: Callable[[str, str], Fault | None] = lambda name, key: None
    ) -> None:
        self.store = store or MemoryStore()
        super().__init__(self.store)
        self.fault = fault
        self.operations: list[tuple[str, str]] = []
        self._late: list[Callable[[], None]] = []

    def fail_next(self, fault: Fault, name: str = "create") -> None:
        """The next operation of this name fails so."""

        def once(named: str, key: str) -> Fault | None:
            if named != name:
                return None
            self.heal()
            return fault

        self.fault = once

    def heal(self) -> None:
        self.fault = lambda name, key: None

    def count(self, name: str) -> int:
        """How many operations of this name there were."""
        return sum(named == name for named, _ in self.operations)

    def arrive(self) -> None:
        """What lies in the network arrives. Nobody hears the answers."""
        late, self._late = self._late, []
        for operation in late:
            try:
                operation()
            except OSError:
                continue

    def create(self, key: str, content: bytes) -> None:
        self._do("create", key, lambda: super(FaultyObjects, self).create(key, content))

    def put(self, key: str, content: bytes | memoryview) -> None:
        self._do("put", key, lambda: super(FaultyObjects, self).put(key, content))

    def read(self, key: str) -> bytes:
        found: list[bytes] = []
        self._do("read", key, lambda: found.append(super(FaultyObjects, self).read(key)))
        return found[0]

    def has(self, key: str) -> bool:
        found: list[bool] = []
        self._do("has", key, lambda: found.append(super(FaultyObjects, self).has(key)))
        return found[0]

    def list(self, prefix: str) -> list[Listed]:
        found: list[list[Listed]] = []
        self._do("list", prefix, lambda: found.append(super(FaultyObjects, self).list(prefix)))
        return found[0]

    def delete(self, keys: Sequence[str]) -> None:
        self._do("delete", " ".join(keys), lambda: super(FaultyObjects, self).delete(keys))

    def _do(self, name: str, key: str, operation: Callable[[], None]) -> None:
        self.operations.append((name, key))
        fault = self.fault(name, key)
        if fault is Fault.LATE and name in ("create", "put"):
            self._late.append(operation)
        elif fault is not Fault.REFUSED:
            operation()
        if fault is not None:
            raise TimeoutError(errno.ETIMEDOUT, "the store does not answer")
