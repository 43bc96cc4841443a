"""The tree of conversations on disk: one file with a record for each change.

Each record has a checksum. A damaged one is left out, with what continues from it, and everything after a torn one; the file is
then set aside, and a new one begins with what could be read. A file that is mostly outdated is replaced by a shorter one: by a
thread while the server runs, for that takes seconds, and changes go on in the old file until the new one has them too.
"""

from __future__ import annotations

import errno
import logging
from array import array
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, wait
from contextlib import suppress
from itertools import count
from pathlib import Path

from runtime.durable import points_records as records
from runtime.durable.files import Files, storage_errors
from runtime.durable.framing import write_header
from runtime.durable.identity import HistoryIdentity
from runtime.points import Contents, Node, Point, PointTree

# A file smaller than this is never rewritten, however much of it is outdated.
_SMALL_BYTES = 2**20
_COPIED_AT_ONCE = 2**20

_log = logging.getLogger("perennial.state")


class PointLog:
    """Writes every change of a tree to the file. Its methods raise StorageFailed; then the change must not be made.

    A change that could not be written may leave a torn record, which is cut off at once, or else before the next is written.
    """

    def __init__(
        self,
        files: Files,
        path: Path,
        identity: HistoryIdentity,
        tree: PointTree,
        workers: Executor,
        file: int,
        end: int,
    ) -> None:
        """`file` has everything in the tree, up to its offset `end`. Shorter files are written by the `workers`."""
        self._files = files
        self._path = path
        self._identity = identity
        self._tree = tree
        self._workers = workers
        self._file = file
        self._end = end
        self._is_torn = False
        self._outdated_above = _SMALL_BYTES
        self._rewriting: _Rewriting | None = None

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._end

    def rooted(self, node: Node) -> None:
        self._write(records.rooted(node))

    def grew(self, node: Node) -> None:
        self._write(records.grew(node))

    def dropped(self, node: Node) -> None:
        self._write(records.dropped(node))

    def named(self, name: str, point: Point, record: bytes) -> None:
        self._write(records.named(name, point, record))

    def forgot(self, name: str) -> None:
        self._write(records.forgot(name))

    def close(self) -> None:
        if self._rewriting is not None:
            self._rewriting.give_up()
        with suppress(OSError):
            self._cut_torn()
        with suppress(OSError):
            self._files.close(self._file)

    def _write(self, record: bytes) -> None:
        # The change has not been made yet, so the tree is what the file says.
        self._keep_short()
        with storage_errors("the conversation does not go on"):
            self._cut_torn()
            try:
                self._files.write(self._file, self._end, record)
            except OSError:
                self._is_torn = True
                with suppress(OSError):
                    self._cut_torn()
                raise
        self._end += len(record)

    def _cut_torn(self) -> None:
        # What a failed write left could be a whole record, of a change that was not made.
        if self._is_torn:
            self._files.truncate(self._file, self._end)
            self._is_torn = False

    def _keep_short(self) -> None:
        if self._rewriting is not None:
            if self._rewriting.is_done:
                self._take_rewritten(self._rewriting)
        elif self._end > max(self._outdated_above, 2 * self._tree.size_bytes):
            fresh = _FreshFile(self._files, self._path, self._identity, self._tree.contents())
            self._rewriting = _Rewriting(self._workers, fresh, self._file, self._end, lambda: self._end)

    def _take_rewritten(self, rewriting: _Rewriting) -> None:
        self._rewriting = None
        try:
            file, end = rewriting.finish()
        except OSError as error:
            rewriting.give_up()
            _log.warning("%s stays long for now: %s", self._path.name, error.strerror or type(error).__name__)
            # Another try costs as much as this one.
            self._outdated_above = self._end + self._end // 4
            return
        # The last to close a file that was replaced frees its blocks, for some tenths of a second.
        self._workers.submit(self._files.close, self._file)
        self._file, self._end, self._is_torn = file, end, False
        # Heads, and JSON's escapes, may take more room in a file than the tree says.
        self._outdated_above = max(_SMALL_BYTES, 2 * end)


