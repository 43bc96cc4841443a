"""What actors need of a store of sessions, be it a directory or an object store that several servers share."""

from __future__ import annotations

import secrets
from array import array
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from runtime.durable.identity import Terms
from runtime.durable.slab_file import SlabWriter
from runtime.points import PointTree
from runtime.sessions import Snapshot
from runtime.slab import Slab

HISTORY, SLAB = ".history", ".slab"


@dataclass(slots=True)
class Record:
    """What a store knows about a session or snapshot without reading its history."""

    id: str
    terms: Terms
    length: int
    use: int
    used_at: float
    history_bytes: int
    slab_bytes: int = 0
    is_open: bool = False

    @property
    def size(self) -> int:
        return self.history_bytes + self.slab_bytes


class Kept(Enum):
    """How much of a session's slab was found when it was woken."""

    SLAB = "slab"
    NOTHING = "nothing"
    """None was left, as when a server was killed before it could."""
    OTHER_ENGINE = "other_engine"
    """One that gives other bits than this server's: of another kernel class, form, type or size."""
    DAMAGED = "damaged"


class Durable(Protocol):
    """An open session's record, which its actor writes. Closing it lets the session sleep.

    If it `is_remote`, every method may wait for a network and is called in a thread, except those that say otherwise. If
    another server has taken the session, methods raise SessionMoved.
    """

    @property
    def id(self) -> str: ...

    @property
    def terms(self) -> Terms: ...

    @property
    def is_remote(self) -> bool: ...

    @property
    def group_s(self) -> float:
        """How long tokens of a generation wait for each other, in seconds, so that one call of `record` has several."""
        ...

    @property
    def has_moved_here(self) -> bool:
        """Whether another server was the last to hold the session."""
        ...

    @property
    def slab_length(self) -> int:
        """How many tokens of the history the stored slab holds."""
        ...

    def read_slab(self, slab: Slab, history: array[int]) -> Kept:
        """Fills an empty slab from the store; returns how much was found. The rest of the history will be read again."""
        ...

    def check(self) -> None:
        """Raises SessionMoved if another server has taken the session, StorageFailed if that cannot be found out."""
        ...

    def record(self, start: int, token_ids: array[int]) -> None:
        """Records these tokens from position `start` on. If it raises StorageFailed, nobody may be told of them."""
        ...

    def take_back(self, length: int) -> None:
        """Forgets the tokens from `length` on. It waits for no network."""
        ...

    def used(self, history: array[int]) -> None:
        """Records that the session was used now, with this history. Failures to write are ignored."""
        ...

    def new_writer(self, slab: Slab, history: array[int]) -> SlabWriter:
        """A writer that saves the slab in the store piece by piece. It waits for no network.

        Raises StorageFull if there will be no room for the slab.
        """
        ...

    def wrote(self, writer: SlabWriter) -> None:
        """Records that the slab in the store is now the one that `writer` finished. It may take long in every kind of store."""
        ...

    def forget_slab(self) -> None:
        """Deletes the stored slab, so that the history is read again when the session wakes."""
        ...

    def save(self, slab: Slab, history: array[int]) -> Snapshot:
        """Writes a snapshot of the session as it is. Raises StorageFailed."""
        ...

    def close(self) -> None:
        """Lets the session sleep, for any server to wake."""
        ...

    def end(self) -> None:
        """Records that the session has ended, for good. If it raises StorageFailed, the session goes on."""
        ...

    def delete(self) -> None:
        """Removes what is left of a session that has ended. Failures are ignored."""
        ...


class SessionStore(Protocol):
    """A store in which sessions and snapshots outlive the process.

    If it `is_remote`, methods may wait for a network and are called in a thread, except those that say otherwise.
    """

    @property
    def is_remote(self) -> bool: ...

    @property
    def leaving_s(self) -> float:
        """How long sessions may take to save their slabs when the server stops, in seconds."""
        ...

    def open_points(self, most_bytes: int) -> PointTree | None:
        """The tree of conversations in this store, or None if it keeps none. It waits for no network. Raises InvalidSetting."""
        ...

    @property
    def has_lost_points(self) -> bool:
        """Whether damage has cost the tree of conversations points, at which sessions may stand."""
        ...

    def create(self, terms: Terms, history: array[int] | None = None) -> Durable:
        """Makes the record of a new session. If it raises StorageFailed, nothing is left behind."""
        ...

    def may_wake(self, session_id: str) -> bool:
        """Whether a session with this id may be asleep here. It waits for no network, so a True may be wrong."""
        ...

    def sleeping(self) -> list[Record]:
        """The sessions that this server knows to be asleep, the least recently used first. It waits for no network."""
        ...

    def wake(self, session_id: str) -> tuple[Durable, array[int]]:
        """Opens a session that sleeps, or whose lease has lapsed; returns its record and its history.

        Raises SessionNotFound, also if it is damaged, which sets it aside; SessionMoved if another server holds it;
        StorageFailed if it cannot be read at present.
        """
        ...

    def expire(self, idle_s: float) -> int:
        """Deletes the sessions that have slept longer than `idle_s`; returns how many."""
        ...

    def snapshots(self) -> list[Snapshot]:
        """Every snapshot that this server knows, the oldest first. It waits for no network."""
        ...

    def load(self, snapshot_id: str, slab: Slab) -> tuple[Terms, array[int]]:
        """A snapshot's terms and history. Fills the empty `slab` with what was saved, if it was saved for this engine.

        Raises SnapshotNotFound, SnapshotMismatch, SnapshotUnreadable or StorageFailed.
        """
        ...

    def delete_snapshot(self, snapshot_id: str) -> int:
        """Deletes a snapshot; returns the bytes that it took. Raises SnapshotNotFound or StorageFailed."""
        ...

    def delete(self, record: Record) -> None:
        """Deletes a sleeping session for good."""
        ...


def new_id() -> str:
    return secrets.token_urlsafe(24)


def summary(record: Record) -> Snapshot:
    """The Snapshot that users see of a record."""
    return Snapshot(record.id, record.terms.label, record.length, record.size, record.used_at)
