"""Whatever is sent to the gRPC port costs its sender's connection at most: every other client is served as before."""

from __future__ import annotations

import asyncio
import gc
import gzip
import logging
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack

import pytest
import trio
from google.protobuf.message_factory import GetMessageClass
from grpclib.protocol import Stream as H2Stream
from hyperframe.frame import HeadersFrame
from trio.testing import MockClock, wait_all_tasks_blocked

from api.accepting import Accepting
from api.bridge import asyncio_loop
from api.client import connect
from api.grpc import MOST_MESSAGE_BYTES
from api.grpc_standard import descriptors
from proto.kakeya.v1 import CreateSessionRequest, GenerateRequest
from runtime.errors import InvalidRequest
from runtime.settings import split_address
from tests.actors.engines import LedgerEngine, open_lab, sample
from tests.api.doors import House, open_house
from tests.api.hostile import (
    ACK,
    CALM,
    CHECK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    GRPC_CALLS,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    PING,
    PREFACE,
    PRIORITY,
    PUSH_PROMISE,
    REFLECTION,
    RST_STREAM,
    SERVICE,
    SETTINGS,
    UNKNOWN,
    WATCH,
    WINDOW_UPDATE,
    Call,
    Peer,
    few_descriptors,
    floods,
    frame,
    hostile,
    is_polite_to_others,
    message,
    resets,
    send_anything,
    setting,
)
from tests.api.test_disconnects import until

OK, CANCELLED, INVALID_ARGUMENT, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, UNIMPLEMENTED = "0", "1", "3", "4", "8", "12"
FLOW_CONTROL_ERROR, FRAME_SIZE_ERROR = 3, 6
# A client that reads has half of the first to answer a ping.
READ, IDLE = 1.0, 0.3


@pytest.fixture
async def house() -> AsyncIterator[House]:
    async with open_house() as opened:
        yield opened


async def let_pass(clock: MockClock, seconds: float) -> None:
    """Lets so much time pass, once the server does nothing but wait for it."""
    await wait_all_tasks_blocked(0.05)
    clock.jump(seconds)


