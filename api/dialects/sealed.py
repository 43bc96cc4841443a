"""Reasoning sealed for clients that send it back without reading it."""

from __future__ import annotations

import base64
import zlib

_MARK = "perennial.1."
_MOST_BYTES = 2**20


def seal(text: str) -> str:
    return _MARK + base64.urlsafe_b64encode(zlib.compress(text.encode())).decode()


def unseal(sealed: str | None) -> str:
    """The text in a seal that `seal` made; empty for any other."""
    if not sealed or not sealed.startswith(_MARK):
        return ""
    try:
        packed = base64.urlsafe_b64decode(sealed.removeprefix(_MARK))
        return zlib.decompressobj().decompress(packed, _MOST_BYTES).decode()
    except (ValueError, zlib.error):
        return ""
