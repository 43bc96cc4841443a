"""A slab on disk: keys and values layer by layer, in pieces with a checksum each.

A piece is written or read at a time, so that whoever waits for the slab waits for one piece, and memory holds one.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime.durable.files import Files, storage_errors
from runtime.durable.framing import CHECKSUM_BYTES, Damaged, Unknown, checksum, read_header, write_header
from runtime.durable.identity import SlabIdentity
from runtime.errors import StorageFailed
from runtime.slab import Slab, SlabSpec

MAGIC, VERSION = b"PERSLAB\n", 1
# The suffix of a slab that is being written.
PARTIAL = ".slab-new"
# A piece of so many bytes is copied, sealed and written in some ten milliseconds on a busy machine.
MOST_PIECE_BYTES = 2 * 2**20


class SlabWriter:
    """Writes a slab into a file beside its place, piece by piece; nothing is in its place before `finish`.

    What is given up half-way stays and is written over by the next one: to free a gigabyte takes longer than a call may wait.
    `step` and `finish` raise StorageFailed, and leave nothing beside.
    """

    def __init__(self, files: Files, path: Path, identity: SlabIdentity, slab: Slab, history: array[int]) -> None:
        """The slab has read the first tokens of `history`, up to its frontier."""
        self.frontier = slab.frontier
        self.size = 0
        self._files = files
        self._path = path
        self._slab = slab
        self._fresh = path.with_suffix(PARTIAL)
        self._has_failed = False
        self._file: int | None = None
        self._header = {
            "id": path.stem,
            "identity": identity.to_json(),
            "frontier": self.frontier,
            "history": digest_of(history[: self.frontier]),
        }
        self._seal = b""
        self._left = _pieces(slab.spec, slab.used)

    def step(self) -> bool:
        """Writes the next piece; False once there is none left."""
        with self._errors():
            if self._file is None:
                self._file = self._files.reuse(self._fresh)
                self.size, self._seal = write_header(self._files, self._file, MAGIC, VERSION, self._header)
            piece = next(self._left, None)
            if piece is None:
                return False
            layer, side, head, slots = piece
            content = _bytes_of(self._slab.held(layer)[side][head, slots])
            self._seal = checksum(self._seal, content)
            for part in (content, self._seal):
                self._files.write(self._file, self.size, part)
                self.size += len(part)
            return True

    def finish(self) -> None:
        """Puts the file into its place."""
        assert self._file is not None
        with self._errors():
            self._files.truncate(self._file, self.size)
            self._files.replace(self._fresh, self._path)

    def close(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._files.close(self._file)
        if self._has_failed:
            with suppress(OSError):
                self._files.remove(self._fresh)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            with storage_errors("the slab is not left on disk"):
                yield
        except StorageFailed:
            self._has_failed = True
            raise


def write_slab(files: Files, path: Path, identity: SlabIdentity, slab: Slab, history: array[int]) -> int:
    """Writes a slab in one go and returns the file's size in bytes. Raises StorageFailed."""
    writer = SlabWriter(files, path, identity, slab, history)
    try:
        while writer.step():
            pass
        writer.finish()
        return writer.size
    finally:
        writer.close()


def read_slab(files: Files, path: Path, identity: SlabIdentity, slab: Slab, history: array[int]) -> None:
    """Fills an empty slab with what a file holds of it, which has read the first tokens of `history`.

    Raises OSError, Damaged, or Unknown where another engine wrote it; the slab is empty then.
    """
    slab.clear()
    with _opened(files, path) as file:
        header, at, seal = read_header(files, file, MAGIC, VERSION)
        try:
            frontier = int(header["frontier"])
            if header["id"] != path.stem or header["history"] != digest_of(history[:frontier]):
                raise Damaged("it is another history's")
            if header["identity"] != identity.to_json():
                raise Unknown("it was written by another engine")
        except (KeyError, TypeError, ValueError) as error:
            raise Damaged("its header says too little") from error
        if not 0 <= frontier <= len(history):
            raise Damaged("it is ahead of its history")
        spec = slab.spec
        used = min(frontier, spec.slots)
        whole: list[Tensor] = []
        for layer, side, head, slots in _pieces(spec, used):
            count = (slots.stop - slots.start) * spec.width * spec.dtype.itemsize
            content = files.read(file, at, count)
            seal, found = checksum(seal, content), files.read(file, at + count, CHECKSUM_BYTES)
            if seal != found:
                raise Damaged("a piece of it was changed or is missing")
            at += count + CHECKSUM_BYTES
            whole.append(_tensor_of(content, spec.dtype).view(-1, spec.width))
            if (side, head, slots.stop) == (1, spec.kv_heads - 1, used):
                keys, values = torch.cat(whole).view(2, spec.kv_heads, used, spec.width)
                slab.put(layer, keys, values)
                whole = []
        for layer in range(spec.layers):
            slab.advance(layer, frontier)


def digest_of(history: array[int]) -> str:
    return hashlib.blake2b(memoryview(history).cast("B"), digest_size=CHECKSUM_BYTES).hexdigest()


def _pieces(spec: SlabSpec, used: int) -> Iterator[tuple[int, int, int, slice]]:
    """Layer, keys (0) or values (1), kv head, and slots, of each piece in the order in which they lie."""
    at_once = max(1, MOST_PIECE_BYTES // (spec.width * spec.dtype.itemsize))
    for layer in range(spec.layers):
        for side in (0, 1):
            for head in range(spec.kv_heads):
                for first in range(0, used, at_once):
                    yield layer, side, head, slice(first, min(first + at_once, used))


def _bytes_of(tensor: Tensor) -> memoryview:
    plain = tensor.detach().cpu().contiguous()
    whole: Any = plain.view(torch.uint8).numpy()
    return memoryview(whole).cast("B") if plain.numel() else memoryview(b"")


def _tensor_of(content: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=dtype) if content else torch.empty(0, dtype=dtype)


@contextmanager
def _opened(files: Files, path: Path) -> Iterator[int]:
    file = files.open(path)
    try:
        yield file
    finally:
        files.close(file)
