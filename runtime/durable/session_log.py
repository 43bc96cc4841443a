"""A session's history in an object store, and the lease on the session, which is part of the same log.

Who holds a session is who wrote its last segment, for so long as that is young; a RELEASE gives it up, and a CREATE alone holds
nothing. Another one takes it
by a CLAIM, which is the next segment and opens the next epoch. The earlier holder's next write would have that same number,
so it fails: the log itself fences. The clock only says when a holder may be taken for gone; where it lies, a session
moves too early or too late, and nothing else happens.

A claim from a holder that had not given up is never deleted while the session lives, nor is it when the session has ended:
without it, a write that comes late would find its number free.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from runtime.durable.framing import Damaged, Unknown
from runtime.durable.identity import HistoryIdentity, Terms
from runtime.durable.objects import Listed, Objects
from runtime.durable.segments import Kind, Segment, read_segment, seal_of
from runtime.errors import SessionMoved, SessionNotFound

# When a log has this many segments, its holder replaces them with one object.
MOST_SEGMENTS = 64
# A listing may be outdated because the session's holder has just replaced segments with one object: list again, this often.
_LISTINGS = 5
_READ_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Lease:
    """Who may write a session: in this epoch its `holder`, unless it was released.

    A session that was made and never used has no holder, because another server may be asked for it first.
    """

    holder: str
    epoch: int
    is_released: bool
    is_unused: bool
    written_at: float


@dataclass(frozen=True, slots=True)
class Found:
    """A session's log as it was read, up to the segment with this number and this seal."""

    terms: Terms
    history: array[int]
    lease: Lease
    number: int
    seal: bytes
    base: int
    kept: tuple[int, ...]
    segments: int
    is_closed: bool


