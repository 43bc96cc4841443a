"""The file operations of the store, and no other ones: a test that makes one of them fail stands in this place."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.errors import StorageFailed, StorageFull

# What making room, or waiting, mends.
_PASSING = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM, errno.EFBIG, errno.ETIMEDOUT}
)
# Whatever the umask is, nobody else reads what was said.
FILE_MODE, FOLDER_MODE = 0o600, 0o700


class Files:
    """Every method raises OSError."""

    def create(self, path: Path) -> int:
        """A descriptor of a new, empty file, to be read and written."""
        return self._opened(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)

    def reuse(self, path: Path) -> int:
        """A descriptor of a file to be written over, or of a new one."""
        return self._opened(path, os.O_RDWR | os.O_CREAT)

    def truncate(self, file: int, size: int) -> None:
        os.ftruncate(file, size)

    def open(self, path: Path) -> int:
        """A descriptor of a file that is there, to be read and written."""
        return self._opened(path, os.O_RDWR)

    def read(self, file: int, offset: int, count: int) -> bytes:
        """Up to `count` bytes from `offset` on, fewer at the file's end alone."""
        parts = []
        while count:
            part = os.pread(file, count, offset)
            if not part:
                break
            parts.append(part)
            offset += len(part)
            count -= len(part)
        return b"".join(parts)

    def write(self, file: int, offset: int, content: bytes | memoryview) -> None:
        """Writes all of `content` at `offset`, or raises; a part of it may be there then."""
        rest = memoryview(content)
        while rest:
            written = os.pwrite(file, rest, offset)
            offset += written
            rest = rest[written:]

    def close(self, file: int) -> None:
        os.close(file)

    def replace(self, source: Path, target: Path) -> None:
        source.replace(target)

    def remove(self, path: Path) -> None:
        """Removes a file; one that is not there is removed already."""
        path.unlink(missing_ok=True)

    def make_folder(self, path: Path) -> None:
        """A folder of our own, made where it is missing."""
        path.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
        path.chmod(FOLDER_MODE)

    def names(self, folder: Path) -> list[str]:
        return os.listdir(folder)

    def size(self, path: Path) -> int:
        """Bytes of a file, 0 where there is none."""
        try:
            return path.stat().st_size
        except FileNotFoundError:
            return 0

    def _opened(self, path: Path, flags: int) -> int:
        file = os.open(path, flags | os.O_CLOEXEC, FILE_MODE)
        # An older server may have left it readable to others.
        os.fchmod(file, FILE_MODE)
        return file


@contextmanager
def storage_errors(consequence: str) -> Iterator[None]:
    """Turns what the file system raises in the block into StorageFailed, which says what it means for who asked."""
    try:
        yield
    except OSError as error:
        kind = StorageFull if error.errno in _PASSING else StorageFailed
        raise kind(f"state_dir cannot be used: {error.strerror or type(error).__name__}; {consequence}") from error
