"""What actors ask of wherever sessions are kept: a directory, or an object store that several servers share."""

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
    """What a store knows of a session or snapshot without reading its history."""

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
    """What there was of a session's slab when it was woken."""

    SLAB = "slab"
    NOTHING = "nothing"
    """None was left, as when a server was killed before it could."""
    OTHER_ENGINE = "other_engine"
    """One that gives other bits than this server's: of another kernel class, form, type or size."""
    DAMAGED = "damaged"


class Durable(Protocol):
    """An open session's record: what its actor writes. Closing it has the session sleep.

    Where it `is_remote`, every method may wait for a network and is called beside the event loop. Methods about a session
    that another server has taken raise SessionMoved.
    """

    @property
    def id(self) -> str: ...

    @property
    def terms(self) -> Terms: ...

    @property
    def is_remote(self) -> bool: ...

    @property
    def group_s(self) -> float:
        """For how long tokens of a generation are to wait for each other, so that one call of `record` has several."""
        ...

    @property
    def has_moved_here(self) -> bool:
        """Whether another server had it last."""
        ...

    @property
    def slab_length(self) -> int:
        """How many tokens of the history the slab that is kept has read."""
        ...

    def read_slab(self, slab: Slab, history: array[int]) -> Kept:
        """Fills an empty slab with what is kept of it, and says what that was; else the history will be read again."""
        ...

    def check(self) -> None:
        """Raises SessionMoved where another server has gone on with the session, StorageFailed where that is not known."""
        ...

    def record(self, start: int, token_ids: array[int]) -> None:
        """Has the history go on with these tokens from `start` on. Raises StorageFailed, and nobody may be told of them."""
        ...

    def take_back(self, length: int) -> None:
        """Forgets the tokens from `length` on. It waits for no network."""
        ...

    def used(self, history: array[int]) -> None:
        """Says that the session was used just now, and that this is its history. What cannot be written is no fault."""
        ...

    def new_writer(self, slab: Slab, history: array[int]) -> SlabWriter:
        """Leaves the slab in the store, piece by piece. It waits for no network."""
        ...

    def wrote(self, writer: SlabWriter) -> None:
        """Says that the slab in the store is now the one that `writer` finished. It waits for no network."""
        ...

    def forget_slab(self) -> None:
        """Has the history read again when the session next wakes."""
        ...

    def save(self, slab: Slab, history: array[int]) -> Snapshot:
        """Writes a snapshot of the session as it is. Raises StorageFailed."""
        ...

    def close(self) -> None:
        """Has the session sleep, for any server to wake."""
        ...

    def end(self) -> None:
        """Says for good that the session has ended. Raises StorageFailed, and it goes on then."""
        ...

    def delete(self) -> None:
        """Removes what is left of a session that has ended. What cannot be removed is no fault."""
        ...


class SessionStore(Protocol):
    """Where sessions and snapshots outlive the process.

    Where it `is_remote`, methods may wait for a network and are called beside the event loop, but for those that say otherwise.
    """

    @property
    def is_remote(self) -> bool: ...

    @property
    def leaving_s(self) -> float:
        """How long sessions may take to leave their slabs here when the server stops."""
        ...

    def open_points(self, most_bytes: int) -> PointTree | None:
        """The tree of conversations that is kept here, if one is. It waits for no network. Raises InvalidSetting."""
        ...

    def create(self, terms: Terms, history: array[int] | None = None) -> Durable:
        """A new session's record. Raises StorageFailed, and nothing is left behind then."""
        ...

    def may_wake(self, session_id: str) -> bool:
        """Whether a session of this id may be here and is not open. It waits for no network, and so may not be sure."""
        ...

    def sleeping(self) -> list[Record]:
        """Those that this server knows to sleep, the one used longest ago first. It waits for no network."""
        ...

    def wake(self, session_id: str) -> tuple[Durable, array[int]]:
        """Opens a session that sleeps, or that another server has lost: its record and its history.

        Raises SessionNotFound, also where it is damaged, and set aside; SessionMoved where another server holds it;
        StorageFailed where it cannot be read just now.
        """
        ...

    def expire(self, idle_s: float) -> int:
        """Deletes the sessions that have slept longer than this, and says how many."""
        ...

    def snapshots(self) -> list[Snapshot]:
        """Every snapshot that this server knows of, the oldest first. It waits for no network."""
        ...

    def load(self, snapshot_id: str, slab: Slab) -> tuple[Terms, array[int]]:
        """What a snapshot holds: terms and history, and in the empty `slab` as much of it as was saved for this engine.

        Raises SnapshotNotFound, SnapshotMismatch, SnapshotUnreadable or StorageFailed.
        """
        ...

    def delete_snapshot(self, snapshot_id: str) -> int:
        """Deletes a snapshot; returns the bytes that it took. Raises SnapshotNotFound or StorageFailed."""
        ...

    def delete(self, record: Record) -> None:
        """Ends a session that sleeps for good."""
        ...


def new_id() -> str:
    return secrets.token_urlsafe(24)


def summary(record: Record) -> Snapshot:
    """What is told of a snapshot."""
    return Snapshot(record.id, record.terms.label, record.length, record.size, record.used_at)
