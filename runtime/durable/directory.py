"""The store in a directory: sessions and snapshots of one server, and the only code that touches files there.

Sessions that have a slab are *open*; the others sleep. A record is deleted when its session is closed or too long idle, and
for the bound of the directory; never because of a fault. A damaged record is set aside whole, and named in one log line.
"""

from __future__ import annotations

import fcntl
import logging
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from math import inf
from pathlib import Path
from typing import Self

from runtime.durable.files import Files, storage_errors
from runtime.durable.framing import Damaged, Unknown
from runtime.durable.identity import HistoryIdentity, SlabIdentity, Terms
from runtime.durable.journal import Journal
from runtime.durable.points_log import PointLog, open_points
from runtime.durable.slab_file import PARTIAL, SlabWriter, read_slab, write_slab
from runtime.durable.store import HISTORY, SLAB, Kept, Record, new_id, summary
from runtime.errors import (
    InvalidSetting,
    SessionNotFound,
    SnapshotMismatch,
    SnapshotNotFound,
    SnapshotUnreadable,
    StorageFailed,
    StorageFull,
)
from runtime.points import PointTree
from runtime.sessions import Snapshot
from runtime.slab import Slab

_log = logging.getLogger("perennial.state")
# Of a file's name in the log, in characters.
_MOST_NAME = 80


