"""The gRPC door: `kakeya.v1.RuntimeService`, handlers in trio over grpclib, which runs under trio-asyncio."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Protocol, TypeVar

import trio
from betterproto2 import Message
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from grpclib import GRPCError, Status
from grpclib.const import Cardinality, Handler
from grpclib.encoding.proto import ProtoCodec
from grpclib.exceptions import StreamTerminatedError
from grpclib.server import Stream

from actors import Runtime
from actors.nursery import open_nursery
from api.accepting import Accepting, most_connections
from api.auth import check_key
from api.bridge import FromAsyncio, asyncio_loop, for_asyncio
from api.foreign.grpclib import GuardedServer, Limits, require_tested_grpclib
from api.grpc_standard import HealthOf, descriptors, with_standard_services
from api.replies import as_grpc
from api.server import Server
from api.wire import (
    OVERFLOWS,
    PACKAGE,
    SERVICE,
    appended_on_wire,
    frame_of,
    info_on_wire,
    model_on_wire,
    snapshot_on_wire,
    summary_on_wire,
)
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
from runtime.errors import InvalidRequest, InvalidSetting
from runtime.settings import Settings, split_address

# Fits the longest append that a session takes.
MOST_MESSAGE_BYTES = 2 * 2**20
# Parsing costs a few microseconds a token: longer messages are parsed off the event loop.
_PARSED_AT_ONCE_BYTES = 16 * 2**10

Q = TypeVar("Q", bound=Message)
A = TypeVar("A", bound=Message)
A_contra = TypeVar("A_contra", bound=Message, contravariant=True)


class Send(Protocol[A_contra]):
    """Sends one response; returns when the transport can take more."""

    def __call__(self, response: A_contra, /) -> Awaitable[None]: ...


async def create_session(runtime: Runtime, request: CreateSessionRequest, send: Send[CreateSessionResponse]) -> None:
    try:
        overflow = OVERFLOWS[request.overflow]
    except KeyError:
        raise InvalidRequest(f"overflow has no value {int(request.overflow)}", "overflow") from None
    session = await runtime.create_session(request.eos_token_ids, overflow=overflow, label=request.client_label)
    await send(CreateSessionResponse(session_id=session.id))


async def append_tokens(runtime: Runtime, request: AppendTokensRequest, send: Send[AppendTokensResponse]) -> None:
    session = runtime.find_session(request.session_id)
    appended = await session.append(request.token_ids, request.expected_history_length)
    await send(appended_on_wire(appended))


async def generate(runtime: Runtime, request: GenerateRequest, send: Send[GenerateResponse]) -> None:
    generation = runtime.find_session(request.session_id).generate(
        request.max_tokens,
        temperature=request.temperature or 0.0,
        top_p=1.0 if request.top_p is None else request.top_p,
        top_k=request.top_k or 0,
        seed=request.seed,
    )
    async with generation as stream:
        async for event in stream:
            await send(frame_of(event))


async def close_session(runtime: Runtime, request: CloseSessionRequest, send: Send[CloseSessionResponse]) -> None:
    length = await runtime.find_session(request.session_id).close()
    await send(CloseSessionResponse(final_history_length=length))


async def get_session_info(
    runtime: Runtime, request: GetSessionInfoRequest, send: Send[GetSessionInfoResponse]
) -> None:
    await send(info_on_wire(await runtime.find_session(request.session_id).info()))


async def fork_session(runtime: Runtime, request: ForkSessionRequest, send: Send[ForkSessionResponse]) -> None:
    session = await runtime.fork_session(request.session_id)
    await send(ForkSessionResponse(session_id=session.id))


async def save_session(runtime: Runtime, request: SaveSessionRequest, send: Send[SaveSessionResponse]) -> None:
    saved = await runtime.save_session(request.session_id)
    await send(
        SaveSessionResponse(
            snapshot_id=saved.snapshot_id, size_bytes=saved.size_bytes, history_length=saved.history_length
        )
    )


async def restore_session(runtime: Runtime, request: RestoreSessionRequest, send: Send[RestoreSessionResponse]) -> None:
    session = await runtime.restore_session(request.snapshot_id)
    await send(RestoreSessionResponse(session_id=session.id))


async def list_snapshots(runtime: Runtime, _: ListSnapshotsRequest, send: Send[ListSnapshotsResponse]) -> None:
    await send(ListSnapshotsResponse(snapshots=[snapshot_on_wire(one) for one in runtime.list_snapshots()]))


async def delete_snapshot(runtime: Runtime, request: DeleteSnapshotRequest, send: Send[DeleteSnapshotResponse]) -> None:
    await send(DeleteSnapshotResponse(freed_bytes=await runtime.delete_snapshot(request.snapshot_id)))


async def list_sessions(runtime: Runtime, _: ListSessionsRequest, send: Send[ListSessionsResponse]) -> None:
    await send(ListSessionsResponse(sessions=[summary_on_wire(one) for one in runtime.list_sessions()]))


async def get_model_info(runtime: Runtime, _: GetModelInfoRequest, send: Send[GetModelInfoResponse]) -> None:
    await send(model_on_wire(await runtime.model_info()))


class RuntimeService:
    """The service as grpclib calls it: finds the method, checks the key, counts the call and turns errors into statuses."""

    def __init__(self, server: Server, from_asyncio: FromAsyncio) -> None:
        self._server = server
        self._from_asyncio = from_asyncio

    def __mapping__(self) -> dict[str, Handler]:
        unary, stream = Cardinality.UNARY_UNARY, Cardinality.UNARY_STREAM
        return dict(
            (
                self._method("CreateSession", unary, create_session, CreateSessionRequest, CreateSessionResponse),
                self._method("AppendTokens", unary, append_tokens, AppendTokensRequest, AppendTokensResponse),
                self._method("Generate", stream, generate, GenerateRequest, GenerateResponse),
                self._method("CloseSession", unary, close_session, CloseSessionRequest, CloseSessionResponse),
                self._method("GetSessionInfo", unary, get_session_info, GetSessionInfoRequest, GetSessionInfoResponse),
                self._method("ForkSession", unary, fork_session, ForkSessionRequest, ForkSessionResponse),
                self._method("SaveSession", unary, save_session, SaveSessionRequest, SaveSessionResponse),
                self._method("RestoreSession", unary, restore_session, RestoreSessionRequest, RestoreSessionResponse),
                self._method("ListSnapshots", unary, list_snapshots, ListSnapshotsRequest, ListSnapshotsResponse),
                self._method("DeleteSnapshot", unary, delete_snapshot, DeleteSnapshotRequest, DeleteSnapshotResponse),
                self._method("GetModelInfo", unary, get_model_info, GetModelInfoRequest, GetModelInfoResponse),
                self._method("ListSessions", unary, list_sessions, ListSessionsRequest, ListSessionsResponse),
            )
        )

    def _method(
        self,
        name: str,
        cardinality: Cardinality,
        method: Callable[[Runtime, Q, Send[A]], Awaitable[None]],
        asked: type[Q],
        answered: type[A],
    ) -> tuple[str, Handler]:
        async def answer(stream: Stream[bytes, A]) -> None:
            authorization = stream.metadata.get("authorization") if stream.metadata else None
            check_key(self._server.settings, str(authorization) if authorization else None)
            with self._server.call() as runtime, self._server.may_be_ended(by_host=False):
                message = await self._from_asyncio(stream.recv_message)()
                assert message is not None, "a unary call without a message was refused"
                parse = partial(_parse, asked, message)
                request = parse() if len(message) < _PARSED_AT_ONCE_BYTES else await trio.to_thread.run_sync(parse)
                await method(runtime, request, self._from_asyncio(stream.send_message))

        async def handle(stream: Stream[bytes, A]) -> None:
            status = Status.CANCELLED
            try:
                await answer(stream)
                status = Status.OK
            except StreamTerminatedError:
                raise
            except Exception as error:
                told = as_grpc(error)
                status = told.status
                raise told from None
            finally:
                self._server.metrics.grpc_requests_total.labels(name, status.name).inc()

        return f"/{SERVICE}/{name}", Handler(for_asyncio(handle), cardinality, bytes, answered)


def _parse(asked: type[Q], message: bytes) -> Q:
    # betterproto2 accepts messages that are cut short or have fields of another type; protobuf does not.
    whole = GetMessageClass(descriptors().FindMessageTypeByName(f"{PACKAGE}.{asked.__name__}"))()
    try:
        whole.ParseFromString(message)
    except DecodeError as error:
        raise InvalidRequest(f"these bytes are not a valid {asked.__name__}: {error}") from None
    whole.DiscardUnknownFields()
    return asked.parse(whole.SerializeToString())


class Codec(ProtoCodec):
    """Leaves it to our service's handlers to parse their messages."""

    def decode(self, data: bytes, message_type: Any) -> Any:
        if message_type is bytes:
            return data
        try:
            return super().decode(data, message_type)
        except DecodeError as error:
            raise GRPCError(
                Status.INVALID_ARGUMENT, f"these bytes are not a valid {message_type.__name__}: {error}"
            ) from None


