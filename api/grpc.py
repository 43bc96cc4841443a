"""The gRPC door: `kakeya.v1.RuntimeService`, handlers in trio over grpclib, which runs under trio-asyncio."""

from __future__ import annotations

import socket
import ssl
from functools import partial
from typing import Any, TypeVar

import trio
from betterproto2 import Message
from google.protobuf.message import DecodeError
from grpclib import GRPCError, Status
from grpclib.const import Cardinality, Handler
from grpclib.encoding.proto import ProtoCodec
from grpclib.events import SendTrailingMetadata, listen
from grpclib.server import Stream

from actors.nursery import open_nursery
from api.accepting import Accepting, most_connections
from api.bridge import FromAsyncio, asyncio_loop, for_asyncio
from api.foreign.grpclib import GuardedServer, Limits, require_tested_grpclib
from api.grpc_standard import HealthOf, with_standard_services
from api.methods import METHODS, Method
from api.server import Server
from api.wire import ERROR_KEY, SERVICE
from runtime.errors import InvalidSetting
from runtime.settings import Settings, split_address

# Fits the longest append that a session takes.
MOST_MESSAGE_BYTES = 2 * 2**20

A = TypeVar("A", bound=Message)


class RuntimeService:
    """What grpclib calls: a handler for each method."""

    def __init__(self, server: Server, from_asyncio: FromAsyncio) -> None:
        self._server = server
        self._from_asyncio = from_asyncio

    def __mapping__(self) -> dict[str, Handler]:
        return {f"/{SERVICE}/{method.name}": self._handler(method) for method in METHODS}

    def _handler(self, method: Method[Any, A]) -> Handler:
        async def handle(stream: Stream[bytes, A]) -> None:
            async def receive() -> bytes:
                message = await self._from_asyncio(stream.recv_message)()
                assert message is not None, "a unary call without a message was refused"
                return message

            authorization = stream.metadata.get("authorization") if stream.metadata else None
            key = str(authorization) if authorization else None
            await method.answer(self._server, key, receive, self._from_asyncio(stream.send_message))

        cardinality = Cardinality.UNARY_STREAM if method.is_stream else Cardinality.UNARY_UNARY
        return Handler(for_asyncio(handle), cardinality, bytes, method.answered)


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


async def _name_error(event: SendTrailingMetadata) -> None:
    if event.status_details is not None:
        event.metadata[ERROR_KEY] = event.status_details


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
            listen(grpc_server, SendTrailingMetadata, _name_error)
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