class SessionLog:
    """One session's log, open for writing by one holder.

    Methods that write raise OSError, after which the segment may exist or not, or SessionMoved, after which it does not. A
    later write finds out, and takes back tokens that nobody was told of.
    """

    def __init__(
        self,
        objects: Objects,
        session_id: str,
        identity: HistoryIdentity,
        terms: Terms,
        holder: str,
        epoch: int,
        *,
        number: int = -1,
        seal: bytes = b"",
        length: int = 0,
        base: int = -1,
        kept: tuple[int, ...] = (),
        segments: int = 0,
        taken_from: str | None = None,
    ) -> None:
        self.session_id = session_id
        self.terms = terms
        self.epoch = epoch
        self.taken_from = taken_from
        self._objects = objects
        self._identity = identity
        self._holder = holder
        self._number = number
        self._seal = seal
        self._length = length
        self._base = base
        self._kept = kept
        self._segments = segments
        self._owed: int | None = None

    @classmethod
    def create(
        cls,
        objects: Objects,
        session_id: str,
        identity: HistoryIdentity,
        terms: Terms,
        holder: str,
        history: array[int],
    ) -> SessionLog:
        """Creates the log of a new session with this history. If it raises OSError, nobody knows of the session."""
        log = cls(objects, session_id, identity, terms, holder, 1)
        log._write(Kind.CREATE, 0, history)
        return log

    @classmethod
    def claim(
        cls,
        objects: Objects,
        session_id: str,
        identity: HistoryIdentity,
        holder: str,
        is_token: Callable[[array[int]], bool],
        has_lapsed: Callable[[Lease], bool],
    ) -> tuple[SessionLog, array[int]]:
        """Takes a session that nobody holds, or whose lease has lapsed or is this holder's; returns its log and its history.

        Raises SessionNotFound, SessionMoved if another server holds it, OSError, Damaged or Unknown.
        """
        found = read_log(objects, session_id, identity)
        if found.is_closed:
            raise SessionNotFound("the session was closed")
        if not is_token(found.history):
            raise Damaged("it holds tokens that the model does not have")
        lease = found.lease
        if not (lease.is_released or lease.is_unused or lease.holder == holder or has_lapsed(lease)):
            raise SessionMoved(
                "moved: another server holds the session; ask that one, or try again when its lease has lapsed"
            )
        log = cls(
            objects,
            session_id,
            identity,
            found.terms,
            holder,
            lease.epoch + 1,
            number=found.number,
            seal=found.seal,
            length=len(found.history),
            base=found.base,
            kept=found.kept,
            segments=found.segments,
            taken_from=lease.holder,
        )
        log._write(Kind.CLAIM, len(found.history), array("I"))
        if not lease.is_released:
            log._kept = (*found.kept, log._number)
        if log._segments >= MOST_SEGMENTS:
            log.gather(found.history)
        return log, found.history

    @property
    def length(self) -> int:
        """The number of tokens recorded."""
        return self._length

    def record(self, start: int, tokens: array[int]) -> None:
        """Records these tokens from position `start` on, in place of any that were recorded there."""
        if tokens or start != self._length:
            self._write(Kind.TOKENS, start, tokens)
        self._owed = None

    def take_back(self, length: int) -> None:
        """Forgets the tokens from `length` on, with the next write."""
        self._owed = length

    def settle(self) -> None:
        """Writes a change that is still to be written."""
        if self._owed is not None:
            self.record(self._owed, array("I"))

    def check(self) -> None:
        """Raises SessionMoved if another server has taken the session."""
        while self._objects.has(self._key(self._number + 1)):
            self._follow(self._objects.read(self._key(self._number + 1)))

    def gather(self, history: array[int]) -> None:
        """Once there are many segments, writes the whole history as one object and deletes them. Failures are ignored."""
        if self._segments < MOST_SEGMENTS or len(history) != self._length:
            return
        base = Segment(
            self.session_id,
            self._number,
            Kind.BASE,
            self.epoch,
            self._holder,
            0,
            history,
            self._seal,
            self._identity,
            self.terms,
        )
        with suppress(OSError):
            self._objects.put(f"{_folder(self.session_id)}base/{self._number:012d}", base.to_bytes())
            old = [number for number in range(self._base + 1, self._number + 1) if number not in self._kept]
            before, self._base, self._segments = self._base, self._number, 0
            keys = [self._key(number) for number in old]
            self._objects.delete([*keys, f"{_folder(self.session_id)}base/{before:012d}"] if before >= 0 else keys)

    def release(self) -> None:
        """Gives the session up, so that any server may take it at once."""
        start = self._length if self._owed is None else self._owed
        self._write(Kind.RELEASE, start, array("I"))

    def end(self) -> None:
        """Records that the session has ended, so that no server can take it."""
        self._write(Kind.CLOSE, self._length, array("I"))

    def delete(self) -> None:
        """Deletes the objects of a session that has ended, except the one that blocks writes by earlier holders."""
        folder = _folder(self.session_id)
        kept = {self._key(number) for number in (*self._kept, self._number)}
        self._objects.delete([one.key for one in self._objects.list(folder) if one.key not in kept])
        if not self._kept:
            self._objects.delete([self._key(self._number)])

    def _write(self, kind: Kind, start: int, tokens: array[int]) -> None:
        is_first = kind is Kind.CREATE
        while True:
            segment = Segment(
                self.session_id,
                self._number + 1,
                kind,
                self.epoch,
                self._holder,
                start,
                tokens,
                self._seal,
                self._identity if is_first else None,
                self.terms if is_first else None,
            )
            content = segment.to_bytes()
            try:
                self._objects.create(self._key(segment.number), content)
            except FileExistsError:
                found = self._objects.read(self._key(segment.number))
                if found != content:
                    self._follow(found)
                    continue
            self._advance(segment, content)
            return

    def _follow(self, content: bytes) -> None:
        """Continues after an existing segment if it is ours, of a write whose answer was lost. Otherwise raises SessionMoved."""
        try:
            segment = read_segment(content, self.session_id, self._number + 1, self._identity)
        except (Damaged, Unknown) as error:
            raise SessionMoved(f"moved: the session cannot go on here: {error}") from None
        if (segment.holder, segment.epoch) != (self._holder, self.epoch):
            raise SessionMoved(f"moved: another server has taken the session, in epoch {segment.epoch}; ask that one")
        # Nobody was told of its tokens, so the history is unchanged.
        if self._owed is None:
            self._owed = self._length
        self._advance(segment, content)

    def _advance(self, segment: Segment, content: bytes) -> None:
        self._number, self._seal = segment.number, seal_of(content)
        self._length = segment.start + len(segment.tokens)
        self._segments += 1

    def _key(self, number: int) -> str:
        return f"{_folder(self.session_id)}log/{number:012d}"


