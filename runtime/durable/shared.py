"""The store in a bucket, or in anything else that obstore opens: several servers share its sessions, each held by one at a time.

A session lies under `sessions/ID/`: its log and bases of it, and its slab in parts; a snapshot under `snapshots/ID/`. Nothing is
listed as a whole at a start or later, however many sessions there are: what nobody asks for is the bucket's to delete by age.
"""

from __future__ import annotations

import logging
import re
import secrets
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from runtime.durable.files import storage_errors
from runtime.durable.framing import Damaged, Unknown
from runtime.durable.identity import HistoryIdentity, SlabIdentity, Terms
from runtime.durable.objects import Listed, Objects, open_objects
from runtime.durable.parts import PartFiles
from runtime.durable.segments import Kind, Segment, read_segment
from runtime.durable.session_log import Lease, SessionLog
from runtime.durable.slab_file import SlabWriter, read_slab, write_slab
from runtime.durable.store import SLAB, Kept, Record, new_id, summary
from runtime.errors import (
    InvalidSetting,
    SessionMoved,
    SessionNotFound,
    SnapshotMismatch,
    SnapshotNotFound,
    SnapshotUnreadable,
    StorageFailed,
)
from runtime.points import PointTree
from runtime.sessions import Snapshot
from runtime.slab import Slab

LEASE_S = 10.0
# One write for each token would cost more than drawing it: a million sessions would make some 800,000 requests a second.
GROUP_S = 0.25
_ID = re.compile(r"[A-Za-z0-9_-]{16,64}")
_READ_AT_ONCE = 16

_log = logging.getLogger("perennial.state")


