"""A client of the gRPC door, for programs in trio and in asyncio alike.

    async with connect("127.0.0.1:50051") as client:
        async with client.session(eos_token_ids=[2]) as session:
            await session.append([5, 6, 7])
            async with session.generate(max_tokens=16) as events:
                async for event in events:
                    print(event)

Events and errors are those of an embedded runtime.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from operator import index
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import anyio
import sniffio
from betterproto2 import Message
from grpclib import GRPCError, Status
from grpclib.client import Channel, Stream, UnaryStreamMethod, UnaryUnaryMethod
from grpclib.exceptions import StreamTerminatedError

from api.foreign.grpclib import ForgetfulChannel
from api.wire import ERROR_KEY, SERVICE, appended_of, error_of, event_of, info_of, model_of, snapshot_of, summary_of
from proto.kakeya.v1 import (
    AppendTokensRequest,
    AppendTokensResponse,
    CloseSessionRequest,
    CloseSessionResponse,
    CreateSessionRequest,
    CreateSessionResponse,
    DeleteSnapshotRequest,
    DeleteSnapshotResponse,
    ForkSessionRequest,
    ForkSessionResponse,
    GenerateRequest,
    GenerateResponse,
    GetModelInfoRequest,
    GetModelInfoResponse,
    GetSessionInfoRequest,
    GetSessionInfoResponse,
    ListSessionsRequest,
    ListSessionsResponse,
    ListSnapshotsRequest,
    ListSnapshotsResponse,
    RestoreSessionRequest,
    RestoreSessionResponse,
    SaveSessionRequest,
    SaveSessionResponse,
)
from proto.kakeya.v1 import Overflow as WireOverflow
from runtime import events
from runtime.checks import check_whole, checked_eos_ids, checked_label, checked_tokens, is_text, short_repr
from runtime.errors import (
    CapacityExhausted,
    DeadlineExceeded,
    EngineFailed,
    HistoryMismatch,
    InvalidRequest,
    NotServing,
    NotSupported,
    PerennialError,
    SessionFailed,
    SessionMoved,
    SessionNotFound,
    SlabOverflow,
    SnapshotMismatch,
    SnapshotNotFound,
    Unauthenticated,
)
from runtime.sessions import Appended, ModelInfo, Saved, SessionInfo, SessionSummary, Snapshot
from runtime.settings import split_address

if TYPE_CHECKING:
    from api.bridge import FromAsyncio

P = ParamSpec("P")
T = TypeVar("T")
Q = TypeVar("Q", bound=Message)
A = TypeVar("A", bound=Message)

# Other strings cannot be sent as a header.
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
# protobuf sends larger numbers as others.
_MOST_UINT32 = 2**32 - 1
_MOST_UINT64 = 2**64 - 1
SESSION_HEADER = "x-session-id"
"""The metadata of a call on a session."""

# For servers of earlier versions, and for proxies: they do not say which error it is.
_ERRORS: dict[Status, type[PerennialError]] = {
    Status.INVALID_ARGUMENT: InvalidRequest,
    Status.NOT_FOUND: SessionNotFound,
    Status.ABORTED: HistoryMismatch,
    Status.OUT_OF_RANGE: SlabOverflow,
    Status.RESOURCE_EXHAUSTED: CapacityExhausted,
    Status.FAILED_PRECONDITION: SnapshotMismatch,
    Status.DEADLINE_EXCEEDED: DeadlineExceeded,
    Status.UNAUTHENTICATED: Unauthenticated,
    Status.UNAVAILABLE: NotServing,
    Status.UNIMPLEMENTED: NotSupported,
}


@asynccontextmanager
async def connect(address: str, *, key: str = "", tls: ssl.SSLContext | None = None) -> AsyncIterator[Client]:
    """A client of the server at `HOST:PORT`; its first call connects. Raises InvalidRequest for another kind of address."""
    try:
        host, port = split_address(address)
    except ValueError as error:
        raise InvalidRequest(str(error), "address") from None
    async with _asyncio_loop() as from_asyncio:
        channel = ForgetfulChannel(host, port, ssl=tls)
        try:
            yield Client(channel, key, from_asyncio)
        finally:
            channel.close()


class Client:
    """Calls a server. Every call raises the PerennialError that the server answers with, or NotServing if none does."""

    def __init__(self, channel: Channel, key: str, from_asyncio: FromAsyncio) -> None:
        self._channel = channel
        self._from_asyncio = from_asyncio
        self._metadata = {"authorization": f"Bearer {key}"} if key else {}

    def _metadata_of(self, request: Message) -> dict[str, str]:
        """The metadata of a call. It names the session, so that a proxy can send a session's calls to one of several servers."""
        session_id = getattr(request, "session_id", "")
        return self._metadata | ({SESSION_HEADER: session_id} if _ID.fullmatch(session_id) else {})

    async def create_session(
        self,
        eos_token_ids: Iterable[int] = (),
        *,
        overflow: events.Overflow = events.Overflow.EVICT,
        label: str = "",
    ) -> ClientSession:
        """A new session on the server, to be closed by the caller. Raises CapacityExhausted, InvalidRequest."""
        request = CreateSessionRequest(
            client_label=checked_label(label),
            eos_token_ids=sorted(checked_eos_ids(eos_token_ids)),
            overflow=WireOverflow[events.checked_overflow(overflow).name],
        )
        reply = await self.call("CreateSession", request, CreateSessionResponse)
        return self.find_session(reply.session_id)

    async def restore_session(self, snapshot_id: str) -> ClientSession:
        """A new session that continues from where a saved one stood. Raises SnapshotNotFound, SnapshotMismatch."""
        request = RestoreSessionRequest(_checked_snapshot(snapshot_id))
        reply = await self.call("RestoreSession", request, RestoreSessionResponse)
        return self.find_session(reply.session_id)

    async def list_snapshots(self) -> list[Snapshot]:
        """Every snapshot that the server keeps, the oldest first."""
        reply = await self.call("ListSnapshots", ListSnapshotsRequest(), ListSnapshotsResponse)
        return [snapshot_of(one) for one in reply.snapshots]

    async def delete_snapshot(self, snapshot_id: str) -> int:
        """Deletes a snapshot; returns the bytes that it took. Raises SnapshotNotFound."""
        request = DeleteSnapshotRequest(_checked_snapshot(snapshot_id))
        reply = await self.call("DeleteSnapshot", request, DeleteSnapshotResponse)
        return reply.freed_bytes

    async def list_sessions(self) -> list[SessionSummary]:
        """The server's summary of each of its sessions."""
        reply = await self.call("ListSessions", ListSessionsRequest(), ListSessionsResponse)
        return [summary_of(one) for one in reply.sessions]

    async def model_info(self) -> ModelInfo:
        """What a client needs to know to make tokens for the server's model. Raises NotSupported if the server does not tell."""
        return model_of(await self.call("GetModelInfo", GetModelInfoRequest(), GetModelInfoResponse))

    def find_session(self, session_id: str) -> ClientSession:
        """A handle on the session with this id. The server looks it up at the first call.

        Raises SessionNotFound for what cannot be an id.
        """
        if not is_text(session_id):
            raise SessionNotFound(f"no session has the id {short_repr(session_id)}")
        return ClientSession(self, session_id)

    @asynccontextmanager
    async def session(
        self,
        eos_token_ids: Iterable[int] = (),
        *,
        overflow: events.Overflow = events.Overflow.EVICT,
        label: str = "",
    ) -> AsyncIterator[ClientSession]:
        """A new session that is closed when the block ends. Raises CapacityExhausted."""
        session = await self.create_session(eos_token_ids, overflow=overflow, label=label)
        try:
            yield session
        finally:
            with anyio.CancelScope(shield=True), suppress(SessionNotFound, SessionFailed, EngineFailed, NotServing):
                await session.close()

    async def call(self, method: str, request: Q, answered: type[A]) -> A:
        """The response of a unary method."""
        wire: UnaryUnaryMethod[Q, A] = UnaryUnaryMethod(self._channel, f"/{SERVICE}/{method}", type(request), answered)
        stream = wire.open(metadata=self._metadata_of(request))
        with _typed_errors(stream):
            return await self._from_asyncio(_exchange)(stream, request)

    @asynccontextmanager
    async def stream(
        self, method: str, request: Q, answered: type[A]
    ) -> AsyncIterator[Callable[[], Awaitable[A | None]]]:
        """The next response of a streaming method, None at the end; leaving the block cancels the call."""
        wire: UnaryStreamMethod[Q, A] = UnaryStreamMethod(
            self._channel, f"/{SERVICE}/{method}", type(request), answered
        )
        stream = wire.open(metadata=self._metadata_of(request))
        here = self._from_asyncio
        await here(stream.__aenter__)()
        ended: BaseException = _Left()
        try:
            with _typed_errors(stream):
                await here(stream.send_message)(request, end=True)
            yield partial(_next, stream, here)
        except NotServing as error:
            # Where the stream broke off, grpclib looks whether the server had sent a last word, and raises that.
            ended = error.__context__ or ended
            raise
        finally:
            # Resets a stream that was not read to its end, also while the caller is being cancelled.
            with anyio.CancelScope(shield=True), _typed_errors(stream):
                await here(stream.__aexit__)(type(ended), ended, None)


