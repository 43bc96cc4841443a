"""h2 with bounds on what one peer can make it hold.

| what h2 does | what it does here |
| --- | --- |
| remembers the last 65,536 closed streams, 9 MB a connection | the last 256 |
| looks at a frame's length once all of the frame has come: up to 16 MiB | at the frame's header |
| joins 65 frames of headers, 1 MiB, before it looks at their size | refuses them at `MOST_HEADER_BYTES` |
| keeps settings that it does not know, 45 MB of them | ignores them, as RFC 9113 6.5.2 says |
| looks into ALTSVC, which is for clients, and fails at what it finds | ignores it, as every frame that means nothing here |
| lets the peer choose the size of our table of sent headers, up to 4 GiB | keeps it at the protocol's own 4 KiB |
"""

from __future__ import annotations

from typing import Any

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.exceptions import DenialOfServiceError
from h2.frame_buffer import FrameBuffer
from h2.settings import SettingCodes
from hyperframe.frame import AltSvcFrame, ContinuationFrame, Frame, HeadersFrame, SettingsFrame

from api.foreign import require

MOST_HEADER_BYTES = 16 * 2**10
_HEADER_TABLE_BYTES = 4096
_UNKNOWN_TYPE = 0xFF
_KNOWN_SETTINGS = frozenset(int(code) for code in SettingCodes)


def require_tested_h2() -> None:
    """Raises UntestedLibrary."""
    require("h2", "4.4.1", "4.5")


class ForgetfulConnection(H2Connection):
    """Remembers few closed streams, because a connection may live as long as its agent."""

    # Some are remembered because frames for them may still arrive.
    MAX_CLOSED_STREAMS = 256


class BoundedConnection(ForgetfulConnection):
    """Bounds what its peer can make it hold. Exceeding a bound is a ProtocolError, which ends the connection."""

    DEFAULT_MAX_HEADER_LIST_SIZE = MOST_HEADER_BYTES

    def __init__(self, config: H2Configuration | None = None) -> None:
        super().__init__(config)
        self.incoming_buffer = BoundedFrameBuffer(server=not self.config.client_side)

    def _receive_settings_frame(self, frame: SettingsFrame) -> Any:
        frame.settings = {code: value for code, value in frame.settings.items() if code in _KNOWN_SETTINGS}
        received = super()._receive_settings_frame(frame)
        if self.encoder.header_table_size > _HEADER_TABLE_BYTES:
            self.encoder.header_table_size = _HEADER_TABLE_BYTES
        return received


class BoundedFrameBuffer(FrameBuffer):
    """Refuses a frame or a block of headers as soon as its length is known to be too much."""

    _header_bytes = 0

    def __next__(self) -> Frame:
        if len(self._data) >= 9:
            self._validate_frame_length(int.from_bytes(self._data[:3], "big"))
            if self._data[3] == AltSvcFrame.type:
                self._data[3] = _UNKNOWN_TYPE
        return super().__next__()

    def _update_header_buffer(self, frame: Frame | None) -> Frame | None:
        if isinstance(frame, HeadersFrame):
            self._header_bytes = 0
        if isinstance(frame, (HeadersFrame, ContinuationFrame)):
            self._header_bytes += len(frame.data)
            if self._header_bytes > MOST_HEADER_BYTES:
                raise DenialOfServiceError(f"a block of headers is {MOST_HEADER_BYTES} bytes at most")
        return super()._update_header_buffer(frame)
