"""The directory of durable sessions and of snapshots."""

from __future__ import annotations

import fcntl
import logging
import secrets
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from runtime.errors import InvalidSetting, SnapshotNotFound, SnapshotUnreadable
from runtime.journal import Journal
from runtime.slab import Slab
from runtime.snapshot import Identity, Terms, read_snapshot, write_snapshot

_log = logging.getLogger("perennial.state")


class StateDirectory:
    """What sessions leave on disk: `sessions/` for those that live, `snapshots/` for those that were saved."""

    def __init__(self, directory: Path, identity: Identity) -> None:
        self._identity = identity
        self._sessions = directory / "sessions"
        self._snapshots = directory / "snapshots"

    @classmethod
    @contextmanager
    def open(cls, path: str, identity: Identity) -> Iterator[Self]:
        """The directory, made where it is missing and locked for the block. Raises InvalidSetting."""
        directory = Path(path).expanduser()
        state = cls(directory, identity)
        try:
            for folder in (directory, state._sessions, state._snapshots):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = (directory / "lock").open("w")
        except OSError as error:
            raise InvalidSetting(f"state_dir={directory} cannot be written: {error.strerror}") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise InvalidSetting(f"state_dir={directory} is in use by another server: choose another") from error
            yield state

    def new_journal(self, session_id: str, terms: Terms) -> Journal:
        return Journal.create(self._sessions / f"{session_id}.journal", self._identity, terms)

    def journals(self) -> Iterator[tuple[str, Journal]]:
        """Ids and records of the sessions on disk, the one used last first. What cannot go on here is logged and left."""
        for path in sorted(self._sessions.glob("*.journal"), key=_last_written, reverse=True):
            try:
                journal = Journal.open(path, self._identity)
            except SnapshotUnreadable as error:
                self.set_aside(path.stem, error)
                continue
            if journal is None:
                _log.warning(
                    "session left on disk: %s was made with another model, kernels, weights, dtype, sink or window",
                    path.name,
                )
            else:
                yield path.stem, journal

    def set_aside(self, session_id: str, error: SnapshotUnreadable) -> None:
        """Takes a damaged record out of the way of the next start."""
        path = self._sessions / f"{session_id}.journal"
        path.rename(path.with_suffix(".damaged"))
        _log.error("session lost, its record is now %s: %s", path.with_suffix(".damaged").name, error)

    def save(self, terms: Terms, slab: Slab, history: array[int]) -> tuple[str, int]:
        """Writes a snapshot; returns its id and its size in bytes."""
        snapshot_id = secrets.token_urlsafe(24)
        return snapshot_id, write_snapshot(self._path(snapshot_id), self._identity, terms, slab, history)

    def load(self, snapshot_id: str, slab: Slab) -> tuple[Terms, array[int]]:
        """Fills an empty slab from a snapshot. Raises SnapshotNotFound, SnapshotMismatch, SnapshotUnreadable."""
        path = self._path(snapshot_id)
        # An id that was issued holds no separator, so none leads out of the folder.
        if Path(snapshot_id).name != snapshot_id or not path.is_file():
            raise SnapshotNotFound("no snapshot has this id")
        return read_snapshot(path, self._identity, slab)

    def _path(self, snapshot_id: str) -> Path:
        return self._snapshots / f"{snapshot_id}.safetensors"


def _last_written(path: Path) -> float:
    beside = path.with_name(path.name + "-wal")
    return max(one.stat().st_mtime for one in (path, beside) if one.exists())