def _checked_snapshot(snapshot_id: str) -> str:
    if not is_text(snapshot_id):
        raise SnapshotNotFound(f"no snapshot has the id {short_repr(snapshot_id)}")
    return snapshot_id


async def _exchange(stream: Stream[Q, A], request: Q) -> A:
    async with stream:
        await stream.send_message(request, end=True)
        response = await stream.recv_message()
    assert response is not None, "grpclib raises where a call ends without a response"
    return response


async def _next(stream: Stream[Any, A], here: FromAsyncio) -> A | None:
    """The next response; None at the end, which is the server's own word. Raises what it says where that is an error."""
    with _typed_errors(stream):
        return await here(_receive)(stream)


async def _receive(stream: Stream[Any, A]) -> A | None:
    response = await stream.recv_message()
    if response is None:
        await stream.recv_trailing_metadata()
    return response


class _Left(Exception):
    """Raised inside grpclib's block to make it reset the stream instead of waiting for its end."""


class ClientSession:
    """A session that lives on the server. After a lost connection, `Client.find_session(id)` finds it again."""

    def __init__(self, client: Client, session_id: str) -> None:
        self.id = session_id
        self._client = client

    async def append(self, token_ids: Iterable[int], expected_history_length: int | None = None) -> Appended:
        """Adds to the history, and returns once the model has read it.

        With `expected_history_length` a lost reply can be retried: HistoryMismatch says that it had been appended.
        Raises InvalidRequest, HistoryMismatch, SlabOverflow, SessionNotFound, or SessionMoved where another server holds it.
        """
        if expected_history_length is not None:
            expected_history_length = check_whole("expected_history_length", expected_history_length, 0, _MOST_UINT64)
        request = AppendTokensRequest(self.id, list(checked_tokens(token_ids)), expected_history_length)
        reply = await self._client.call("AppendTokens", request, AppendTokensResponse)
        return appended_of(reply)

    @asynccontextmanager
    async def generate(
        self,
        max_tokens: int,
        *,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
    ) -> AsyncIterator[ClientEvents]:
        """The events of a generation: HistoryTruncated at most once, Token by Token, Done. Leaving the block cancels it.

        Raises InvalidRequest.
        """
        # Its checks are those of an embedded runtime.
        events.Sampling(
            0.0 if temperature is None else temperature,
            1.0 if top_p is None else top_p,
            0 if top_k is None else top_k,
            0 if seed is None else seed,
        )
        request = GenerateRequest(
            self.id,
            check_whole("max_tokens", max_tokens, 1, _MOST_UINT32),
            seed if seed is None else index(seed),
            temperature,
            top_p,
            # No vocabulary is larger, so all of these keep every token.
            top_k if top_k is None else min(index(top_k), _MOST_UINT32),
        )
        async with self._client.stream("Generate", request, GenerateResponse) as receive:
            yield ClientEvents(receive)

    async def info(self) -> SessionInfo:
        """The server's facts about the session."""
        reply = await self._client.call("GetSessionInfo", GetSessionInfoRequest(self.id), GetSessionInfoResponse)
        return info_of(reply)

    async def fork(self) -> ClientSession:
        """A new session that continues from where this one stands, to be closed by the caller. Raises CapacityExhausted."""
        reply = await self._client.call("ForkSession", ForkSessionRequest(self.id), ForkSessionResponse)
        return self._client.find_session(reply.session_id)

    async def save(self) -> Saved:
        """Saves a snapshot on the server, for `Client.restore_session`. Raises NotDurable, StorageFailed."""
        reply = await self._client.call("SaveSession", SaveSessionRequest(self.id), SaveSessionResponse)
        return Saved(reply.snapshot_id, reply.size_bytes, reply.history_length)

    async def close(self) -> int:
        """Ends the session and returns the length of its history."""
        reply = await self._client.call("CloseSession", CloseSessionRequest(self.id), CloseSessionResponse)
        return reply.final_history_length


