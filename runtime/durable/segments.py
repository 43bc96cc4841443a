"""A history in an object store, in segments. Each is an object that is written once.

Segments are numbered from 0 without a gap, and a number is taken by whoever creates its object first. So of two servers that
would write the same session one fails, whatever their clocks say. A segment says where in the history it begins, so that
it may take earlier tokens back, and carries the checksum of the segment before it.
"""

from __future__ import annotations

import json
import struct
from array import array
from dataclasses import dataclass
from enum import Enum
from typing import Any

from runtime.durable.framing import CHECKSUM_BYTES, Damaged, Unknown, checksum
from runtime.durable.identity import HistoryIdentity, Terms

MAGIC, VERSION = b"PERSEGM\n", 1
_HEAD = struct.Struct("<8sII")  # magic, version, size of the header that follows in bytes


class Kind(Enum):
    """What a segment does besides recording tokens."""

    CREATE = "create"
    """Begins a session; its writer holds it."""
    CLAIM = "claim"
    """From here on another writer holds the session, in the next epoch."""
    TOKENS = "tokens"
    RELEASE = "release"
    """Its writer writes no more: the session is free."""
    CLOSE = "close"
    """The session has ended for good."""
    BASE = "base"
    """No segment, but the whole history up to the segment of its number, so that those before it need not be read."""


@dataclass(frozen=True, slots=True)
class Segment:
    """`before` is the seal of the preceding segment; for a base, that of the segment whose number it has.

    Only a CREATE and a BASE have identity and terms.
    """

    session_id: str
    number: int
    kind: Kind
    epoch: int
    holder: str
    start: int
    tokens: array[int]
    before: bytes
    identity: HistoryIdentity | None = None
    terms: Terms | None = None

    def to_bytes(self) -> bytes:
        header: dict[str, Any] = {
            "id": self.session_id,
            "number": self.number,
            "kind": self.kind.value,
            "epoch": self.epoch,
            "holder": self.holder,
            "start": self.start,
            "tokens": len(self.tokens),
            "before": self.before.hex(),
        }
        if self.identity is not None and self.terms is not None:
            header |= {"identity": self.identity.to_json(), "terms": self.terms.to_json()}
        text = json.dumps(header, sort_keys=True).encode()
        content = _HEAD.pack(MAGIC, VERSION, len(text)) + text + self.tokens.tobytes()
        return content + checksum(content)


def seal_of(content: bytes) -> bytes:
    """The seal of a segment, which the next segment has as `before`."""
    return content[-CHECKSUM_BYTES:]


def read_segment(content: bytes, session_id: str, number: int, identity: HistoryIdentity) -> Segment:
    """The segment in an object. Raises Damaged, or Unknown if another version or model wrote it."""
    body = content[:-CHECKSUM_BYTES]
    if len(body) < _HEAD.size or seal_of(content) != checksum(body):
        raise Damaged(f"segment {number} was changed or cut short")
    magic, version, length = _HEAD.unpack_from(body)
    if magic != MAGIC:
        raise Damaged(f"segment {number} does not begin as such an object does")
    if version != VERSION:
        raise Unknown(f"it is of format {version}, and this server reads format {VERSION}")
    text, tokens = body[_HEAD.size : _HEAD.size + length], body[_HEAD.size + length :]
    try:
        header = json.loads(text)
        kind = Kind(header["kind"])
        terms = Terms.from_json(header["terms"]) if "terms" in header else None
        made_for = header.get("identity")
        segment = Segment(
            header["id"],
            header["number"],
            kind,
            header["epoch"],
            header["holder"],
            header["start"],
            array("I", tokens),
            bytes.fromhex(header["before"]),
            identity if made_for else None,
            terms,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise Damaged(f"segment {number} says too little") from error
    if (segment.session_id, segment.number) != (session_id, number):
        raise Damaged(f"segment {number} is another one")
    if made_for is not None and made_for != identity.to_json():
        raise Unknown("it was made with another model")
    return segment
