"""Slabs in an object store: the same bytes as in a file, cut into parts, and an object that names the parts, written last.

Each writer has parts of its own, so a write that was given up, or that another server does at the same time, does not
interfere.
"""

from __future__ import annotations

import errno
import json
import secrets
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from runtime.durable.files import Files
from runtime.durable.framing import Damaged
from runtime.durable.objects import Objects
from runtime.durable.slab_file import PARTIAL

PART_BYTES = 8 * 2**20
# The most parts of a slab that are fetched ahead while it is read.
_AHEAD = 4


@dataclass(slots=True)
class _Upload:
    """A slab that is being written: the bytes not sent yet, and the size so far."""

    path: Path
    folder: str
    rest: bytearray = field(default_factory=bytearray)
    parts: int = 0
    size: int = 0


@dataclass(slots=True)
class _Download:
    """A slab that is being read from its beginning to its end."""

    content: Iterator[bytes]
    pool: ThreadPoolExecutor
    rest: bytearray = field(default_factory=bytearray)
    at: int = 0


class PartFiles(Files):
    """The file operations with which slabs are written and read, on an object store. A path is a key; access is sequential."""

    def __init__(self, objects: Objects, part_bytes: int = PART_BYTES) -> None:
        self._objects = objects
        self._part_bytes = part_bytes
        self._numbers = count()
        self._uploads: dict[int, _Upload] = {}
        self._downloads: dict[int, _Download] = {}
        self._places: dict[Path, int] = {}

    def reuse(self, path: Path) -> int:
        """Begins to write an object anew; returns a descriptor."""
        file = next(self._numbers)
        self._uploads[file] = _Upload(path, f"{_parts_of(path)}{secrets.token_urlsafe(9)}/")
        self._places[path] = file
        return file

    def write(self, file: int, offset: int, content: bytes | memoryview) -> None:
        upload = self._uploads[file]
        if offset != upload.size:
            raise OSError(errno.ESPIPE, "a slab is written from its beginning to its end")
        upload.rest += content
        upload.size += len(content)
        while len(upload.rest) >= self._part_bytes:
            self._send(upload, self._part_bytes)

    def truncate(self, file: int, size: int) -> None:
        """Sends the rest: what was written is whole."""
        upload = self._uploads[file]
        if upload.rest:
            self._send(upload, len(upload.rest))

    def replace(self, source: Path, target: Path) -> None:
        """Makes `target` name what was written to `source`."""
        upload = self._uploads[self._places[source]]
        told = {"folder": upload.folder, "parts": upload.parts, "size": upload.size}
        self._objects.put(_key(target), json.dumps(told).encode())
        listed = self._objects.list(_parts_of(target))
        self._objects.delete([one.key for one in listed if not one.key.startswith(upload.folder)])

    def open(self, path: Path) -> int:
        try:
            told = json.loads(self._objects.read(_key(path)))
            keys = [f"{told['folder']}{number:06d}" for number in range(told["parts"])]
        except (KeyError, TypeError, ValueError) as error:
            raise Damaged("what names its parts was changed") from error
        pool = ThreadPoolExecutor(_AHEAD, thread_name_prefix="parts")
        file = next(self._numbers)
        self._downloads[file] = _Download(_ahead(pool, self._objects, keys), pool)
        return file

    def read(self, file: int, offset: int, count: int) -> bytes:
        download = self._downloads[file]
        if offset != download.at:
            raise OSError(errno.ESPIPE, "a slab is read from its beginning to its end")
        while len(download.rest) < count and (part := next(download.content, None)) is not None:
            download.rest += part
        content = bytes(download.rest[:count])
        del download.rest[:count]
        download.at += len(content)
        return content

    def close(self, file: int) -> None:
        if (upload := self._uploads.pop(file, None)) is not None:
            self._places.pop(upload.path, None)
        if (download := self._downloads.pop(file, None)) is not None:
            download.pool.shutdown(wait=False, cancel_futures=True)

    def remove(self, path: Path) -> None:
        """Removes a slab. Parts of a write that was given up are removed by the next finished write."""
        if path.suffix != PARTIAL:
            listed = self._objects.list(_parts_of(path))
            self._objects.delete([_key(path), *(one.key for one in listed)])

    def _send(self, upload: _Upload, size: int) -> None:
        self._objects.put(f"{upload.folder}{upload.parts:06d}", bytes(upload.rest[:size]))
        del upload.rest[:size]
        upload.parts += 1


def _ahead(pool: ThreadPoolExecutor, objects: Objects, keys: list[str]) -> Iterator[bytes]:
    waiting: deque[Future[bytes]] = deque()
    left = iter(keys)
    while True:
        while len(waiting) < _AHEAD and (key := next(left, None)) is not None:
            waiting.append(pool.submit(objects.read, key))
        if not waiting:
            return
        yield waiting.popleft().result()


def _key(path: Path) -> str:
    return path.as_posix()


def _parts_of(path: Path) -> str:
    return f"{path.parent.as_posix()}/parts/"
