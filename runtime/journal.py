"""The record of a durable session: every token of its history in an SQLite file of its own, its slab now and then beside it.

A write ends in the operating system's cache, some tens of microseconds away, and so survives the end of this process by
any signal; a power cut may take the last ones. One file a session, so that a damaged file is one session's loss.
"""

from __future__ import annotations

import logging
import sqlite3
from array import array
from pathlib import Path

from safetensors import SafetensorError

from runtime.errors import SnapshotUnreadable, StorageFailed
from runtime.slab import Slab
from runtime.snapshot import Identity, Terms, read_snapshot, write_snapshot

_SCHEMA = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = OFF;
CREATE TABLE session (identity TEXT NOT NULL, terms TEXT NOT NULL);
CREATE TABLE tokens (start INTEGER PRIMARY KEY, ids BLOB NOT NULL);
"""

_log = logging.getLogger("perennial.state")


class Journal:
    """One session's record. Tokens are recorded before anybody is told of them."""

    def __init__(self, path: Path, identity: Identity, terms: Terms, connection: sqlite3.Connection) -> None:
        self.terms = terms
        self._path = path
        self._identity = identity
        self._connection = connection
        self._slab_length = 0

    @classmethod
    def create(cls, path: Path, identity: Identity, terms: Terms) -> Journal:
        """An empty record in a new file."""
        connection = _connect(path)
        connection.executescript(_SCHEMA)
        connection.execute("INSERT INTO session VALUES (?, ?)", (identity.to_json(), terms.to_json()))
        return cls(path, identity, terms, connection)

    @classmethod
    def open(cls, path: Path, identity: Identity) -> Journal | None:
        """The record in a file, or None where the session was made with another identity. Raises SnapshotUnreadable."""
        try:
            connection = _connect(path)
            made_with, terms = connection.execute("SELECT identity, terms FROM session").fetchone()
            if made_with != identity.to_json():
                connection.close()
                return None
            return cls(path, identity, Terms.from_json(terms), connection)
        except (sqlite3.Error, TypeError, ValueError) as error:
            raise SnapshotUnreadable(f"{path.name} is no journal that can be read: {error}") from error

    @property
    def slab_length(self) -> int:
        """How many tokens of the history the slab on disk has read."""
        return self._slab_length

    def record(self, start: int, token_ids: array[int]) -> None:
        """Adds the tokens of the history from `start` on. Raises StorageFailed, and has recorded nothing then."""
        if token_ids:
            self._execute("INSERT INTO tokens VALUES (?, ?)", (start, token_ids.tobytes()))

    def take_back(self, start: int) -> None:
        """Forgets the tokens that were recorded from `start` on. Raises StorageFailed."""
        self._execute("DELETE FROM tokens WHERE start >= ?", (start,))

    def _execute(self, statement: str, values: tuple[object, ...]) -> None:
        try:
            self._connection.execute(statement, values)
        except sqlite3.Error as error:
            raise StorageFailed(f"state_dir cannot be written: {error}; nothing was changed") from error

    def record_slab(self, slab: Slab, history: array[int]) -> None:
        """Leaves the slab on disk beside the record, in place of an older one. Where it cannot, a recovery takes longer."""
        try:
            write_snapshot(self._slab_path, self._identity, self.terms, slab, history)
        except (OSError, SafetensorError) as error:
            _log.warning("slab not left on disk: %s", error)
        self._slab_length = slab.frontier

    def recover(self, slab: Slab) -> array[int]:
        """The history as recorded, with as much of it in the empty `slab` as was left on disk.

        Raises SnapshotUnreadable. A slab on disk that is damaged costs time only: it is empty, and all is read again.
        """
        history = array("I")
        try:
            for start, token_ids in self._connection.execute("SELECT start, ids FROM tokens ORDER BY start"):
                if start != len(history):
                    raise SnapshotUnreadable(f"{self._path.name} is damaged: tokens from {len(history)} on are missing")
                history.frombytes(token_ids)
        except (sqlite3.Error, ValueError, TypeError) as error:
            raise SnapshotUnreadable(f"{self._path.name} is damaged: {error}") from error
        try:
            if self._slab_path.exists():
                _, seen = read_snapshot(self._slab_path, self._identity, slab)
                # A slab that was left by the next token but one holds a token that was taken back.
                if seen[: slab.frontier] != history[: slab.frontier]:
                    slab.clear()
        except SnapshotUnreadable as error:
            _log.warning("slab on disk damaged, the history is read again: %s", error)
        self._slab_length = slab.frontier
        return history

    def close(self) -> None:
        self._connection.close()

    def delete(self) -> None:
        """Ends the record for good."""
        self._connection.close()
        for path in (self._path, self._slab_path, _beside(self._path, "-wal"), _beside(self._path, "-shm")):
            path.unlink(missing_ok=True)

    @property
    def _slab_path(self) -> Path:
        return self._path.with_suffix(".safetensors")


def _connect(path: Path) -> sqlite3.Connection:
    # Whoever owns the journal uses it from one thread at a time, and not always from the same.
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA synchronous = OFF")
    return connection


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)
