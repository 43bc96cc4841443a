"""A slab on disk: keys and values layer by layer, then what recurrent layers keep, in pieces with a checksum each.

Pieces are written and read one at a time, so that a call that needs the slab waits for one piece, and memory holds one.
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

from runtime.dtypes import dtype_named
from runtime.durable.files import Files, storage_errors
from runtime.durable.framing import CHECKSUM_BYTES, Damaged, Unknown, checksum, read_header, write_header
from runtime.durable.identity import SlabIdentity
from runtime.errors import StorageFailed
from runtime.slab import Slab
from runtime.slab_spec import SlabSpec

MAGIC = b"PERSLAB\n"
# The format of slabs without recurrent layers, and of those with them.
_PLAIN_VERSION, _RECURRENT_VERSION = 1, 2
# Suffix of the file of a slab that is being written.
PARTIAL = ".slab-new"
# A piece of this size is copied, summed and written in some ten milliseconds on a busy machine.
MOST_PIECE_BYTES = 2 * 2**20


class SlabWriter:
    """Writes a slab piece by piece into a temporary file, which `finish` moves into place.

    A file that was given up half-way stays, and the next writer overwrites it: freeing a gigabyte takes longer than a call
    may wait. `step` and `finish` raise StorageFailed, and then remove it.
    """

    def __init__(self, files: Files, path: Path, identity: SlabIdentity, slab: Slab, history: array[int]) -> None:
        """The slab has read `history` up to its frontier."""
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
            "written": slab.written,
            "history": digest_of(history[: self.frontier]),
        }
        self._seal = b""
        self._left = _contents(slab, slab.used)

    def step(self) -> bool:
        """Writes the next piece; returns False once none is left."""
        with self._errors():
            if self._file is None:
                self._file = self._files.reuse(self._fresh)
                version = _version_of(self._slab.spec)
                self.size, self._seal = write_header(self._files, self._file, MAGIC, version, self._header)
            piece = next(self._left, None)
            if piece is None:
                return False
            content = _bytes_of(piece)
            self._seal = checksum(self._seal, content)
            for part in (content, self._seal):
                self._files.write(self._file, self.size, part)
                self.size += len(part)
            return True

    def finish(self) -> None:
        """Moves the file into place."""
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
    """Fills an empty slab from a file that was written for this `history` or a beginning of it.

    Raises OSError, Damaged, or Unknown if another engine wrote it; then the slab stays empty.
    """
    slab.clear()
    with _open(files, path) as file:
        header, at, seal = read_header(files, file, MAGIC, _version_of(slab.spec))
        try:
            frontier = int(header["frontier"])
            # If the file does not say how far the slab was written, it may have gone back by less than a tile.
            written = int(header.get("written", frontier + slab.spec.row_tile))
            if header["id"] != path.stem or header["history"] != digest_of(history[:frontier]):
                raise Damaged("it is another history's")
            if header["identity"] != identity.to_json():
                raise Unknown("it was written by another engine")
        except (KeyError, TypeError, ValueError) as error:
            raise Damaged("its header says too little") from error
        if not 0 <= frontier <= min(len(history), written):
            raise Damaged("it is ahead of its history")
        spec = slab.spec
        used = min(frontier, spec.slots)
        whole: list[Tensor] = []

        def read(count: int, dtype: torch.dtype) -> Tensor:
            nonlocal at, seal
            size = count * dtype.itemsize
            content = files.read(file, at, size)
            seal, found = checksum(seal, content), files.read(file, at + size, CHECKSUM_BYTES)
            if seal != found:
                raise Damaged("a piece of it was changed or is missing")
            at += size + CHECKSUM_BYTES
            return _tensor_of(content, dtype)

        for layer, side, head, slots in _pieces(spec, used):
            whole.append(read((slots.stop - slots.start) * spec.width, dtype_named(spec.dtype)).view(-1, spec.width))
            if (side, head, slots.stop) == (1, spec.kv_heads - 1, used):
                keys, values = torch.cat(whole).view(2, spec.kv_heads, used, spec.width)
                slab.put(layer, keys, values)
                whole = []
        for piece in _recurrent_pieces(slab):
            piece.copy_(read(piece.numel(), piece.dtype))
        slab.resume(frontier, written)


def digest_of(history: array[int]) -> str:
    return hashlib.blake2b(memoryview(history).cast("B"), digest_size=CHECKSUM_BYTES).hexdigest()


def _pieces(spec: SlabSpec, used: int) -> Iterator[tuple[int, int, int, slice]]:
    """For each piece, in file order: the layer, keys (0) or values (1), the kv head, and the slots."""
    at_once = max(1, MOST_PIECE_BYTES // (spec.width * spec.item_bytes))
    for layer in range(spec.layers):
        for side in (0, 1):
            for head in range(spec.kv_heads):
                for first in range(0, used, at_once):
                    yield layer, side, head, slice(first, min(first + at_once, used))


def _recurrent_pieces(slab: Slab) -> Iterator[Tensor]:
    """What recurrent layers keep, as views in pieces of the size that is written or read at once."""
    for tensor in slab.recurrent_tensors():
        yield from tensor.view(-1).split(MOST_PIECE_BYTES // tensor.itemsize)


def _contents(slab: Slab, used: int) -> Iterator[Tensor]:
    """The content of each piece, in file order, of a slab of which `used` slots are used."""
    for layer, side, head, slots in _pieces(slab.spec, used):
        yield slab.held(layer)[side][head, slots]
    yield from _recurrent_pieces(slab)


def _version_of(spec: SlabSpec) -> int:
    return _RECURRENT_VERSION if spec.recurrent else _PLAIN_VERSION


def _bytes_of(tensor: Tensor) -> memoryview:
    plain = tensor.detach().cpu().contiguous()
    whole: Any = plain.view(torch.uint8).numpy()
    return memoryview(whole).cast("B") if plain.numel() else memoryview(b"")


def _tensor_of(content: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=dtype) if content else torch.empty(0, dtype=dtype)


@contextmanager
def _open(files: Files, path: Path) -> Iterator[int]:
    file = files.open(path)
    try:
        yield file
    finally:
        files.close(file)
