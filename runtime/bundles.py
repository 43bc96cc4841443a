"""Bundles: large parts that take long to make, in files of this user's cache that each start after the first maps.

    GROUP-STATE-KIND/index.json   what is in it, with the length and the check of each part; locked by whoever has it open
    GROUP-STATE-KIND/NAME         a part
    .RANDOM/                      one that is being written
    turn                          locked by who makes room and begins one

A bundle appears whole or not at all. Bundles of one group and another state than a new one's are of a time that is gone. A
part is mapped for this process alone: pages that were handed back are read again from the file where somebody asks for them.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import mmap
import os
import shutil
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import IO, Any

_INDEX = "index.json"
_SCRATCH, _TURN = ".", "turn"
# Of the disk that they lie on: what all bundles may take, and what they leave free, of a large disk so many bytes.
_MOST_SHARE, _FREE_SHARE, _MOST_FREE = 1 / 4, 1 / 20, 4 * 2**30

# Linux holds what is written at once as one piece, and maps all of it where a number of it is read.
_WRITTEN_AT_ONCE = 2**16


class BundleDamaged(Exception):
    """Files that are not what was written."""


@dataclass(frozen=True, slots=True)
class BundleName:
    """`group` names what a bundle is made of, `state` all on which its content depends, and `kind` one of several of it.

    Neither of the first two may have a dash in it.
    """

    group: str
    state: str
    kind: str

    def __str__(self) -> str:
        return f"{self.group}-{self.state}-{self.kind}"


class Bundle:
    """One that is there. For as long as it is held, nobody clears it away."""

    def __init__(self, folder: Path, content: Mapping[str, Any]) -> None:
        self.facts: Mapping[str, Any] = content["facts"]
        self._folder = folder
        self._checks: Mapping[str, tuple[int, int]] = {name: tuple(one) for name, one in content["parts"].items()}
        self._mapped = {name: _map(folder / name) for name in self._checks}
        for name, (length, _) in self._checks.items():
            if len(self._mapped[name]) != length:
                raise BundleDamaged(f"{folder / name} is not as long as it was")

    @classmethod
    def open(cls, folder: Path) -> Bundle | None:
        """The bundle in a folder, or None where there is none. Raises BundleDamaged."""
        with ExitStack() as stack:
            try:
                lock = stack.enter_context((folder / _INDEX).open("rb"))
            except OSError as error:
                if folder.exists():
                    raise BundleDamaged(f"{folder} cannot be read") from error
                return None
            if not _has_locked(lock, fcntl.LOCK_SH):
                return None
            try:
                bundle = cls(folder, _content(lock.read()))
            except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
                if not (folder / _INDEX).exists():
                    # Whoever has cleared it away was there before the lock.
                    return None
                raise BundleDamaged(f"{folder} is damaged") from error
            with suppress(OSError):
                os.utime(lock.fileno())
            weakref.finalize(bundle, stack.pop_all().close)
            return bundle

    def part(self, name: str) -> mmap.mmap:
        """A part, all of whose bytes are read once. What is written to it stays in memory. Raises BundleDamaged."""
        mapped = self._mapped[name]
        if zlib.crc32(mapped) != self._checks[name][1]:
            raise BundleDamaged(f"{self._folder / name} is damaged")
        return mapped


class BundleWriter:
    """One that is being made, in a folder of its own. Threads may add parts side by side."""

    def __init__(self, scratch: Path, lock: IO[bytes]) -> None:
        self._scratch, self._lock = scratch, lock
        self._checks: dict[str, tuple[int, int]] = {}

    def add(self, name: str, content: memoryview) -> mmap.mmap:
        """Writes a part of bytes, not an empty one, and maps it. Raises OSError, also where the disk would be all but full."""
        if not _has_room(self._scratch, content.nbytes):
            raise _no_room(content.nbytes)
        path = self._scratch / name
        with path.open("xb") as file:
            for at in range(0, content.nbytes, _WRITTEN_AT_ONCE):
                file.write(content[at : at + _WRITTEN_AT_ONCE])
        self._checks[name] = content.nbytes, zlib.crc32(content)
        return _map(path)

    def finish(self, name: BundleName, facts: Mapping[str, Any]) -> None:
        """Has it appear under this name, unless another one of that name did meanwhile. Raises OSError."""
        self._lock.write(_index({"facts": facts, "parts": self._checks}))
        self._lock.flush()
        folder = self._scratch.parent
        for old in _bundles(folder):
            if old.name.startswith(f"{name.group}-") and not old.name.startswith(f"{name.group}-{name.state}-"):
                _clear(old)
        try:
            self._scratch.rename(folder / str(name))
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise


@contextmanager
def new_bundle(folder: Path, most_bytes: int, is_of_use: Callable[[Mapping[str, Any]], bool]) -> Iterator[BundleWriter]:
    """A bundle of at most about so many bytes, to be finished in the block, or nothing of it stays.

    Room is made for it by clearing away those whose facts are of no use any more, and those that were not opened for longest.

    Raises OSError where it cannot be written, or would not fit.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with ExitStack() as stack:
        with (folder / _TURN).open("ab") as turn:
            # One that has been begun and is not locked yet looks like one that was left.
            with suppress(OSError):
                fcntl.flock(turn, fcntl.LOCK_EX)
            _make_room(folder, most_bytes, is_of_use)
            scratch = Path(mkdtemp(prefix=_SCRATCH, dir=folder))
            # Whoever has mapped a part keeps it.
            stack.callback(shutil.rmtree, scratch, ignore_errors=True)
            lock = stack.enter_context((scratch / _INDEX).open("xb"))
            _has_locked(lock, fcntl.LOCK_EX)
        yield BundleWriter(scratch, lock)


