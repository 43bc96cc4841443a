"""All file operations of the store, so that a test can put a class here that makes one of them fail."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.errors import StorageFailed, StorageFull

# Errors that making room, or waiting, can cure.
_PASSING = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM, errno.EFBIG, errno.ETIMEDOUT}
)
# Whatever the umask, no other user may read conversations.
FILE_MODE, FOLDER_MODE = 0o600, 0o700


class Files:
    """Every method raises OSError."""

    def create(self, path: Path) -> int:
        """Creates an empty file; returns its descriptor, for reading and writing."""
        return self._open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)

    def reuse(self, path: Path) -> int:
        """Opens a file to overwrite it, or creates it; returns its descriptor."""
        return self._open(path, os.O_RDWR | os.O_CREAT)

    def truncate(self, file: int, size: int) -> None:
        os.ftruncate(file, size)

    def sync(self, file: int) -> None:
        """Waits until the file's content is on disk."""
        os.fsync(file)

    def open(self, path: Path) -> int:
        """Opens an existing file; returns its descriptor, for reading and writing."""
        return self._open(path, os.O_RDWR)

    def read(self, file: int, offset: int, count: int) -> bytes:
        """`count` bytes from `offset` on; fewer only at the end of the file."""
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
        """Writes all of `content` at `offset`. If it raises, a part may have been written."""
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
        """Removes a file, if it exists."""
        path.unlink(missing_ok=True)

    def make_folder(self, path: Path) -> None:
        """Makes a folder that only this user can read, if it is missing."""
        path.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
        path.chmod(FOLDER_MODE)

    def names(self, folder: Path) -> list[str]:
        return os.listdir(folder)

    def size(self, path: Path) -> int:
        """The size of a file in bytes; 0 if it does not exist."""
        try:
            return path.stat().st_size
        except FileNotFoundError:
            return 0

    def _open(self, path: Path, flags: int) -> int:
        file = os.open(path, flags | os.O_CLOEXEC, FILE_MODE)
        # An older server may have left the file readable to others.
        os.fchmod(file, FILE_MODE)
        return file


@contextmanager
def storage_errors(consequence: str) -> Iterator[None]:
    """Turns errors of the file system in the block into StorageFailed, whose message says what it means for the caller."""
    try:
        yield
    except OSError as error:
        kind = StorageFull if error.errno in _PASSING else StorageFailed
        raise kind(f"state_dir cannot be used: {error.strerror or type(error).__name__}; {consequence}") from error