def tracebacks(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """What was logged that is more than one line, or long."""
    return [
        record
        for record in caplog.records
        if record.exc_info or "\n" in record.getMessage() or len(record.getMessage()) > 500
    ]


# Frames that mean nothing, and calls that make no sense.


@pytest.mark.parametrize("stream_id", [0, 1])
@pytest.mark.parametrize("kind", UNKNOWN)
@pytest.mark.parametrize("payload", [b"", b"\x00\x00", b"\x80" * 100])
async def test_a_frame_of_a_type_that_is_unknown_is_ignored(
    house: House, kind: int, stream_id: int, payload: bytes
) -> None:
    async with hostile(house) as peer:
        number = await peer.open(CHECK, ends=False)
        await peer.send(frame(kind, 0xFF, stream_id, payload))
        await peer.send(frame(DATA, END_STREAM, number, message()))

        assert (await peer.status(number))["grpc-status"] == OK
    assert await is_polite_to_others(house)


@pytest.mark.parametrize("name", ["user_agent", "authorization", "anything", ":path", "x_bin", "grpc_timeout"])
async def test_a_byte_that_is_no_ascii_in_a_header_costs_its_call_alone(house: House, name: str) -> None:
    async with hostile(house) as peer:
        number = await peer.open(CHECK, message(), ends=True, **{name: b"caf\xc3\xa9\xff"})
        assert (await peer.status(number))["grpc-status"] == INVALID_ARGUMENT

        number = await peer.open(CHECK, message())
        assert (await peer.status(number))["grpc-status"] == OK


@pytest.mark.parametrize(
    ("header", "value", "status"),
    [
        ("grpc_timeout", "9" * 400 + "H", INVALID_ARGUMENT),
        ("grpc_timeout", "soon", INVALID_ARGUMENT),
        ("grpc_timeout", "0n", DEADLINE_EXCEEDED),
        ("x_bin", "a", INVALID_ARGUMENT),
        ("te", "gzip", "2"),
        ("grpc_encoding", "br", UNIMPLEMENTED),
    ],
)
async def test_a_header_that_makes_no_sense_is_answered_without_a_word_in_the_log(
    house: House, header: str, value: str, status: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with hostile(house) as peer:
        number = await peer.open(f"{SERVICE}/ListSessions", message(), ends=True, **{header: value})

        assert (await peer.status(number))["grpc-status"] == status
    assert not tracebacks(caplog)


@pytest.mark.parametrize("path", [CHECK, WATCH, f"{SERVICE}/CreateSession"])
@pytest.mark.parametrize("data", [[], [b"\x00\x00"], [message(length=7)], [message(b"\xff\xff")]])
async def test_a_call_without_a_whole_message_is_refused_without_a_traceback(
    house: House, path: str, data: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    async with hostile(house) as peer:
        number = await peer.open(path, *data)

        assert (await peer.status(number))["grpc-status"] == INVALID_ARGUMENT
    assert not tracebacks(caplog)


@pytest.mark.parametrize(
    "frames",
    [
        [frame(CONTINUATION, END_HEADERS, 1, b"\x88")],
        [frame(PUSH_PROMISE, END_HEADERS, 1, b"\x00\x00\x00\x02\x88")],
        [frame(SETTINGS, 0, 0, b"\x00")],
        [frame(HEADERS, END_HEADERS, 0, b"\x88")],
        [frame(HEADERS, END_HEADERS, 2, b"\x88")],
        [frame(HEADERS, END_HEADERS, 1, b"\xff" * 20)],
        [frame(HEADERS, END_HEADERS | 0x20, 1, b"\x00\x00\x00\x01\x10\x88")],
        [frame(DATA, 0, 9, b"x")],
        [frame(WINDOW_UPDATE, 0, 0, b"\x00\x00\x00\x00")],
        [frame(PING, 0, 0, b"short")],
        [frame(PRIORITY, 0, 1, b"\x00\x00\x00\x01\x10")],
        [frame(GOAWAY, 0, 0, b"\x00" * 8)],
        [b"\xff\xff\xff" + bytes(6)],
        [b"GET / HTTP/1.1\r\n\r\n"],
    ],
)
async def test_frames_that_break_the_protocol_end_their_connection(
    house: House, frames: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    async with hostile(house) as peer:
        await peer.send(*frames)

        await peer.farewell()
    assert await is_polite_to_others(house)
    assert not tracebacks(caplog)


async def test_a_reset_of_a_stream_that_is_over_costs_nothing(house: House) -> None:
    async with hostile(house) as peer:
        for _ in range(30):
            number = await peer.open(CHECK, message())
            await peer.status(number)
            await peer.send(frame(RST_STREAM, 0, number, bytes(4)))
        await peer.is_answered()
    assert await is_polite_to_others(house)


async def test_a_callback_of_asyncio_that_fails_is_one_line_in_the_log_and_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail() -> None:
        raise ValueError("what a client\nsent")

    async def soon() -> None:
        loop = asyncio.get_running_loop()
        loop.call_soon(fail)
        loop.call_exception_handler({"message": "something\nelse"})
        await asyncio.sleep(0)

    async with asyncio_loop() as from_asyncio:
        await from_asyncio(soon)()
        await from_asyncio(soon)()

    assert len(caplog.records) == 4
    assert "ValueError" in caplog.text
    assert "client" not in caplog.text
    assert not tracebacks(caplog)


# More than there is room for.


@pytest.mark.parametrize("path", [CHECK, WATCH, REFLECTION, f"{SERVICE}/CreateSession", f"{SERVICE}/Generate"])
@pytest.mark.parametrize("length", [MOST_MESSAGE_BYTES + 1, 2**32 - 1])
async def test_a_message_that_is_too_long_is_refused_at_its_prefix(house: House, path: str, length: int) -> None:
    async with hostile(house) as peer:
        number = await peer.open(path, message(length=length), ends=False)

        assert (await peer.status(number))["grpc-status"] == RESOURCE_EXHAUSTED


async def test_messages_on_their_way_share_a_room(house: House) -> None:
    async with hostile(house) as peer:
        numbers = [await peer.open(CHECK, message(length=MOST_MESSAGE_BYTES), ends=False) for _ in range(5)]

        assert (await peer.status(numbers[-1]))["grpc-status"] == RESOURCE_EXHAUSTED


async def test_a_message_that_does_not_come_is_not_waited_for() -> None:
    async with open_house(reader_timeout_s=READ) as house, hostile(house) as peer:
        numbers = [await peer.open(CHECK, *data, ends=False) for data in ([], [b"\x00"], [message(length=9)])]

        for number in numbers:
            assert (await peer.status(number))["grpc-status"] == DEADLINE_EXCEEDED


async def test_what_nobody_waits_for_fills_a_window_and_no_more(house: House) -> None:
    """A watch reads its first message and no other."""
    async with hostile(house) as peer:
        number = await peer.open(WATCH, message(), ends=False)
        await peer.first_data(number)

        code = await floods(peer, iter([frame(DATA, 0, number, bytes(16384))] * 40))

    assert code in (FLOW_CONTROL_ERROR, None)
    assert await is_polite_to_others(house)


async def test_a_message_may_come_in_pieces_with_nothing_between(house: House) -> None:
    whole = message(
        GetMessageClass(descriptors().FindMessageTypeByName("grpc.health.v1.HealthCheckRequest"))(service="")
    )
    async with hostile(house) as peer:
        pieces = [piece for byte in whole for piece in (bytes([byte]), b"")]
        number = await peer.open(CHECK, *pieces)

        assert (await peer.status(number))["grpc-status"] == OK


async def test_a_connection_that_is_closed_leaves_nothing_of_its_calls(house: House) -> None:
    async with hostile(house) as peer:
        for _ in range(20):
            await peer.open(CHECK, message(length=1000), ends=False)
        await peer.is_answered()
    assert await is_polite_to_others(house)

    await until(lambda: streams_held() == 0)


def streams_held() -> int:
    gc.collect()
    return sum(issubclass(type(one), H2Stream) for one in gc.get_objects())


# Too many.


FLOODS: dict[str, Callable[[Peer], Iterable[bytes]]] = {
    "resets": lambda peer: resets(peer, 20_000, Call(CHECK)),
    "pings": lambda _: [frame(PING, payload=bytes(8)) * 100] * 200,
    "answers to pings": lambda _: [frame(PING, ACK, payload=bytes(8)) * 100] * 200,
    "settings": lambda _: [frame(SETTINGS, payload=setting(INITIAL_WINDOW_SIZE, 0)) * 100] * 200,
    "priorities": lambda _: [frame(PRIORITY, 0, 3, b"\x00\x00\x00\x01\x10") * 100] * 200,
    "unknown": lambda _: [frame(0x42) * 100] * 200,
    "empty data": lambda peer: [peer.opening(CHECK, ends=False)[1], *[frame(DATA, 0, 1) * 100] * 200],
    "windows": lambda _: [frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 1)) * 100] * 200,
}


@pytest.mark.parametrize("name", FLOODS)
async def test_a_client_that_sends_too_much_that_brings_no_call_on_is_told_to_calm_down(
    house: House, name: str
) -> None:
    async with hostile(house) as peer:
        assert await floods(peer, FLOODS[name](peer)) in (CALM, None)
    assert await is_polite_to_others(house)


async def test_the_code_says_that_it_was_too_much(house: House) -> None:
    async with hostile(house) as peer:
        await peer.is_answered()
        await peer.send(frame(0x42) * 1500)

        assert await peer.farewell() == CALM


async def test_calls_that_are_cancelled_one_after_another_are_no_flood_and_leave_nothing(house: House) -> None:
    async with hostile(house) as peer:
        for _ in range(8):
            together = []
            for _ in range(50):
                number, opening = peer.opening(CHECK, ends=False)
                together.append(opening + frame(RST_STREAM, 0, number, bytes(4)))
            await peer.send(*together)
            await peer.is_answered()

        await until(lambda: streams_held() == 0)


async def test_a_client_that_pings_as_often_as_it_is_sent_something_is_no_flood(house: House) -> None:
    """So do clients that measure how fast their connection is."""
    async with hostile(house) as peer:
        for _ in range(1500):
            number = await peer.open(CHECK, message())
            await peer.first_data(number)
            await peer.send(frame(PING, payload=bytes(8)))
        await peer.is_answered()


async def test_streams_beyond_those_allowed_end_their_connection(house: House) -> None:
    async with hostile(house) as peer:
        for _ in range(101):
            await peer.open(CHECK, ends=False)

        assert await peer.farewell() is not None
    assert await is_polite_to_others(house)


async def test_a_header_list_that_is_too_long_ends_its_connection(house: House) -> None:
    async with hostile(house) as peer:
        await peer.open(CHECK, message(), more="x" * 40_000)

        assert await peer.farewell() is not None


@pytest.mark.parametrize("size", [0, 1000])
async def test_a_block_of_headers_without_an_end_ends_its_connection(house: House, size: int) -> None:
    async with hostile(house) as peer:
        await peer.send(frame(HEADERS, 0, 1, b""), *[frame(CONTINUATION, 0, 1, bytes(size))] * 70)

        assert await peer.farewell() is not None
    assert await is_polite_to_others(house)


async def test_a_frame_that_is_too_long_is_refused_at_its_header(house: House) -> None:
    async with hostile(house) as peer:
        await peer.send(b"\xff\xff\xff\x00\x00\x00\x00\x00\x01")

        assert await peer.farewell() == FRAME_SIZE_ERROR


# Clients that do not read, and clients that say nothing.


def generate(session_id: str) -> bytes:
    return message(bytes(GenerateRequest(session_id=session_id, max_tokens=10**6)))


async def session_in(house: House) -> str:
    async with connect(house.grpc) as client:
        session = await client.create_session()
        await session.append([1, 2, 3])
        return session.id


async def test_streams_that_are_not_read_give_their_sessions_back() -> None:
    unread = setting(INITIAL_WINDOW_SIZE, 0)
    async with open_house(capacity=2, reader_timeout_s=READ) as house:
        ids = [await session_in(house) for _ in range(2)]
        async with hostile(house, unread) as peer:
            numbers = [await peer.open(f"{SERVICE}/Generate", generate(one)) for one in ids]
            await peer.is_reset(*numbers)

        async with connect(house.grpc) as client:
            # As after a client that has left, the session answers.
            assert (await client.find_session(ids[0]).info()).history_length >= 3
        assert await is_polite_to_others(house)


async def test_a_connection_that_is_not_read_gives_its_session_back() -> None:
    async with open_house(capacity=1, reader_timeout_s=READ) as house:
        session_id = await session_in(house)
        async with hostile(house, setting(INITIAL_WINDOW_SIZE, 2**31 - 1)) as peer:
            await peer.send(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 2**31 - 2**16)))
            await peer.open(f"{SERVICE}/Generate", generate(session_id))

            await until(
                lambda: sample(house.server.metrics, "grpc_requests_total", method="Generate", code="CANCELLED") == 1
            )
        assert await is_polite_to_others(house)


