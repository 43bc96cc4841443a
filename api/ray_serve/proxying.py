"""What Serve's proxies are told of us: the gRPC service, and how a request over HTTP names its session."""

from __future__ import annotations

import re
import secrets
from importlib.resources import files

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.affinity import ROUTE_HEADER, route_of, route_of_headers, route_of_response

# The longest body that a replica takes.
_LONGEST_BODY_BYTES = 8 * 2**20
# Within strings of JSON these quotes would be escaped, so this is a key of an object, though it may be of an inner one.
_KEY_IN_BODY = re.compile(rb'"(previous_response_id|prompt_cache_key)"\s*:\s*"([^"\\]{1,256})"')
_KEYED_PATHS = ("/v1/responses", "/v1/messages", "/v1/chat/completions")


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
    """For `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`: tells the router the session that a request's body names."""
    return [Middleware(Routes)]


class Routes:
    """ASGI middleware that adds a request's route to its headers: of its session, or one drawn for a new session."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope.get("path", "")
        if scope["type"] not in ("http", "websocket") or not path.startswith(_KEYED_PATHS):
            await self._app(scope, receive, send)
            return
        route = route_of_headers(scope["headers"]) or route_of_response(path.rpartition("/")[2])
        if route is None and scope["type"] == "http" and scope["method"] == "POST":
            receive, route = await _route_in_body(receive)
        added = (ROUTE_HEADER.encode(), (route or secrets.token_hex(8)).encode())
        kept = [(name, value) for name, value in scope["headers"] if name.lower() != added[0]]
        await self._app({**scope, "headers": [*kept, added]}, receive, send)


async def _route_in_body(receive: Receive) -> tuple[Receive, str | None]:
    """The route that the body names, and what gives the body again."""
    begun: list[Message] = []
    body = bytearray()
    while not begun or (begun[-1].get("more_body") and len(body) <= _LONGEST_BODY_BYTES):
        begun.append(await receive())
        body += begun[-1].get("body", b"")
    given = iter(begun)

    async def receive_again() -> Message:
        for message in given:
            return message
        return await receive()

    named: dict[bytes, bytes] = dict(_KEY_IN_BODY.findall(body))
    if (previous := named.get(b"previous_response_id")) and (route := route_of_response(previous.decode("latin-1"))):
        return receive_again, route
    key = named.get(b"prompt_cache_key", previous)
    return receive_again, route_of(key.decode("latin-1")) if key else None
