"""What Serve's proxies are told of us: the gRPC service, and how a request over HTTP names its session."""

from __future__ import annotations

from importlib.resources import files

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from starlette.middleware import Middleware

from api.ray_serve.naming import Routes


def add_runtime_service(servicer: object, server: grpc.aio.Server) -> None:
    """Adds `kakeya.v1.RuntimeService` to Serve's gRPC proxy. Messages pass as the bytes that they are.

    For `grpc_options.grpc_servicer_functions`, in the place of the function that grpcio makes of a proto file.
    """
    described = FileDescriptorSet.FromString(files("proto.kakeya.v1").joinpath("runtime.binpb").read_bytes())
    for file in described.file:
        # Where Serve's reflection looks.
        descriptor_pool.Default().AddSerializedFile(file.SerializeToString())  # type: ignore[no-untyped-call]
        for service in file.service:
            handlers = {
                method.name: (
                    grpc.unary_stream_rpc_method_handler
                    if method.server_streaming
                    else grpc.unary_unary_rpc_method_handler
                )(getattr(servicer, method.name))
                for method in service.method
            }
            name = f"{file.package}.{service.name}"
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))
    check = {"Check": grpc.unary_unary_rpc_method_handler(servicer.Check)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("grpc.health.v1.Health", check),))


def middleware() -> list[Middleware]:
    """For `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`: has the router hear of sessions that only bodies name."""
    return [Middleware(Routes)]