async def test_a_watch_that_is_not_read_ends(mock_clock: MockClock) -> None:
    async with open_house(reader_timeout_s=READ) as house, hostile(house, setting(INITIAL_WINDOW_SIZE, 0)) as peer:
        number = await peer.open(WATCH, message())
        await peer.is_answered()
        await let_pass(mock_clock, READ)

        await peer.is_reset(number)


async def test_a_client_that_reads_slowly_is_served_to_the_end() -> None:
    async with open_house(reader_timeout_s=60) as house:
        session_id = await session_in(house)
        request = message(bytes(GenerateRequest(session_id=session_id, max_tokens=5)))
        async with hostile(house, setting(INITIAL_WINDOW_SIZE, 0)) as peer, trio.open_nursery() as nursery:
            number = await peer.open(f"{SERVICE}/Generate", request)

            async def read() -> None:
                for _ in range(100):
                    await peer.send(frame(WINDOW_UPDATE, 0, number, struct.pack(">I", 1)))

            nursery.start_soon(read)
            assert (await peer.status(number))["grpc-status"] == OK


async def test_a_connection_without_a_call_is_closed_and_told_so(mock_clock: MockClock) -> None:
    async with open_house(idle_connection_s=IDLE) as house, hostile(house) as peer:
        await peer.status(await peer.open(CHECK, message()))
        await let_pass(mock_clock, IDLE)

        assert await peer.farewell() == 0


