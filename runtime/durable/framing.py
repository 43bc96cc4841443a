"""The header of our files, and their checksums, which tell a file that was cut, swapped or changed from a whole one."""

from __future__ import annotations

import hashlib
import json
import struct
from typing import Any

from runtime.durable.files import Files

CHECKSUM_BYTES = 16
_HEAD = struct.Struct("<8sII")  # magic, version, size of the header that follows in bytes
_MOST_HEADER_BYTES = 2**20


class Damaged(Exception):
    """The file is damaged: it is not as it was written."""


class Unknown(Exception):
    """The file is whole, but of a version or a model that this server does not read."""


def checksum(*parts: bytes | memoryview) -> bytes:
    digest = hashlib.blake2b(digest_size=CHECKSUM_BYTES)
    for part in parts:
        digest.update(part)
    return digest.digest()


def write_header(files: Files, file: int, magic: bytes, version: int, header: dict[str, Any]) -> tuple[int, bytes]:
    """Writes a file's header; returns the offset of the content, and the checksum of the header. Raises OSError."""
    text = json.dumps(header, sort_keys=True).encode()
    head = _HEAD.pack(magic, version, len(text)) + text
    seal = checksum(head)
    files.write(file, 0, head + seal)
    return len(head) + CHECKSUM_BYTES, seal


def read_header(files: Files, file: int, magic: bytes, version: int) -> tuple[dict[str, Any], int, bytes]:
    """A file's header, the offset of the content, and the header's checksum. Raises OSError, Damaged or Unknown."""
    head = files.read(file, 0, _HEAD.size)
    if len(head) < _HEAD.size:
        raise Damaged("it ends within its header")
    found, written_by, length = _HEAD.unpack(head)
    if found != magic or length > _MOST_HEADER_BYTES:
        raise Damaged("it does not begin as such a file does")
    rest = files.read(file, _HEAD.size, length + CHECKSUM_BYTES)
    text, seal = rest[:length], rest[length:]
    if seal != checksum(head, text):
        raise Damaged("its header was changed")
    if written_by != version:
        raise Unknown(f"it is of format {written_by}, and this server reads format {version}")
    header: dict[str, Any] = json.loads(text)
    return header, _HEAD.size + length + CHECKSUM_BYTES, seal