class SharedStore:
    """One server's access to the store. Any thread may call its methods; calls about one session must not overlap."""

    is_remote = True
    leaving_s = 60.0

    def __init__(
        self,
        objects: Objects,
        history_identity: HistoryIdentity,
        slab_identity: SlabIdentity,
        *,
        lease_s: float = LEASE_S,
        group_s: float = GROUP_S,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Any server may take a session to which its holder has written nothing for `lease_s` seconds.

        After the first token of a generation, those drawn within `group_s` seconds are written together, and then sent.
        """
        self._group_s = group_s
        self._objects = objects
        self._history_identity = history_identity
        self._slab_identity = slab_identity
        self._lease_s = lease_s
        self._now = now
        # Unique to this process, so that a restarted server waits for its old leases as any other server does.
        self._holder = secrets.token_urlsafe(12)
        self._slabs = PartFiles(objects)
        self._lock = threading.Lock()
        self._asleep: dict[str, Record] = {}
        self._deleting: set[str] = set()
        self._has_deleted = threading.Condition(self._lock)
        self._saved: dict[str, Record] = {}
        self._set_aside: set[str] = set()
        self._uses = 0

    @classmethod
    @contextmanager
    def open(
        cls,
        url: str,
        history_identity: HistoryIdentity,
        slab_identity: SlabIdentity,
        *,
        most_bytes: int = 0,
        lease_s: float = LEASE_S,
    ) -> Iterator[Self]:
        """Opens the store at a URL while the block runs. Raises InvalidSetting."""
        if most_bytes:
            raise InvalidSetting(
                f"state_max_bytes bounds a directory, and state_dir={url} is none: give the bucket a rule for its lifecycle"
            )
        store = cls(open_objects(url), history_identity, slab_identity, lease_s=lease_s)
        try:
            store._find_snapshots()
        except OSError as error:
            raise InvalidSetting(f"state_dir={url} cannot be read: {error.strerror}") from error
        _log.info("sessions are shared lease_s=%g snapshots=%d", lease_s, len(store._saved))
        yield store

    def open_points(self, most_bytes: int) -> PointTree | None:
        """Always None: conversations end with their server."""
        return None

    @property
    def has_lost_points(self) -> bool:
        return False

    # Sessions

    def create(self, terms: Terms, history: array[int] | None = None) -> SharedDurable:
        """Makes the record of a new session, held by this server. Raises StorageFailed."""
        tokens = history or array("I")
        with storage_errors("the session was not made"):
            log = SessionLog.create(self._objects, new_id(), self._history_identity, terms, self._holder, tokens)
        return self._open_record(log, has_moved_here=False)

    def may_wake(self, session_id: str) -> bool:
        """Whether this could be the id of a session; only reading the store would tell whether it is one."""
        return _ID.fullmatch(session_id) is not None and session_id not in self._set_aside

    def sleeping(self) -> list[Record]:
        """The sessions that this server was, as far as it knows, the last to hold; the least recently used first."""
        with self._lock:
            return sorted(self._asleep.values(), key=lambda one: one.use)

    def wake(self, session_id: str) -> tuple[SharedDurable, array[int]]:
        """Takes a session that is free, or whose lease has lapsed; returns its record and its history.

        Raises SessionNotFound, SessionMoved if another server holds it, or StorageFailed.
        """
        with self._has_deleted:
            self._has_deleted.wait_for(lambda: session_id not in self._deleting)
            self._asleep.pop(session_id, None)
        return self._claim(session_id)

    def expire(self, idle_s: float) -> int:
        """Deletes the sessions that this server was the last to hold and that nobody has used for `idle_s`; returns how many."""
        oldest = self._now() - idle_s
        with self._lock:
            old = [one for one in self._asleep.values() if one.used_at < oldest]
        return sum(self._delete_if_unused(record) for record in old)

    def delete(self, record: Record) -> None:
        self._delete_if_unused(record)

    def _claim(self, session_id: str) -> tuple[SharedDurable, array[int]]:
        try:
            with storage_errors("the session sleeps on"):
                log, history = SessionLog.claim(
                    self._objects,
                    session_id,
                    self._history_identity,
                    self._holder,
                    self._is_token,
                    self._has_lapsed,
                )
        except (Damaged, Unknown) as error:
            with self._lock:
                self._set_aside.add(session_id)
            _log.error("a record was set aside: sessions/%s: %s; it stays where it is", session_id, error)
            raise SessionNotFound("the session's record cannot be read") from None
        return self._open_record(log, has_moved_here=log.taken_from != self._holder), history

    def _delete_if_unused(self, record: Record) -> bool:
        # Claims by one server look alike, so both of two at once would succeed: nobody may wake a session that is being
        # deleted, and one that was woken since the record was read is not deleted.
        with self._lock:
            if self._asleep.get(record.id) is not record:
                return False
            del self._asleep[record.id]
            self._deleting.add(record.id)
        try:
            return self._delete_claimed(record.id)
        finally:
            with self._has_deleted:
                self._deleting.remove(record.id)
                self._has_deleted.notify_all()

    def _delete_claimed(self, session_id: str) -> bool:
        try:
            durable, _ = self._claim(session_id)
        except (SessionNotFound, SessionMoved, StorageFailed):
            return False
        if durable.has_moved_here:
            durable.close()
            return False
        with suppress(SessionMoved, StorageFailed):
            durable.end()
            durable.delete()
            return True
        return False

    def _open_record(self, log: SessionLog, has_moved_here: bool) -> SharedDurable:
        return SharedDurable(self, log, self._slabs, self._slab_identity, has_moved_here, self._group_s)

    def _has_lapsed(self, lease: Lease) -> bool:
        return self._now() - lease.written_at >= self._lease_s

    def _is_token(self, history: array[int]) -> bool:
        return not history or max(history) < self._history_identity.vocabulary

    # Snapshots

    def save(self, terms: Terms, history: array[int], slab: Slab) -> Snapshot:
        """Writes a snapshot. If it raises StorageFailed, there is none."""
        snapshot_id = new_id()
        slab_bytes = write_slab(self._slabs, _snapshot_slab(snapshot_id), self._slab_identity, slab, history)
        identity = self._history_identity
        whole = Segment(snapshot_id, 0, Kind.BASE, 0, self._holder, 0, history, b"", identity, terms)
        content = whole.to_bytes()
        with storage_errors("nothing was saved"):
            self._objects.put(_snapshot_key(snapshot_id), content)
        record = Record(snapshot_id, terms, len(history), 0, self._now(), len(content), slab_bytes)
        with self._lock:
            self._saved[snapshot_id] = record
        return summary(record)

    def snapshots(self) -> list[Snapshot]:
        """The snapshots that existed when this server started and those made by it since, the oldest first."""
        with self._lock:
            return [summary(record) for record in sorted(self._saved.values(), key=lambda one: one.used_at)]

    def load(self, snapshot_id: str, slab: Slab) -> tuple[Terms, array[int]]:
        """The terms and history of a snapshot, made by any server. Fills `slab` if the slab was saved for this engine.

        Raises SnapshotNotFound, SnapshotMismatch, SnapshotUnreadable or StorageFailed.
        """
        self._check_id(snapshot_id)
        with storage_errors("the snapshot stays as it is"):
            try:
                content = self._objects.read(_snapshot_key(snapshot_id))
            except FileNotFoundError:
                raise SnapshotNotFound("no snapshot has this id") from None
        try:
            segment = read_segment(content, snapshot_id, 0, self._history_identity)
            if segment.terms is None or not self._is_token(segment.tokens):
                raise Damaged("it holds tokens that the model does not have")
        except Unknown as error:
            raise SnapshotMismatch(f"the snapshot cannot go on here: {error}") from None
        except Damaged as error:
            raise SnapshotUnreadable(f"the snapshot is damaged: {error}") from None
        fill(self._slabs, _snapshot_slab(snapshot_id), self._slab_identity, slab, segment.tokens)
        return segment.terms, segment.tokens

    def delete_snapshot(self, snapshot_id: str) -> int:
        """Deletes a snapshot; returns the bytes that it took. Raises SnapshotNotFound or StorageFailed."""
        self._check_id(snapshot_id)
        with storage_errors("the snapshot is still there"):
            listed = self._objects.list(f"snapshots/{snapshot_id}/")
            if not listed:
                raise SnapshotNotFound("no snapshot has this id")
            self._objects.delete([one.key for one in listed])
        with self._lock:
            self._saved.pop(snapshot_id, None)
        return sum(one.size for one in listed)

    def _check_id(self, snapshot_id: str) -> None:
        if not isinstance(snapshot_id, str) or not _ID.fullmatch(snapshot_id):
            raise SnapshotNotFound("no snapshot has this id")

    def _find_snapshots(self) -> None:
        listed = self._objects.list("snapshots/")
        histories = [one for one in listed if one.key.endswith("/history")]
        sizes: dict[str, int] = {}
        for one in listed:
            snapshot_id = one.key.split("/")[1]
            sizes[snapshot_id] = sizes.get(snapshot_id, 0) + one.size
        with ThreadPoolExecutor(_READ_AT_ONCE, thread_name_prefix="snapshots") as pool:
            for record in pool.map(self._peek, histories):
                if record is not None:
                    record.slab_bytes = sizes[record.id] - record.history_bytes
                    self._saved[record.id] = record

    def _peek(self, listed: Listed) -> Record | None:
        snapshot_id = listed.key.split("/")[1]
        try:
            segment = read_segment(self._objects.read(listed.key), snapshot_id, 0, self._history_identity)
        except (Damaged, Unknown, FileNotFoundError) as error:
            _log.warning("left in the store: %s: %s", listed.key, error)
            return None
        assert segment.terms is not None
        return Record(snapshot_id, segment.terms, len(segment.tokens), 0, listed.modified, listed.size)

    # What an open session asks for

    def fell_asleep(self, session_id: str, terms: Terms, length: int) -> None:
        """Remembers that this server was the last to hold a session."""
        with self._lock:
            self._uses += 1
            self._asleep[session_id] = Record(session_id, terms, length, self._uses, self._now(), 0)


class SharedDurable:
    """An open session's record, while this server holds it."""

    is_remote = True

    def __init__(
        self,
        store: SharedStore,
        log: SessionLog,
        slabs: PartFiles,
        slab_identity: SlabIdentity,
        has_moved_here: bool,
        group_s: float,
    ) -> None:
        self.id = log.session_id
        self.terms = log.terms
        self.has_moved_here = has_moved_here
        self.group_s = group_s
        self._store = store
        self._log = log
        self._slabs = slabs
        self._slab_identity = slab_identity
        self._slab_length = 0

    @property
    def slab_length(self) -> int:
        return self._slab_length

    def read_slab(self, slab: Slab, history: array[int]) -> Kept:
        kept = fill(self._slabs, _session_slab(self.id), self._slab_identity, slab, history)
        self._slab_length = slab.frontier
        return kept

    def check(self) -> None:
        with storage_errors("whether the session is still held here is not known"):
            self._log.check()

    def record(self, start: int, token_ids: array[int]) -> None:
        with storage_errors("the session is as it was here, and a retry with expected_history_length is safe"):
            self._log.record(start, token_ids)

    def take_back(self, length: int) -> None:
        self._log.take_back(length)

    def used(self, history: array[int]) -> None:
        # If this fails, the next write finds out, or takes the tokens back.
        with suppress(OSError, SessionMoved):
            self._log.settle()
            self._log.gather(history)

    def new_writer(self, slab: Slab, history: array[int]) -> SlabWriter:
        return SlabWriter(self._slabs, _session_slab(self.id), self._slab_identity, slab, history)

    def wrote(self, writer: SlabWriter) -> None:
        self._slab_length = writer.frontier

    def forget_slab(self) -> None:
        self._slab_length = 0
        try:
            self._slabs.remove(_session_slab(self.id))
        except OSError as error:
            _log.warning("a slab could not be deleted: %s", error.strerror)

    def save(self, slab: Slab, history: array[int]) -> Snapshot:
        return self._store.save(self.terms, history, slab)

    def close(self) -> None:
        try:
            self._log.release()
        except SessionMoved:
            return
        except OSError as error:
            _log.warning("a session is free when its lease has lapsed, and not before: %s", error.strerror)
        self._store.fell_asleep(self.id, self.terms, self._log.length)

    def end(self) -> None:
        with storage_errors("the session goes on"):
            self._log.end()

    def delete(self) -> None:
        try:
            self._log.delete()
        except OSError as error:
            _log.warning("a session that has ended could not be deleted: %s", error.strerror)


def fill(slabs: PartFiles, path: Path, identity: SlabIdentity, slab: Slab, history: array[int]) -> Kept:
    """Fills the slab if the store has a whole one for this engine. Otherwise the history will be read again."""
    slab.clear()
    try:
        read_slab(slabs, path, identity, slab, history)
    except FileNotFoundError:
        return Kept.NOTHING
    except (OSError, Damaged, Unknown) as error:
        slab.clear()
        _log.warning("a history of %d tokens is read again: %s: %s", len(history), path.name, error)
        return Kept.OTHER_ENGINE if isinstance(error, Unknown) else Kept.DAMAGED
    return Kept.SLAB


def _session_slab(session_id: str) -> Path:
    return Path("sessions") / session_id / f"{session_id}{SLAB}"


def _snapshot_slab(snapshot_id: str) -> Path:
    return Path("snapshots") / snapshot_id / f"{snapshot_id}{SLAB}"


def _snapshot_key(snapshot_id: str) -> str:
    return f"snapshots/{snapshot_id}/history"