async def test_a_client_whose_idle_connection_was_closed_calls_again_as_if_nothing_had_been(
    mock_clock: MockClock,
) -> None:
    async with open_house(idle_connection_s=IDLE) as house, connect(house.grpc) as client:
        session = await client.create_session()
        await session.append([1, 2, 3])
        async with hostile(house) as peer:
            await peer.is_answered()
            await let_pass(mock_clock, IDLE)
            # The later one of the two is closed, so the earlier one is.
            await peer.farewell()

        assert (await session.info()).history_length == 3


@pytest.mark.parametrize("said", [b"", PREFACE, PREFACE[:10], PREFACE + frame(SETTINGS)[:5]])
async def test_a_connection_on_which_nothing_is_said_is_closed(said: bytes) -> None:
    async with (
        open_house(idle_connection_s=IDLE) as house,
        await trio.open_tcp_stream(*split_address(house.grpc)) as stream,
    ):
        await stream.send_all(said)

        with trio.fail_after(60):
            async for _ in stream:
                pass


async def test_a_connection_with_a_call_is_not_idle(mock_clock: MockClock) -> None:
    async with open_house(idle_connection_s=IDLE) as house, connect(house.grpc) as client:
        session = await client.create_session()
        house.engine.hold()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.append, [1, 2, 3])
            await house.engine.begun()
            async with hostile(house) as peer:
                await peer.is_answered()
                await let_pass(mock_clock, IDLE)
                assert await peer.farewell() == 0
            house.engine.open()

        assert (await session.info()).history_length == 3


