"""What we change in other libraries, and that it is still needed: a test of upstream that fails tells that it was mended."""

from __future__ import annotations

import asyncio
import struct
import subprocess
import sys

import pytest
from grpclib.protocol import Buffer, Connection, EventsProcessor
from grpclib.server import Handler
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import UnknownFrameReceived
from h2.exceptions import FrameTooLargeError, ProtocolError
from h2.utilities import SizeLimitDict
from hyperframe.frame import ExtensionFrame
from wsproto import ConnectionType
from wsproto.connection import Connection as WebSocket
from wsproto.events import BytesMessage, CloseConnection
from wsproto.extensions import PerMessageDeflate
from wsproto.handshake import server_extensions_handshake

from api.foreign import require
from api.foreign.grpclib.connection import GuardedProcessor
from api.foreign.grpclib.stream import ReceiveBuffer
from api.foreign.h2 import BoundedConnection, ForgetfulConnection
from api.foreign.wsproto import MOST_INFLATED_BYTES, BoundedDeflate
from runtime.errors import UntestedLibrary
from tests.api.hostile import CONTINUATION, HEADERS, PREFACE, SETTINGS, frame, setting

ALTSVC = 0x0A
HEADER_TABLE_SIZE = 1
UPSTREAM, OURS = H2Connection, BoundedConnection


def talking(kind: type[H2Connection], *frames: bytes) -> H2Connection:
    """A server's connection whose client has sent these frames."""
    connection = kind(config=H2Configuration(client_side=False))
    connection.initiate_connection()
    connection.receive_data(PREFACE + frame(SETTINGS) + b"".join(frames))
    return connection


@pytest.mark.parametrize(("first", "below"), [("99", "100"), ("0", "1"), ("4.0", "4.0.1")])
def test_a_version_that_was_not_tried_is_refused_in_one_line_that_says_what_to_do(first: str, below: str) -> None:
    with pytest.raises(UntestedLibrary, match=f"pip install 'h2>={first},<{below}'") as caught:
        require("h2", first, below)

    assert len(str(caught.value).splitlines()) == 1


def test_a_version_that_was_tried_is_taken() -> None:
    require("h2", "4", "5")


@pytest.mark.parametrize(("kind", "held"), [(UPSTREAM, 5000), (OURS, 0)])
def test_settings_that_are_unknown_are_ignored(kind: type[H2Connection], held: int) -> None:
    numbers = range(100, 5100)
    frames = [
        frame(SETTINGS, payload=b"".join(setting(n, 1) for n in numbers[at : at + 1000])) for at in range(0, 5000, 1000)
    ]

    connection = talking(kind, *frames)

    assert sum(number in connection.remote_settings for number in numbers) == held


@pytest.mark.parametrize(("kind", "size"), [(UPSTREAM, 2**31), (OURS, 4096)])
def test_the_table_of_headers_that_we_sent_is_no_larger_than_we_want(kind: type[H2Connection], size: int) -> None:
    connection = talking(kind, frame(SETTINGS, payload=setting(HEADER_TABLE_SIZE, 2**31)))

    assert connection.encoder.header_table_size == size


def test_a_table_that_the_client_wants_smaller_is_smaller() -> None:
    assert talking(OURS, frame(SETTINGS, payload=setting(HEADER_TABLE_SIZE, 100))).encoder.header_table_size == 100


def test_a_frame_is_refused_as_soon_as_its_length_is_known() -> None:
    header = struct.pack(">I", 2**24 - 1)[1:] + b"\x00\x00\x00\x00\x00\x01"

    assert talking(UPSTREAM, header)
    with pytest.raises(FrameTooLargeError):
        talking(OURS, header)


def test_a_block_of_headers_is_refused_before_it_has_an_end() -> None:
    frames = [frame(HEADERS, 0, 1, bytes(100)), *[frame(CONTINUATION, 0, 1, bytes(16384))] * 2]

    assert talking(UPSTREAM, *frames)
    with pytest.raises(ProtocolError, match="16384 bytes at most"):
        talking(OURS, *frames)


@pytest.mark.parametrize("payload", [b"", b"\xff\xff"])
def test_altsvc_is_for_clients(payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        talking(UPSTREAM, frame(ALTSVC, payload=payload))

    assert talking(OURS, frame(ALTSVC, payload=payload))


@pytest.mark.parametrize(("kind", "count"), [(UPSTREAM, 2**16), (OURS, 256), (ForgetfulConnection, 256)])
def test_closed_streams_are_forgotten(kind: type[H2Connection], count: int) -> None:
    (remembered,) = [one for one in vars(kind()).values() if isinstance(one, SizeLimitDict)]

    assert count == kind.MAX_CLOSED_STREAMS
    assert len(remembered) == 0


async def events_of(kind: type[EventsProcessor]) -> None:
    event = UnknownFrameReceived(frame=ExtensionFrame(0x42, 0))
    # Neither of the two is used for an event like this one.
    kind(Handler({}, None, None, None), Connection.__new__(Connection)).process(event)  # type: ignore[arg-type] # As said.


def test_an_event_that_means_nothing_is_ignored() -> None:
    with pytest.raises(NotImplementedError):
        asyncio.run(events_of(EventsProcessor))

    asyncio.run(events_of(GuardedProcessor))


async def read_in_pieces(kind: type[Buffer]) -> bytes:
    buffer = kind(lambda _: None)
    for piece in (b"a", b"", b"b"):
        buffer.add(piece, len(piece))
    return await buffer.read(2)


def test_an_empty_piece_is_no_end() -> None:
    with pytest.raises(AssertionError):
        asyncio.run(read_in_pieces(Buffer))

    assert asyncio.run(read_in_pieces(ReceiveBuffer)) == b"ab"


async def cancelled_after_its_end() -> None:
    Handler({}, None, None, None).cancel(object())  # type: ignore[arg-type] # Any stream.


# In an interpreter of its own, because the order of imports decides.
GRPCLIB_FIRST = """
import trio
from grpclib import utils
from api.bridge import asyncio_loop

async def task(): return utils._current_task()

async def main():
    async with asyncio_loop() as from_asyncio:
        assert await from_asyncio(task)() is not None

trio.run(main)
"""


def test_grpclib_finds_its_task_under_trio_also_if_it_was_imported_first() -> None:
    subprocess.run([sys.executable, "-c", GRPCLIB_FIRST], check=True)


def test_upstream_fails_at_a_reset_of_a_call_that_has_ended() -> None:
    with pytest.raises(KeyError):
        asyncio.run(cancelled_after_its_end())


@pytest.mark.parametrize(("kind", "is_refused"), [(PerMessageDeflate, False), (BoundedDeflate, True)])
def test_a_compressed_message_that_comes_to_far_more_is_refused(
    kind: type[PerMessageDeflate], is_refused: bool
) -> None:
    offered = kind()
    sent = PerMessageDeflate()
    sent.finalize("permessage-deflate")
    client = WebSocket(ConnectionType.CLIENT, [sent])
    accepted = server_extensions_handshake(["permessage-deflate"], [offered])
    assert accepted
    server = WebSocket(ConnectionType.SERVER, [offered])

    server.receive_data(client.send(BytesMessage(bytes(MOST_INFLATED_BYTES + 2**16))))
    events = [*server.events()]

    assert isinstance(events[0], CloseConnection) is is_refused