class DirectoryStore:
    """The directory of one server. Any thread may call its methods; calls about one session must not overlap."""

    is_remote = False
    leaving_s = 5.0

    def __init__(
        self,
        directory: Path,
        history_identity: HistoryIdentity,
        slab_identity: SlabIdentity,
        *,
        workers: Executor,
        most_bytes: int = 0,
        files: Files | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        """What takes long and need not be waited for is done by the `workers`."""
        self._history_identity = history_identity
        self._slab_identity = slab_identity
        self._workers = workers
        self._most_bytes = most_bytes
        self._files = files or Files()
        self._now = now
        self._directory = directory
        self._sessions = directory / "sessions"
        self._snapshots = directory / "snapshots"
        self._aside = directory / "damaged"
        self._lock = threading.RLock()
        self._records: dict[str, Record] = {}
        self._saved: dict[str, Record] = {}
        self._left: dict[str, str] = {}
        self._points: PointLog | None = None
        self._has_lost_points = False
        self._uses = 0

    @classmethod
    @contextmanager
    def open(
        cls,
        path: str,
        history_identity: HistoryIdentity,
        slab_identity: SlabIdentity,
        *,
        most_bytes: int = 0,
        files: Files | None = None,
        now: Callable[[], float] = time.time,
    ) -> Iterator[Self]:
        """Opens the store in a directory, which is made if missing and locked while the block runs. Raises InvalidSetting."""
        try:
            directory = Path(path).expanduser()
        except RuntimeError as error:
            raise InvalidSetting(f"state_dir={path} names a home that is not known here: write the path out") from error
        workers = ThreadPoolExecutor(1, thread_name_prefix="state_dir")
        store = cls(
            directory, history_identity, slab_identity, workers=workers, most_bytes=most_bytes, files=files, now=now
        )
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            for folder in (store._sessions, store._snapshots, store._aside):
                store._files.make_folder(folder)
            lock = store._files.create(directory / "lock")
        except OSError as error:
            raise InvalidSetting(f"state_dir={directory} cannot be written: {error.strerror}") from error
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise InvalidSetting(f"state_dir={directory} is in use by another server: choose another") from error
            try:
                store._scan()
            except OSError as error:
                raise InvalidSetting(f"state_dir={directory} cannot be read: {error.strerror}") from error
            yield store
        finally:
            if store._points is not None:
                store._points.close()
            workers.shutdown()
            with suppress(OSError):
                store._files.close(lock)

    # Conversations

    def open_points(self, most_bytes: int) -> PointTree:
        """The tree of conversations in the directory, whose changes are written there from now on. Raises InvalidSetting."""
        path = self._directory / "conversations.tree"
        most_bytes = min(most_bytes, self._most_bytes // 4) if self._most_bytes else most_bytes
        try:
            tree, self._points = open_points(
                self._files, path, self._aside, self._history_identity, most_bytes, self._is_token, self._workers
            )
            self._has_lost_points = any(name.startswith(path.name) for name in self._files.names(self._aside))
        except OSError as error:
            raise InvalidSetting(f"state_dir={self._directory} cannot be written: {error.strerror}") from error
        except StorageFailed as error:
            raise InvalidSetting(
                f"the conversations in state_dir={self._directory} cannot be bounded: {error}"
            ) from error
        return tree

    @property
    def has_lost_points(self) -> bool:
        """Whether a tree of conversations was set aside here, with points at which sessions may stand."""
        return self._has_lost_points

    # Sessions

    def create(self, terms: Terms, history: array[int] | None = None) -> DirectoryDurable:
        """Makes the record of a new session. If it raises StorageFailed, nothing is left behind."""
        session_id = new_id()
        with self._lock, storage_errors("the session was not made"):
            self._make_room()
            journal = Journal.create(
                self._files,
                self._sessions / f"{session_id}{HISTORY}",
                self._history_identity,
                terms,
                history or array("I"),
                self._next_use(),
                self._now(),
            )
            tip = journal.tip
            self._records[session_id] = Record(
                session_id, terms, tip.length, tip.use, tip.used_at, journal.size, is_open=True
            )
        return DirectoryDurable(self, self._records[session_id], journal)

    def may_wake(self, session_id: str) -> bool:
        """Whether a session with this id is on disk and not open."""
        record = self._records.get(session_id)
        return record is not None and not record.is_open

    def sleeping(self) -> list[Record]:
        """The sessions that sleep, the least recently used first."""
        with self._lock:
            return sorted((one for one in self._records.values() if not one.is_open), key=lambda one: one.use)

    def wake(self, session_id: str) -> tuple[DirectoryDurable, array[int]]:
        """Opens a sleeping session; returns its record and its history.

        Raises SessionNotFound if it is damaged, which sets it aside, and StorageFailed if it cannot be read at present.
        """
        with self._lock:
            record = self._records.get(session_id)
            if record is None or record.is_open:
                raise SessionNotFound("no session of this id sleeps")
            # From here on it must not be deleted for its age or to make room.
            record.is_open = True
        path = self._sessions / f"{session_id}{HISTORY}"
        try:
            with storage_errors("the session sleeps on"):
                journal, history = Journal.open(self._files, path, self._history_identity, self._is_token)
        except (Damaged, Unknown) as error:
            self._set_aside(session_id, error)
            raise SessionNotFound("the session's record is damaged") from None
        except BaseException:
            record.is_open = False
            raise
        record.history_bytes = journal.size
        return DirectoryDurable(self, record, journal), history

    def expire(self, idle_s: float) -> int:
        """Deletes the sessions that have slept longer than `idle_s`; returns how many."""
        oldest = self._now() - idle_s
        with self._lock:
            old = [one for one in self.sleeping() if one.used_at < oldest]
            for record in old:
                del self._records[record.id]
        # Without the lock, for which sessions at work would wait: to delete slabs takes seconds.
        for record in old:
            self.delete(record)
        return len(old)

    # Snapshots

    def save(self, terms: Terms, history: array[int], slab: Slab) -> Snapshot:
        """Writes a snapshot. If it raises StorageFailed, nothing is left behind."""
        snapshot_id = new_id()
        path = self._snapshots / f"{snapshot_id}{HISTORY}"
        beside = path.with_suffix(SLAB)
        with storage_errors("nothing was saved"):
            with self._lock:
                self._make_room()
            try:
                slab_bytes = write_slab(self._files, beside, self._slab_identity, slab, history)
                journal = Journal.create(
                    self._files, path, self._history_identity, terms, history, self._next_use(), self._now()
                )
            except BaseException:
                self._remove(path, beside, path.with_suffix(PARTIAL))
                raise
            journal.close()
        record = Record(
            snapshot_id, terms, len(history), journal.tip.use, journal.tip.used_at, journal.size, slab_bytes
        )
        with self._lock:
            self._saved[snapshot_id] = record
        return summary(record)

    def snapshots(self) -> list[Snapshot]:
        """Every snapshot, the oldest first."""
        with self._lock:
            return [summary(record) for record in sorted(self._saved.values(), key=lambda one: one.use)]

    def load(self, snapshot_id: str, slab: Slab) -> tuple[Terms, array[int]]:
        """A snapshot's terms and history. Fills the empty `slab` with what was saved, if it was saved for this engine.

        Raises SnapshotNotFound, SnapshotMismatch, SnapshotUnreadable or StorageFailed.
        """
        record = self._find_snapshot(snapshot_id)
        path = self._snapshots / f"{snapshot_id}{HISTORY}"
        try:
            with storage_errors("the snapshot stays as it is"):
                journal, history = Journal.open(self._files, path, self._history_identity, self._is_token)
                journal.close()
        except (Damaged, Unknown) as error:
            raise SnapshotUnreadable(f"the snapshot is damaged: {error}") from None
        self._read_slab(path.with_suffix(SLAB), slab, history, record)
        return record.terms, history

    def delete_snapshot(self, snapshot_id: str) -> int:
        """Deletes a snapshot; returns the bytes that it took. Raises SnapshotNotFound or StorageFailed."""
        record = self._find_snapshot(snapshot_id)
        path = self._snapshots / f"{snapshot_id}{HISTORY}"
        with storage_errors("the snapshot is still there"):
            self._files.remove(path)
            self._files.remove(path.with_suffix(SLAB))
        with self._lock:
            self._saved.pop(snapshot_id, None)
        return record.size

    @property
    def size(self) -> int:
        """Bytes of all records."""
        with self._lock:
            of_points = self._points.size if self._points else 0
            return of_points + sum(record.size for record in (*self._records.values(), *self._saved.values()))

    # What an open session asks for

    def read_slab(self, record: Record, slab: Slab, history: array[int]) -> Kept:
        """Fills an empty slab from the session's slab on disk."""
        return self._read_slab(self._sessions / f"{record.id}{SLAB}", slab, history, record)

    def mark_used(self, record: Record, journal: Journal) -> None:
        """Records that the session was used now. If that cannot be written, it is only known until the next start."""
        with self._lock:
            record.use, record.used_at = self._next_use(), self._now()
            with suppress(OSError):
                journal.mark_used(record.use, record.used_at)

    def put_to_sleep(self, record: Record, journal: Journal) -> None:
        """Closes the session's record, so that the session sleeps."""
        journal.close()
        with self._lock:
            record.is_open = False
            record.length = journal.tip.length
            record.history_bytes = journal.size

    def delete(self, record: Record) -> None:
        """Ends the record of a session for good."""
        with self._lock:
            self._records.pop(record.id, None)
        path = self._sessions / f"{record.id}{HISTORY}"
        self._remove(path, path.with_suffix(SLAB), path.with_suffix(PARTIAL))

    def forget_slab(self, record: Record) -> None:
        """Deletes a session's slab from disk."""
        self._remove(self._sessions / f"{record.id}{SLAB}")
        record.slab_bytes = 0

    def keep_slab(self, record: Record, slab_bytes: int) -> bool:
        """Makes room for a slab that was written, at the cost of those of sleeping sessions; returns whether there was any.

        If there was none the slab is deleted, for it only saves time.
        """
        with self._lock:
            record.slab_bytes = slab_bytes
            has_room = self._forget_slabs() < 0
            if not has_room:
                self.forget_slab(record)
            return has_room

    def new_writer(self, record: Record, slab: Slab, history: array[int]) -> SlabWriter:
        """A writer that saves a session's slab on disk piece by piece. Raises StorageFull if there will be no room for it."""
        if self._most_bytes:
            with self._lock:
                in_use = self.size - record.slab_bytes - sum(one.slab_bytes for one in self.sleeping())
            if in_use + slab.used * slab.spec.token_bytes + slab.spec.kept_bytes >= self._most_bytes:
                raise StorageFull(f"state_max_bytes={self._most_bytes} leaves no room for the slab: raise it")
        path = self._sessions / f"{record.id}{SLAB}"
        return SlabWriter(self._files, path, self._slab_identity, slab, history)

    # The directory

    def _scan(self) -> None:
        for folder, found in ((self._sessions, self._records), (self._snapshots, self._saved)):
            for name in self._files.names(folder):
                path = folder / name
                if path.suffix in (".new", PARTIAL):
                    self._remove(path)
                elif path.suffix == HISTORY and (record := self._peek(path)):
                    found[record.id] = record
            names = set(self._files.names(folder))
            for name in names:
                path = folder / name
                if path.suffix == SLAB and path.with_suffix(HISTORY).name not in names:
                    self._remove(path)
        self._uses = max((one.use for one in (*self._records.values(), *self._saved.values())), default=0)
        _log.info("sessions on disk count=%d snapshots=%d", len(self._records), len(self._saved))

    def _peek(self, path: Path) -> Record | None:
        try:
            head = Journal.peek(self._files, path, self._history_identity)
        except Unknown as error:
            self._left[path.stem] = str(error)
            _log.warning("left on disk: %s: %s", path.name, error)
        except Damaged as error:
            self._set_aside(path.stem, error, path.parent)
        except OSError as error:
            _log.warning("left on disk: %s: %s", path.name, error.strerror)
        else:
            tip = head.tip
            slab_bytes = self._size(path.with_suffix(SLAB))
            return Record(path.stem, head.terms, tip.length, tip.use, tip.used_at, tip.end, slab_bytes)
        return None

    def _size(self, path: Path) -> int:
        """The size of a file; 0 of one that cannot be looked at, which costs what it holds and no other."""
        try:
            return self._files.size(path)
        except OSError as error:
            _log.warning("not read: %s: %s", path.name[:_MOST_NAME], error.strerror)
            return 0

    def _find_snapshot(self, snapshot_id: str) -> Record:
        if not isinstance(snapshot_id, str):
            raise SnapshotNotFound("no snapshot has this id")
        record = self._saved.get(snapshot_id)
        if record is None and snapshot_id in self._left:
            raise SnapshotMismatch(f"the snapshot cannot go on here: {self._left[snapshot_id]}")
        if record is None:
            raise SnapshotNotFound("no snapshot has this id")
        return record

    def _read_slab(self, path: Path, slab: Slab, history: array[int], record: Record) -> Kept:
        """Fills the slab if there is a whole file for this engine. Otherwise the history will be read again."""
        slab.clear()
        if not record.slab_bytes:
            return Kept.NOTHING
        try:
            read_slab(self._files, path, self._slab_identity, slab, history)
        except (OSError, Damaged, Unknown) as error:
            slab.clear()
            _log.warning("a history of %d tokens is read again: %s: %s", len(history), path.name, error)
            if not isinstance(error, OSError):
                self._remove(path)
                record.slab_bytes = 0
            return Kept.OTHER_ENGINE if isinstance(error, Unknown) else Kept.DAMAGED
        return Kept.SLAB

    def _set_aside(self, session_id: str, error: Exception, folder: Path | None = None) -> None:
        with self._lock:
            self._records.pop(session_id, None)
        moved = "it stays where it is"
        with suppress(OSError):
            for suffix in (SLAB, HISTORY):
                path = (folder or self._sessions) / f"{session_id}{suffix}"
                if self._files.size(path):
                    self._files.replace(path, self._aside / path.name)
            moved = "it is in damaged/ now"
        _log.error("a record was set aside: %s%s: %s; %s", session_id, HISTORY, error, moved)

    def _remove(self, *paths: Path) -> None:
        for path in paths:
            try:
                self._files.remove(path)
            except OSError as error:
                _log.warning("%s could not be deleted: %s", path.name, error.strerror)

    def _make_room(self) -> None:
        """Keeps the directory within its bound: deletes slabs of sleeping sessions, then sessions and snapshots, by last use."""
        over = self._forget_slabs()
        for record in sorted([*self.sleeping(), *self._saved.values()], key=lambda one: one.use):
            if over < 0:
                return
            over -= record.size
            is_snapshot = record.id in self._saved
            _log.warning("deleted for state_max_bytes: a %s", "snapshot" if is_snapshot else "session that slept")
            if is_snapshot:
                self.delete_snapshot(record.id)
            else:
                self.delete(record)
        if over >= 0:
            raise StorageFull(
                f"state_max_bytes={self._most_bytes} is reached by sessions at work: close some, or raise it"
            )

    def _forget_slabs(self) -> float:
        """Deletes slabs of sleeping sessions as long as the directory has reached its bound; returns by how much it still has."""
        if not self._most_bytes:
            return -inf
        over = self.size - self._most_bytes
        for record in self.sleeping():
            if over < 0:
                break
            over -= record.slab_bytes
            self.forget_slab(record)
        return over

    def _next_use(self) -> int:
        self._uses += 1
        return self._uses

    def _is_token(self, history: array[int]) -> bool:
        return not history or max(history) < self._history_identity.vocabulary


class DirectoryDurable:
    """An open session's record, which its actor writes. Closing it lets the session sleep."""

    is_remote = False
    group_s = 0.0
    has_moved_here = False

    def __init__(self, store: DirectoryStore, record: Record, journal: Journal) -> None:
        self.id = record.id
        self.terms = record.terms
        self._store = store
        self._record = record
        self._journal = journal
        self._slab_length = 0

    @property
    def slab_length(self) -> int:
        """How many tokens of the history the slab on disk holds."""
        return self._slab_length

    def read_slab(self, slab: Slab, history: array[int]) -> Kept:
        kept = self._store.read_slab(self._record, slab, history)
        self._slab_length = slab.frontier
        return kept

    def check(self) -> None:
        """Does nothing: only this server uses the directory."""

    def record(self, start: int, token_ids: array[int]) -> None:
        """Writes these tokens to the history on disk from `start` on. If it raises StorageFailed, nothing has changed."""
        with storage_errors("nothing was changed"):
            self._journal.record(start, token_ids)
        self._record.history_bytes = self._journal.size
        self._record.length = start + len(token_ids)

    def take_back(self, length: int) -> None:
        """Forgets the tokens from `length` on."""
        self._journal.take_back(length)
        self._record.length = length

    def used(self, history: array[int]) -> None:
        """Records that the session was used now."""
        self._store.mark_used(self._record, self._journal)

    def new_writer(self, slab: Slab, history: array[int]) -> SlabWriter:
        """A writer that saves the slab on disk piece by piece."""
        return self._store.new_writer(self._record, slab, history)

    def wrote(self, writer: SlabWriter) -> None:
        """Records that the slab on disk is now the one that `writer` finished. If there is no room for it, it is deleted."""
        is_kept = self._store.keep_slab(self._record, writer.size)
        self._slab_length = writer.frontier if is_kept else 0

    def forget_slab(self) -> None:
        """Deletes the slab on disk, so that the history is read again when the session wakes."""
        self._slab_length = 0
        self._store.forget_slab(self._record)

    def save(self, slab: Slab, history: array[int]) -> Snapshot:
        """Writes a snapshot of the session as it is. Raises StorageFailed."""
        return self._store.save(self.terms, history, slab)

    def close(self) -> None:
        self._store.put_to_sleep(self._record, self._journal)

    def end(self) -> None:
        """Does nothing: there are no other servers to tell."""

    def delete(self) -> None:
        """Ends the record for good."""
        self._journal.close()
        self._store.delete(self._record)