class _FreshFile:
    """A file beside the log's, which takes its place once it has everything that the log has."""

    def __init__(self, files: Files, path: Path, identity: HistoryIdentity, contents: Contents) -> None:
        self._files = files
        self._path = path
        self._identity = identity
        self._contents = contents
        self._fresh = path.with_suffix(".new")
        self._file: int | None = None
        self._end = 0
        self._is_given_up = False

    def write(self) -> None:
        """Writes the contents. Raises OSError."""
        self._file = self._files.create(self._fresh)
        header = {"identity": self._identity.to_json()}
        self._end, _ = write_header(self._files, self._file, records.MAGIC, records.VERSION, header)
        for block in _blocks(records.all_of(self._contents)):
            if self._is_given_up:
                return
            self._append(block)

    def copy(self, source: int, begin: int, end: int) -> None:
        """Copies records of the log's file. Raises OSError."""
        content = self._files.read(source, begin, end - begin)
        if len(content) < end - begin:
            raise OSError(errno.EIO, "it was cut short")
        self._append(content)

    def sync(self) -> None:
        """Waits until the content is on disk: a power cut may take the last changes, and must not take all. Raises OSError."""
        assert self._file is not None
        self._files.sync(self._file)

    def take_place(self) -> tuple[int, int]:
        """Moves the file into the log's place; returns it and its end. Raises OSError."""
        assert self._file is not None
        self._files.replace(self._fresh, self._path)
        return self._file, self._end

    def stop(self) -> None:
        """Makes `write` return soon, which may run in another thread."""
        self._is_given_up = True

    def remove(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._files.close(self._file)
            with suppress(OSError):
                self._files.remove(self._fresh)

    def _append(self, content: bytes) -> None:
        assert self._file is not None
        self._files.write(self._file, self._end, content)
        self._end += len(content)


class _Rewriting:
    """A fresh file that a worker writes, while the log goes on in its own file: behind `begin`, and by now up to `end()`."""

    def __init__(self, workers: Executor, fresh: _FreshFile, source: int, begin: int, end: Callable[[], int]) -> None:
        self._fresh = fresh
        self._source = source
        self._copied = begin
        self._end = end
        self._work: Future[None] = workers.submit(self._run)

    @property
    def is_done(self) -> bool:
        return self._work.done()

    def finish(self) -> tuple[int, int]:
        """Copies the log's last records, and moves the file into the log's place; returns it and its end. Raises OSError."""
        self._work.result()
        self._copy(self._end())
        return self._fresh.take_place()

    def give_up(self) -> None:
        self._fresh.stop()
        if not self._work.cancel():
            wait([self._work])
        self._fresh.remove()

    def _run(self) -> None:
        self._fresh.write()
        # The rest is for `finish`, which keeps the server waiting.
        while self._end() - self._copied > _COPIED_AT_ONCE:
            self._copy(self._copied + _COPIED_AT_ONCE)
        self._fresh.sync()

    def _copy(self, end: int) -> None:
        self._fresh.copy(self._source, self._copied, end)
        self._copied = end


def open_points(
    files: Files,
    path: Path,
    aside: Path,
    identity: HistoryIdentity,
    most_bytes: int,
    is_token: Callable[[array[int]], bool],
    workers: Executor,
) -> tuple[PointTree, PointLog]:
    """Opens the file, which is made if missing; returns its tree, whose changes are written there.

    Shorter files are written by the `workers` later. Raises OSError or StorageFailed.
    """
    tree, is_whole, size = PointTree(), True, 0
    if files.size(path):
        file = files.open(path)
        try:
            is_whole, size = records.read(files, file, identity, tree, is_token)
        finally:
            files.close(file)
        if not is_whole:
            files.replace(path, _place_aside(files, aside, path.name))
    is_outdated = size > max(_SMALL_BYTES, 2 * tree.size_bytes)
    if size and is_whole and not is_outdated:
        file = files.open(path)
    else:
        fresh = _FreshFile(files, path, identity, tree.contents())
        try:
            fresh.write()
            fresh.sync()
            file, size = fresh.take_place()
        except BaseException:
            fresh.remove()
            raise
    log = PointLog(files, path, identity, tree, workers, file, size)
    try:
        tree.go_on_in(log)
        tree.bound(most_bytes)
    except BaseException:
        log.close()
        raise
    return tree, log


def _place_aside(files: Files, aside: Path, name: str) -> Path:
    """A path for a file of this name, under which no earlier one was set aside."""
    taken = files.names(aside)
    return aside / next(place for number in count() if (place := f"{name}.{number}" if number else name) not in taken)


def _blocks(parts: Iterable[bytes]) -> Iterable[bytes]:
    """The same bytes in larger blocks."""
    block = bytearray()
    for part in parts:
        block += part
        if len(block) >= _COPIED_AT_ONCE:
            yield bytes(block)
            block.clear()
    yield bytes(block)
