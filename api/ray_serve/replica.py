"""One replica: a whole runtime in a trio loop of its own, with both doors' handlers, in an actor of Ray's."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar, cast

import anyio
import grpc
from anyio.abc import ObjectSendStream
from anyio.from_thread import BlockingPortal
from betterproto2 import Message
from grpclib import GRPCError
from grpclib.health.v1.health_pb2 import HealthCheckResponse
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from ray.serve.grpc_util import RayServegRPCContext

from actors.nursery import open_nursery
from api.bridge import EitherLoop, Receive, Scope, Send, TrioApplication
from api.http import make_app
from api.logs import configure_logging
from api.methods import METHODS, Method
from api.ray_serve.routing import SessionRouter
from api.ray_serve.scaling import LOAD
from api.server import Phase, Server
from api.traces import configure_tracing
from api.wire import ERROR_KEY
from runtime.errors import EngineFailed, InvalidSetting, StartError, lone_errors
from runtime.settings import Settings

A = TypeVar("A", bound=Message)

_log = logging.getLogger("perennial.server")

# Serve's own bound lies above all of ours, so that a client hears from the server what it has too little of.
_CALLS_A_SLAB = 8


class ServedApplication:
    """An ASGI application for trio whose lifespan is a server's: it has started when the model is loaded."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._server: Server | None = None
        self._door: TrioApplication | None = None

    @property
    def server(self) -> Server:
        assert self._server is not None, "the host has to start the lifespan first"
        return self._server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        else:
            assert self._door is not None, "the host has to start the lifespan first"
            await self._door(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        self._server = server = Server(self._settings)
        self._door = cast(TrioApplication, make_app(server))
        try:
            async with open_nursery() as nursery:
                await nursery.start(server.run)
                await send({"type": "lifespan.startup.complete"})
                await receive()
                await server.drain()
                # Each session leaves its slab in the store, and is given up.
                nursery.cancel_scope.cancel()
        except StartError as error:
            _log.critical("%s", error)
            await send({"type": "lifespan.startup.failed", "message": str(error)})
        except EngineFailed as error:
            # The replica's health says so, and Serve starts another one.
            _log.critical("%s", error)
            await receive()


class Refused(Exception):
    """Ends a call whose status has been set."""


class Replica:
    """What Serve calls. The methods of the gRPC service are added below."""

    def __init__(self, settings: Settings) -> None:
        configure_logging(settings.log_level)
        configure_tracing()
        self._application = ServedApplication(settings)
        self._door = EitherLoop(self._application)

    def __serve_build_asgi_app__(self) -> EitherLoop:
        return self._door

    async def check_health(self) -> None:
        """Raises RuntimeError unless the server serves."""
        if (phase := await self._door.call(self._phase)) is not Phase.SERVING:
            raise RuntimeError(f"the server is {phase.value}")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """How busy the replica is, for `replicas_for_load`."""
        return {LOAD: await self._door.call(self._load)}

    async def Check(self, request: bytes) -> Any:
        """The method of `grpc.health.v1.Health`, for whatever service it names."""
        is_serving = await self._door.call(self._phase) is Phase.SERVING
        status = HealthCheckResponse.SERVING if is_serving else HealthCheckResponse.NOT_SERVING
        return HealthCheckResponse(status=status)

    async def answer_one(self, method: Method[Any, A], request: bytes, context: RayServegRPCContext) -> A:
        """The response of a unary method. Raises Refused."""
        responses: list[A] = []

        async def keep(response: A) -> None:
            responses.append(response)

        with _status_told(context):
            await self._door.call(self._answer, method, request, context, keep)
        return responses[0]

    async def answer_many(
        self, method: Method[Any, A], request: bytes, context: RayServegRPCContext
    ) -> AsyncIterator[A]:
        """The responses of a streaming method. Raises Refused."""
        sending, receiving = anyio.create_memory_object_stream[A](0)
        with _status_told(context), lone_errors():
            async with BlockingPortal() as here, anyio.create_task_group() as tasks, receiving:
                tasks.start_soon(self._send_all, method, request, context, here, sending)
                async for response in receiving:
                    yield response

    async def _send_all(
        self,
        method: Method[Any, A],
        request: bytes,
        context: RayServegRPCContext,
        here: BlockingPortal,
        sending: ObjectSendStream[A],
    ) -> None:
        async with sending:
            await self._door.call(self._answer, method, request, context, partial(here.call_async, sending.send))

    async def _answer(
        self,
        method: Method[Any, A],
        request: bytes,
        context: RayServegRPCContext,
        send: Callable[[A], Awaitable[None]],
    ) -> None:
        async def receive() -> bytes:
            return request

        authorization = dict(context.invocation_metadata()).get("authorization")
        await method.answer(self._application.server, authorization, receive, send)

    async def _phase(self) -> Phase:
        return self._application.server.phase

    async def _load(self) -> float:
        return self._application.server.load


@contextmanager
def _status_told(context: RayServegRPCContext) -> Iterator[None]:
    """Has the proxy tell the client what ended the call."""
    try:
        yield
    except GRPCError as error:
        context.set_code(grpc.StatusCode[error.status.name])
        context.set_details(error.message or "")
        if error.details is not None:
            context.set_trailing_metadata([(ERROR_KEY, error.details)])
        raise Refused(error.message) from None


def _unary(method: Method[Any, Any]) -> Callable[..., Awaitable[Message]]:
    async def answer(self: Replica, request: bytes, grpc_context: RayServegRPCContext) -> Message:
        response: Message = await self.answer_one(method, request, grpc_context)
        return response

    return answer


def _stream(method: Method[Any, Any]) -> Callable[..., AsyncIterator[Message]]:
    async def answer(self: Replica, request: bytes, grpc_context: RayServegRPCContext) -> AsyncIterator[Message]:
        async for response in self.answer_many(method, request, grpc_context):
            yield response

    return answer


# Serve calls a method of the name that the client has called, and tells by its signature that it takes the context.
for _each in METHODS:
    setattr(Replica, _each.name, (_stream if _each.is_stream else _unary)(_each))


def application(arguments: Mapping[str, Any]) -> Application:
    """As `deploy`."""
    settings = Settings.from_environment(os.environ, {name: _as_text(value) for name, value in arguments.items()})
    # Serve's gRPC proxy listens on every address of its machine, and says so nowhere.
    settings.check_exposure("0.0.0.0:9000", "grpc_options.port")
    scheme, between, _ = settings.state_dir.partition("://")
    if not between or scheme == "memory":
        raise InvalidSetting(
            f"state_dir={settings.state_dir!r} cannot be shared by replicas: name a bucket (s3://, gs://, az://), "
            "or a directory that all machines see (file://)"
        )
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name="perennial",
        max_ongoing_requests=_CALLS_A_SLAB * (settings.capacity + settings.max_concurrent),
        request_router_config=RequestRouterConfig(request_router_class=SessionRouter),
    )
    return cast(Application, deployment.bind(settings))


def _as_text(value: object) -> str:
    """A value of YAML as a flag would have it."""
    return ",".join(map(_as_text, value)) if isinstance(value, list) else str(value)