async def test_a_client_that_answers_no_ping_is_gone(mock_clock: MockClock) -> None:
    async with open_house(reader_timeout_s=READ) as house, hostile(house) as peer:
        peer.answers_pings = False
        await peer.open(WATCH, message())
        await peer.is_answered()
        for _ in range(2):
            await let_pass(mock_clock, READ)

        assert await peer.farewell() is None


async def test_a_client_that_answers_pings_may_be_silent(mock_clock: MockClock) -> None:
    async with open_house(reader_timeout_s=READ) as house, hostile(house) as peer:
        watched = await peer.open(WATCH, message())
        await peer.first_data(watched)
        for _ in range(4):
            await let_pass(mock_clock, READ)
            await peer.until(lambda got: got.type == PING)
        await peer.is_answered()


async def test_the_end_of_the_door_waits_for_no_client(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without an end of its own to their patience, a door that waited would not end, and neither would the test.
    monkeypatch.setattr("api.foreign.grpclib.connection._CLOSING_S", 10**9)
    async with AsyncExitStack() as clients, open_house(idle_ttl_s=0, reader_timeout_s=10**9) as house:
        session_id = await session_in(house)
        deaf, half, silent = [
            await clients.enter_async_context(hostile(house, setting(INITIAL_WINDOW_SIZE, 0))) for _ in range(3)
        ]
        await deaf.open(f"{SERVICE}/Generate", generate(session_id))
        await deaf.open(WATCH, message())
        await half.open(f"{SERVICE}/AppendTokens", message(length=100), ends=False)
        await silent.is_answered()
        await deaf.is_answered()
        await half.is_answered()


# Connections.


async def test_without_descriptors_the_door_goes_on_and_says_so_once(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    clients = [trio.socket.socket() for _ in range(30)]
    with socket.socket() as last:
        most = last.fileno() + 6
    with few_descriptors(most):
        for client in clients:
            await client.connect(split_address(house.grpc))
        await until(lambda: "no room" in caplog.text)
        for client in clients:
            client.close()

        assert await is_polite_to_others(house)
    assert caplog.text.count("no room") == 1
    assert not tracebacks(caplog)


async def test_the_connection_idle_longest_makes_room_for_another() -> None:
    ended: list[int] = []
    accepting = Accepting(2)
    attached: list[socket.socket] = []

    async def attach(connected: socket.socket) -> None:
        attached.append(connected)

    def end_idle_one() -> None:
        ended.append(len(attached))
        attached.pop(0).close()
        trio.lowlevel.current_trio_token().run_sync_soon(accepting.one_has_left)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(accepting.run, listener, attach, end_idle_one)
            clients = [await trio.open_tcp_stream(*listener.getsockname()) for _ in range(3)]

            assert await clients[0].receive_some() == b""
            await until(lambda: len(attached) == 2)
            assert ended == [2]
            nursery.cancel_scope.cancel()
    for client in clients:
        await client.aclose()
    for one in attached:
        one.close()


# Compression.


async def test_a_message_may_be_gzipped_and_every_answer_says_so(house: House) -> None:
    request = bytes(CreateSessionRequest(client_label="zipped"))
    async with hostile(house) as peer:
        number = await peer.open(f"{SERVICE}/CreateSession", message(gzip.compress(request), 1), grpc_encoding="gzip")
        first = await peer.until(lambda got: isinstance(got, HeadersFrame) and got.stream_id == number)

        assert first.fields["grpc-accept-encoding"] == "identity,gzip"
        assert (await peer.status(number))["grpc-status"] == OK
    assert [one.label for one in house.runtime.list_sessions()] == ["zipped"]


@pytest.mark.parametrize(
    ("data", "flag", "encoding", "status"),
    [
        (gzip.compress(bytes(MOST_MESSAGE_BYTES + 1)), 1, "gzip", RESOURCE_EXHAUSTED),
        (gzip.compress(gzip.compress(bytes(2**30))), 1, "gzip", INVALID_ARGUMENT),
        (gzip.compress(b"cut short")[:-4], 1, "gzip", INVALID_ARGUMENT),
        (gzip.compress(b"") + b"more", 1, "gzip", INVALID_ARGUMENT),
        (b"no gzip", 1, "gzip", INVALID_ARGUMENT),
        (gzip.compress(b""), 1, "identity", "13"),
        (gzip.compress(b""), 2, "gzip", "13"),
        (b"", 0, "gzip", OK),
        (b"", 1, "deflate", UNIMPLEMENTED),
    ],
    ids=["bomb", "twice", "cut", "more", "none", "unnamed", "flag", "plain", "deflate"],
)
async def test_what_cannot_be_unpacked_is_refused(
    house: House, data: bytes, flag: int, encoding: str, status: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with hostile(house) as peer:
        number = await peer.open(f"{SERVICE}/ListSessions", message(data, flag), grpc_encoding=encoding)
        trailers = await peer.status(number)

        assert trailers["grpc-status"] == status
        if status == UNIMPLEMENTED:
            assert trailers["grpc-accept-encoding"] == "identity,gzip"
    assert not tracebacks(caplog)


# What the log says.


async def test_a_stream_that_is_cancelled_at_its_very_end_is_no_news(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    session_id = await session_in(house)
    request = message(bytes(GenerateRequest(session_id=session_id, max_tokens=1)))
    async with hostile(house) as peer:
        for passes in [*range(20)] * 6:
            number = await peer.open(f"{SERVICE}/Generate", request)
            await peer.first_data(number)
            # The server comes to the call's end in the meantime, at one of these passes.
            for _ in range(passes):
                await trio.lowlevel.checkpoint()
            await peer.send(frame(RST_STREAM, 0, number, struct.pack(">I", 8)))
        await peer.is_answered()
    assert not tracebacks(caplog)
    assert "ancel" not in caplog.text


# What a session is made of.


@pytest.mark.parametrize(("label", "eos"), [("x" * 257, 0), ("é" * 129, 0), ("", 65), ("", 10_000)])
async def test_a_session_with_a_label_or_eos_ids_beyond_their_bounds_is_refused(
    house: House, label: str, eos: int
) -> None:
    async with connect(house.grpc) as client:
        with pytest.raises(InvalidRequest):
            await client.create_session(range(eos), label=label)
    assert not house.runtime.list_sessions()


async def test_a_session_with_a_label_and_eos_ids_at_their_bounds_is_made() -> None:
    async with open_lab(LedgerEngine()) as runtime:
        await runtime.create_session(range(64), label="é" * 128)
        with pytest.raises(InvalidRequest, match="256 bytes"):
            await runtime.create_session(label="x" * 257)
        with pytest.raises(InvalidRequest, match="64"):
            await runtime.create_session(range(65))


# Anything.


@pytest.mark.parametrize(
    ("connections", "frames"), [(200, 20), pytest.param(5000, 20, marks=pytest.mark.soak, id="soak")]
)
async def test_random_frames_end_nothing_but_their_connections(
    house: House, connections: int, frames: int, caplog: pytest.LogCaptureFixture
) -> None:
    await send_anything(house.grpc, GRPC_CALLS, connections, frames)

    assert await is_polite_to_others(house)
    assert not tracebacks(caplog)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    await until(lambda: streams_held() == 0)