async def grpc_door(server: Server, *, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED) -> None:
    """Serves gRPC on `grpc_bind` until cancelled. Started in a nursery, it returns `HOST:PORT`. Raises StartError."""
    require_tested_grpclib()
    settings, tls = server.settings, _tls(server.settings)
    limits = Limits(MOST_MESSAGE_BYTES, settings.reader_timeout_s, settings.idle_connection_s)
    with _listening(settings.grpc_bind) as listener:
        async with asyncio_loop() as from_asyncio:
            service, health = RuntimeService(server, from_asyncio), HealthOf(server)
            accepting = Accepting(most_connections())
            grpc_server = GuardedServer(
                with_standard_services(service, health), codec=Codec(), limits=limits, on_leaving=accepting.one_has_left
            )
            host, port = listener.getsockname()[:2]
            task_status.started(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
            try:
                async with open_nursery() as nursery:
                    nursery.start_soon(health.follow)
                    attach = partial(from_asyncio(grpc_server.attach), tls=tls)
                    await accepting.run(listener, attach, grpc_server.end_idle_one)
            finally:
                grpc_server.close()
                with trio.CancelScope(shield=True):
                    await from_asyncio(grpc_server.wait_closed)()


def _listening(address: str) -> socket.socket:
    host, port = split_address(address)
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InvalidSetting(
            f"grpc_bind={address} cannot be listened on: {reason}; choose another, port 0, or empty for no gRPC"
        ) from error
    # Accepted connections inherit it. Without it each call waits 40 ms for an acknowledgement between headers and message.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _tls(settings: Settings) -> ssl.SSLContext | None:
    if not settings.tls_cert:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["h2"])
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise InvalidSetting(f"tls_cert and tls_key are not a readable PEM pair: {error}") from error
    return context