def remove_bundle(folder: Path) -> None:
    """Whoever has it open keeps what was mapped. What cannot be removed stays."""
    shutil.rmtree(folder, ignore_errors=True)


def let_go(mapped: mmap.mmap) -> None:
    """Has a part take no memory until it is read again. Nothing may have been written to it."""
    if hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def _make_room(folder: Path, most_bytes: int, is_of_use: Callable[[Mapping[str, Any]], bool]) -> None:
    """Raises OSError where there is none to be had."""
    most = shutil.disk_usage(folder).total * _MOST_SHARE
    if most_bytes > most:
        raise _no_room(most_bytes)
    sizes: dict[Path, int] = {}
    for one in sorted(_bundles(folder), key=_last_use):
        if one.name.startswith(_SCRATCH) or not is_of_use(_facts(one)):
            _clear(one)
        if one.exists():
            sizes[one] = _size(one)
    if not _has_room(folder, most_bytes - sum(sizes.values())):
        raise _no_room(most_bytes)
    for oldest in [*sizes, None]:
        if _has_room(folder, most_bytes) and sum(sizes.values()) + most_bytes <= most:
            return
        if oldest and _clear(oldest):
            del sizes[oldest]
    raise _no_room(most_bytes)


def _has_room(folder: Path, more_bytes: int) -> bool:
    """Whether the disk has what is to be left free after so much more was written."""
    usage = shutil.disk_usage(folder)
    return usage.free - more_bytes >= min(usage.total * _FREE_SHARE, _MOST_FREE)


def _no_room(more_bytes: int) -> OSError:
    return OSError(
        errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} for {more_bytes / 2**20:,.1f} MiB beside what is left free"
    )


def _bundles(folder: Path) -> list[Path]:
    return [one for one in folder.iterdir() if one.is_dir()]


def _last_use(bundle: Path) -> float:
    with suppress(OSError):
        return (bundle / _INDEX).stat().st_mtime
    return 0.0


def _size(bundle: Path) -> int:
    with suppress(OSError):
        return sum(one.stat().st_size for one in bundle.iterdir())
    return 0


def _facts(bundle: Path) -> Mapping[str, Any]:
    with suppress(OSError, ValueError, TypeError, LookupError, AttributeError):
        facts: Mapping[str, Any] = _content((bundle / _INDEX).read_bytes())["facts"]
        return facts
    return {}


def _clear(bundle: Path) -> bool:
    """Removes a bundle that nobody has open, or that nobody goes on writing; whether it is gone."""
    try:
        with (bundle / _INDEX).open("r+b") as lock:
            if not _has_locked(lock, fcntl.LOCK_EX):
                return False
            shutil.rmtree(bundle)
    except OSError:
        return False
    return True


def _has_locked(file: IO[bytes], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        # Some file systems have no locks: what is open there can be read, and is not cleared away.
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES) and kind == fcntl.LOCK_SH
    return True


def _index(content: Mapping[str, Any]) -> bytes:
    """JSON under a line with its digest."""
    text = json.dumps(content).encode()
    return hashlib.sha256(text).hexdigest().encode() + b"\n" + text


def _content(index: bytes) -> Mapping[str, Any]:
    """Raises ValueError where it is not what was written."""
    digest, _, text = index.partition(b"\n")
    if digest.decode() != hashlib.sha256(text).hexdigest():
        raise ValueError("the digest is of something else")
    content: Mapping[str, Any] = json.loads(text)
    return content


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        # OpenVINO takes memory that can be written to; what would be written is a copy.
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
