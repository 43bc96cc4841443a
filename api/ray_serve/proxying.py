"""What Serve's proxies are told of us: the gRPC service, and how a request over HTTP names its session."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from importlib.resources import files
from typing import Any

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from starlette.middleware import Middleware

from api.ray_serve.naming import Routes

# What Ray says of a replica that died, or cannot be reached, within a call. The proxy tells it as INTERNAL.
_LOST = "The actor "
_TOLD = "the server of this session is gone or cannot be reached: ask again"


def add_runtime_service(servicer: Any, server: grpc.aio.Server) -> None:
    """Adds `kakeya.v1.RuntimeService` and `grpc.health.v1.Health` to Serve's gRPC proxy. Messages pass as the bytes they are.

    For `grpc_options.grpc_servicer_functions`, in the place of the function that grpcio makes of a proto file.
    """
    described = FileDescriptorSet.FromString(files("proto.kakeya.v1").joinpath("runtime.binpb").read_bytes())
    for file in described.file:
        # Where Serve's reflection looks.
        descriptor_pool.Default().AddSerializedFile(file.SerializeToString())
        for service in file.service:
            streams = {method.name: method.server_streaming for method in service.method}
            _add(f"{file.package}.{service.name}", streams, servicer, server)
    _add("grpc.health.v1.Health", {"Check": False}, servicer, server)


def _add(service: str, streams: dict[str, bool], servicer: Any, server: grpc.aio.Server) -> None:
    kinds = {True: grpc.unary_stream_rpc_method_handler, False: grpc.unary_unary_rpc_method_handler}
    handlers = {name: _Handler(*kinds[is_stream](getattr(servicer, name))) for name, is_stream in streams.items()}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))


_HandlerOfGrpcio: Any = type(grpc.unary_unary_rpc_method_handler(None))


class _Handler(_HandlerOfGrpcio):
    """A handler whose functions Serve replaces by its own, and which names a lost replica as our clients expect it."""

    __slots__ = ()

    def _replace(self, **changes: Any) -> _Handler:
        changes["unary_unary"] = _named_in_one(changes["unary_unary"])
        changes["unary_stream"] = _named_in_stream(changes["unary_stream"])
        replaced: _Handler = super()._replace(**changes)
        return replaced


def _named_in_one(answer: Callable[..., Awaitable[bytes]]) -> Callable[..., Awaitable[bytes]]:
    async def answer_and_name(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        response = await answer(request, context)
        _name_lost(context)
        return response

    return answer_and_name


def _named_in_stream(answer: Callable[..., AsyncIterator[bytes]]) -> Callable[..., AsyncIterator[bytes]]:
    async def answer_and_name(request: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        async for response in answer(request, context):
            yield response
        _name_lost(context)

    return answer_and_name


def _name_lost(context: grpc.aio.ServicerContext) -> None:
    is_internal = context.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.INTERNAL.value[0])
    if is_internal and (context.details() or "").startswith(_LOST):
        context.set_code(grpc.StatusCode.UNAVAILABLE)
        context.set_details(_TOLD)


def middleware() -> list[Middleware]:
    """For `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`: has the router hear of sessions that only bodies name."""
    return [Middleware(Routes)]
