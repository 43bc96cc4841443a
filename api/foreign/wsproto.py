"""wsproto with a bound on the inflated size of a compressed message; upstream inflates whatever has arrived at once."""

from __future__ import annotations

import zlib

from wsproto.extensions import PerMessageDeflate
from wsproto.frame_protocol import CloseReason, FrameDecoder, FrameProtocol

from api.foreign import require

MOST_INFLATED_BYTES = 8 * 2**20


def require_tested_wsproto() -> None:
    """Raises UntestedLibrary."""
    require("wsproto", "1.2", "2")


class BoundedDeflate(PerMessageDeflate):
    """Refuses a message if one read of it would inflate to more than `MOST_INFLATED_BYTES`."""

    def frame_inbound_payload_data(self, proto: FrameDecoder | FrameProtocol, data: bytes) -> bytes | CloseReason:
        if not self._inbound_compressed or not self._inbound_is_compressible or self._decompressor is None:
            return data
        try:
            inflated = self._decompressor.decompress(bytes(data), MOST_INFLATED_BYTES)
        except zlib.error:
            return CloseReason.INVALID_FRAME_PAYLOAD_DATA
        return CloseReason.MESSAGE_TOO_BIG if self._decompressor.unconsumed_tail else inflated
