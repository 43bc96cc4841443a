"""File operations that fail when a test wants them to: the disk is full, gone, read-only, or the process is killed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from runtime.durable.files import Files

FAULTS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EMFILE, errno.EACCES)


class Killed(BaseException):
    """The process ends here, whatever would have come next."""


class FaultyFiles(Files):
    """Fails from some operation on, for as long as it is told to; a write that fails leaves a part behind.

    `fail_at` counts operations that change something. With `error` None the process is killed there.
    """

    def __init__(self) -> None:
        self.operations = 0
        self.fail_at: int | None = None
        self.fail_for = 1
        self.error: int | None = errno.ENOSPC
        self.share = 0.5
        self.is_killed = False
        self._held: set[int] = set()

    def fail_next(self, error: int | None, after: int = 0, count: int = 1, share: float = 0.5) -> None:
        """The operation that comes `after` so many others fails, and the `count` - 1 behind it."""
        self.fail_at, self.fail_for = self.operations + after, count
        self.error, self.share = error, share

    def heal(self) -> None:
        self.fail_at = None

    def reap(self) -> None:
        """Does what the system does for a process that was killed."""
        while self._held:
            os.close(self._held.pop())

    def create(self, path: Path) -> int:
        self._operate()
        self._held.add(file := super().create(path))
        return file

    def reuse(self, path: Path) -> int:
        self._operate()
        self._held.add(file := super().reuse(path))
        return file

    def truncate(self, file: int, size: int) -> None:
        self._operate()
        super().truncate(file, size)

    def sync(self, file: int) -> None:
        self._operate()
        super().sync(file)

    def open(self, path: Path) -> int:
        self._operate()
        self._held.add(file := super().open(path))
        return file

    def close(self, file: int) -> None:
        self._held.discard(file)
        super().close(file)

    def write(self, file: int, offset: int, content: bytes | memoryview) -> None:
        try:
            self._operate()
        except BaseException:
            part = memoryview(content)[: int(len(content) * self.share)]
            os.pwrite(file, part, offset)
            raise
        super().write(file, offset, content)

    def replace(self, source: Path, target: Path) -> None:
        self._operate()
        super().replace(source, target)

    def remove(self, path: Path) -> None:
        self._operate()
        super().remove(path)

    def _operate(self) -> None:
        at = self.operations
        self.operations += 1
        if self.fail_at is None or not self.fail_at <= at < self.fail_at + self.fail_for:
            return
        if self.error is None:
            # Nothing is undone by a process that is gone.
            self.fail_for = 2**62
            self.is_killed = True
            raise Killed
        raise OSError(self.error, os.strerror(self.error))
