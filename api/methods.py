"""The methods of `kakeya.v1.RuntimeService`, whatever carries their messages: each answers bytes with messages."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import trio
from betterproto2 import Message
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from grpclib import Status
from grpclib.exceptions import StreamTerminatedError

from actors import Runtime
from api.auth import check_key
from api.grpc_standard import descriptors
from api.replies import as_grpc
from api.server import Server
from api.wire import (
    OVERFLOWS,
    PACKAGE,
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
from runtime.errors import InvalidRequest

# Parsing costs a few microseconds a token: longer messages are parsed off the event loop.
_PARSED_AT_ONCE_BYTES = 16 * 2**10

Q = TypeVar("Q", bound=Message)
A = TypeVar("A", bound=Message)
A_contra = TypeVar("A_contra", bound=Message, contravariant=True)


class Send(Protocol[A_contra]):
    """Sends one response, and returns once the transport takes more."""

    def __call__(self, response: A_contra, /) -> Awaitable[None]: ...


@dataclass(frozen=True, slots=True)
class Method(Generic[Q, A]):
    """One method of the service: what it does with a request, and the types of request and response."""

    name: str
    run: Callable[[Runtime, Q, Send[A]], Awaitable[None]]
    asked: type[Q]
    answered: type[A]
    is_stream: bool = False

    async def answer(
        self, server: Server, authorization: str | None, receive: Callable[[], Awaitable[bytes]], send: Send[A]
    ) -> None:
        """Answers a call, and counts it. Raises GRPCError, with the status that the client is to be told."""
        status = Status.CANCELLED
        try:
            check_key(server.settings, authorization)
            with server.call() as runtime, server.may_be_ended(by_host=False):
                message = await receive()
                parse = partial(_parsed, self.asked, message)
                request = parse() if len(message) < _PARSED_AT_ONCE_BYTES else await trio.to_thread.run_sync(parse)
                await self.run(runtime, request, send)
            status = Status.OK
        except StreamTerminatedError:
            raise
        except Exception as error:
            told = as_grpc(error)
            status = told.status
            raise told from None
        finally:
            server.metrics.grpc_requests_total.labels(self.name, status.name).inc()


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


METHODS: tuple[Method[Any, Any], ...] = (
    Method("CreateSession", create_session, CreateSessionRequest, CreateSessionResponse),
    Method("AppendTokens", append_tokens, AppendTokensRequest, AppendTokensResponse),
    Method("Generate", generate, GenerateRequest, GenerateResponse, is_stream=True),
    Method("CloseSession", close_session, CloseSessionRequest, CloseSessionResponse),
    Method("GetSessionInfo", get_session_info, GetSessionInfoRequest, GetSessionInfoResponse),
    Method("ForkSession", fork_session, ForkSessionRequest, ForkSessionResponse),
    Method("SaveSession", save_session, SaveSessionRequest, SaveSessionResponse),
    Method("RestoreSession", restore_session, RestoreSessionRequest, RestoreSessionResponse),
    Method("ListSnapshots", list_snapshots, ListSnapshotsRequest, ListSnapshotsResponse),
    Method("DeleteSnapshot", delete_snapshot, DeleteSnapshotRequest, DeleteSnapshotResponse),
    Method("GetModelInfo", get_model_info, GetModelInfoRequest, GetModelInfoResponse),
    Method("ListSessions", list_sessions, ListSessionsRequest, ListSessionsResponse),
)


def _parsed(asked: type[Q], message: bytes) -> Q:
    # betterproto2 takes messages that are cut short, or have fields of another type, for whole. protobuf does not.
    whole = GetMessageClass(descriptors().FindMessageTypeByName(f"{PACKAGE}.{asked.__name__}"))()
    try:
        whole.ParseFromString(message)
    except DecodeError as error:
        raise InvalidRequest(f"these bytes are no {asked.__name__}: {error}") from None
    whole.DiscardUnknownFields()
    return asked.parse(whole.SerializeToString())