class ClientEvents:
    """The events of one generation."""

    def __init__(self, receive: Callable[[], Awaitable[GenerateResponse | None]]) -> None:
        self._receive = receive

    def __aiter__(self) -> AsyncIterator[events.Event]:
        return self

    async def __anext__(self) -> events.Event:
        frame = await self._receive()
        if frame is None:
            raise StopAsyncIteration
        return event_of(frame)


@asynccontextmanager
async def _asyncio_loop() -> AsyncIterator[FromAsyncio]:
    """The way to call grpclib, which needs asyncio: on the caller's asyncio loop, or on a guest loop inside the caller's trio."""
    if sniffio.current_async_library() == "trio":
        # Imported here because it loads trio-asyncio, which replaces functions of asyncio for the whole process.
        from api.bridge import asyncio_loop

        async with asyncio_loop() as from_asyncio:
            yield from_asyncio
    else:
        yield _as_it_is


def _as_it_is(function: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
    return function


@contextmanager
def _typed_errors(stream: Stream[Any, Any]) -> Iterator[None]:
    """Raises our errors for grpclib's. Only calls of grpclib belong in the block, because its caller may raise the same."""
    try:
        yield
    except GRPCError as error:
        raise _error_of(error, stream.trailing_metadata) from None
    except (StreamTerminatedError, OSError) as error:
        raise NotServing(f"no answer from the server: {error}; is it running?") from None


def _error_of(error: GRPCError, metadata: Mapping[str, str | bytes] | None) -> PerennialError:
    message = error.message or error.status.name
    named = error_of(str(metadata.get(ERROR_KEY, "")), message) if metadata else None
    if named is not None:
        return named
    if error.status is Status.ABORTED and message.startswith("moved"):
        return SessionMoved(message)
    return _ERRORS.get(error.status, SessionFailed)(message)