def read_log(objects: Objects, session_id: str, identity: HistoryIdentity) -> Found:
    """Reads a session's log. Raises SessionNotFound, OSError, Damaged or Unknown."""
    listings = 0
    while True:
        listed = objects.list(_folder(session_id))
        try:
            return _read_listed(objects, session_id, identity, listed)
        except (FileNotFoundError, _Missing) as error:
            # The session's holder may have replaced segments with one object during the listing or after it.
            listings += 1
            if listings == _LISTINGS:
                raise Damaged("a segment of it is missing") from error


class _Missing(Exception):
    """The listing has a gap."""


def _read_listed(objects: Objects, session_id: str, identity: HistoryIdentity, listed: list[Listed]) -> Found:
    log, bases = (_by_number(listed, f"{_folder(session_id)}{folder}/") for folder in ("log", "base"))
    if not log and not bases:
        raise SessionNotFound("no session has this id")
    base = max(bases, default=-1)
    numbers = sorted(number for number in log if number > base)
    if numbers != list(range(base + 1, base + 1 + len(numbers))):
        last_content = objects.read(log[numbers[-1]].key)
        if read_segment(last_content, session_id, numbers[-1], identity).kind is Kind.CLOSE:
            raise SessionNotFound("the session was closed")
        raise _Missing
    history = array("I")
    terms: Terms | None = None
    seal = b""
    last: Segment | None = None
    kept = [number for number in sorted(log) if number <= base]
    keys = ([bases[base].key] if bases else []) + [log[number].key for number in numbers]
    for at, content in zip(([base] if bases else []) + numbers, _read_all(objects, keys), strict=True):
        segment = read_segment(content, session_id, at, identity)
        is_base = segment.kind is Kind.BASE
        if segment.start > len(history) or (segment.before != seal and not is_base):
            raise Damaged(f"segment {at} does not follow the one before it")
        # A base is only written by a holder, so the log that it replaces did not end with a release.
        if segment.kind is Kind.CLAIM and last is not None and last.kind is not Kind.RELEASE:
            kept.append(at)
        del history[segment.start :]
        history += segment.tokens
        seal = segment.before if is_base else seal_of(content)
        terms = segment.terms or terms
        last = segment
    if last is None or terms is None:
        raise Damaged("its first segment is missing")
    written_at = (log[numbers[-1]] if numbers else bases[base]).modified
    lease = Lease(last.holder, last.epoch, last.kind is Kind.RELEASE, last.kind is Kind.CREATE, written_at)
    return Found(
        terms,
        history,
        lease,
        last.number,
        seal,
        base,
        tuple(kept),
        len(numbers),
        is_closed=last.kind is Kind.CLOSE,
    )


def _read_all(objects: Objects, keys: list[str]) -> list[bytes]:
    if len(keys) < _READ_AT_ONCE // 4:
        return [objects.read(key) for key in keys]
    with ThreadPoolExecutor(_READ_AT_ONCE, thread_name_prefix="segments") as pool:
        return list(pool.map(objects.read, keys))


def _by_number(listed: list[Listed], prefix: str) -> dict[int, Listed]:
    names = ((one.key.removeprefix(prefix), one) for one in listed if one.key.startswith(prefix))
    # Objects with other names are not ours.
    return {int(name): one for name, one in names if name.isdecimal()}


def _folder(session_id: str) -> str:
    return f"sessions/{session_id}/"
