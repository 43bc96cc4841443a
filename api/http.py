"""The HTTP door: routes, errors and the headers that say it is deprecated. `app` is for `hypercorn api.http:app`."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import cast

import trio
from hypercorn.config import Config
from hypercorn.trio import serve as hypercorn_serve
from hypercorn.typing import ASGISendCallable, ASGISendEvent, HTTPScope, WebsocketScope
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from quart import Quart, Response, request, websocket
from quart.wrappers import Request
from quart_trio import QuartTrio
from quart_trio.asgi import TrioASGIHTTPConnection
from quart_trio.wrappers import TrioRequest
from werkzeug.exceptions import RequestEntityTooLarge, RequestTimeout

from actors.nursery import lone_errors, open_nursery
from api.answers import ServerSentEvents, whole_answer
from api.auth import check_key, needs_key
from api.bridge import EitherLoop, TrioApplication
from api.completions import open_completion
from api.foreign.hypercorn import Patience, patch
from api.guard import check_caller, cors_headers, preflight_headers
from api.hosting import HostedApplication
from api.openapi import Route, document
from api.page import load_page
from api.replies import as_http, headers_of
from api.schemas import Health, Model, ModelList
from api.server import Phase, Server
from api.status import status_of
from api.traces import describe_request, request_span
from api.uploads import Upload, UploadRoom
from runtime.errors import InvalidSetting, PayloadTooLarge, Saturated

MOST_BODY_BYTES = 8 * 2**20
# Of all bodies at once: a client without a key can send some, too.
MOST_UPLOAD_BYTES = 64 * 2**20
MIGRATION_PAGE = "0008-session-bound-runtime-and-grpc-protocol.md"
MIGRATION_PATH = f"/docs/adr/{MIGRATION_PAGE}"
DEPRECATION = {
    "Deprecation": "true",
    "Sunset": "Wed, 31 Dec 2025 00:00:00 GMT",
    "Link": f'<{MIGRATION_PATH}>; rel="successor-version"; type="text/markdown"',
}
# What a request counts as whose client left before it was answered.
_CLIENT_LEFT = "499"
# Where a request keeps what it holds until its end.
_HELD = "perennial.held"
# What requests are counted by. A client that makes methods up would make a series of each.
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def make_app(server: Server) -> QuartTrio:
    """The HTTP door of `server` as an ASGI application for trio."""
    app = QuartTrio("perennial", root_path=str(Path(__file__).parent), static_folder=None)
    app.config.update(RESPONSE_TIMEOUT=None, MAX_CONTENT_LENGTH=MOST_BODY_BYTES)
    body_class = partial(Upload, UploadRoom(MOST_UPLOAD_BYTES))
    app.request_class = cast(type[TrioRequest], type("UploadRequest", (TrioRequest,), {"body_class": body_class}))
    app.asgi_http_class = cast(type[Connection], partial(Connection, server))
    # Nothing here has two spellings of its path, and a redirect would go to whatever Host the client has named.
    app.url_map.merge_slashes = False
    app.url_map.redirect_defaults = False
    settings = server.settings
    started, began = int(time.time()), time.monotonic()
    watching = load_page()

    @app.before_websocket
    async def guard_handshake() -> None:
        check_caller(settings, websocket.headers, _address(websocket.scope))

    @app.before_request
    async def guard() -> Response | None:
        check_caller(
            settings,
            request.headers,
            _address(request.scope),
            # Of a path or a method that there is not, that is what a client is to hear of.
            has_body=request.method == "POST" and request.routing_exception is None,
            is_old=request.http_version == "1.0",
        )
        if request.method == "OPTIONS" and (told := preflight_headers(request.headers)) is not None:
            return Response("", 204, told)
        return None

    @app.before_request
    async def authenticate() -> None:
        if needs_key(request.path) and request.method != "OPTIONS":
            check_key(server.settings, request.headers.get("Authorization"))

    # A handshake for a WebSocket, of which there are none here, is refused by a response too.
    @app.after_websocket  # type: ignore[type-var] # It comes without a response where it is accepted.
    @app.after_request
    async def deprecate(response: Response) -> Response:
        response.headers.update(DEPRECATION)
        return response

    @app.after_request
    async def share(response: Response) -> Response:
        response.headers.update(cors_headers(settings, request.headers))
        return response

    @app.after_request
    async def let_the_body_come(response: Response) -> Response:
        # Hypercorn has to close a connection on which an answer overtakes its request, and the client would lose the next.
        _upload_of(request).pass_over()
        try:
            await request.get_data(cache=False)
        except (RequestEntityTooLarge, RequestTimeout, Saturated):
            if request.http_version.startswith("1"):
                response.headers["Connection"] = "close"
        return response

    @app.errorhandler(Exception)
    async def refuse(error: Exception) -> Response:
        status, body, headers = as_http(error)
        return _json(body, status, headers)

    @app.get("/")
    async def page() -> Response:
        return Response(watching.html, headers=watching.headers, content_type="text/html; charset=utf-8")

    @app.get("/healthz")
    async def healthz() -> Response:
        health = Health(status=server.phase.value, model=server.label)
        return _json(health) if server.phase is Phase.SERVING else _json(health, 503, headers_of(503))

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(server.metrics.registry), content_type=CONTENT_TYPE_LATEST)

    @app.get("/openapi.json")
    async def openapi() -> Response:
        return Response(described, content_type="application/json")

    @app.get("/v1/models")
    async def models() -> Response:
        with server.call():
            return _json(ModelList(data=[Model(id=server.label, created=started)]))

    @app.get("/v1/runtime")
    async def runtime() -> Response:
        with server.call() as serving:
            return _json(
                status_of(serving, server.label, time.monotonic() - began), headers={"Cache-Control": "no-store"}
            )

    @app.get(MIGRATION_PATH)
    async def migration_page() -> Response:
        text = await trio.Path(__file__).with_name(MIGRATION_PAGE).read_text()
        return Response(text, content_type="text/markdown; charset=utf-8")

    @app.post("/v1/chat/completions")
    async def chat_completions() -> Response:
        held = _held_by(request)
        runtime = held.enter_context(server.call())
        describe_request({"gen_ai.request.model": server.label})
        with server.may_be_ended():
            async with _body() as body:
                reading = await server.reader.read(body)
        asked = reading.asked
        stream = await held.enter_async_context(open_completion(server, runtime, reading))
        if not asked.stream:
            return _json(await whole_answer(stream, server.label, has_logprobs=bool(asked.logprobs)))
        response = Response(content_type="text/event-stream; charset=utf-8", headers={"Cache-Control": "no-cache"})
        response.response = ServerSentEvents(
            stream, server.label, has_usage=asked.has_usage, has_logprobs=bool(asked.logprobs)
        )
        return response

    described = json.dumps(document(routes_of(app), server.settings, server.label, DEPRECATION))
    return app


def routes_of(app: Quart) -> list[Route]:
    """The routes of `app` in the order of their paths, without the methods that every one has."""
    return [
        Route(rule.endpoint, method, rule.rule)
        for rule in sorted(app.url_map.iter_rules(), key=lambda rule: rule.rule)
        for method in sorted((rule.methods or set()) - {"HEAD", "OPTIONS"})
    ]


async def http_door(server: Server, bind: str, *, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED) -> None:
    """Serves HTTP on `bind` until cancelled. Started in a nursery, it gives the URL. Raises InvalidSetting."""
    settings = server.settings
    # A drain that the server has begun by itself ends in its own time.
    patch(Patience(settings.reader_timeout_s, on_stop=lambda _: None))
    config = Config()
    config.bind = [bind]
    config.keep_alive_timeout = settings.idle_connection_s
    config.errorlog = logging.getLogger("perennial.http")
    async with open_nursery() as nursery:
        with _listening(bind):
            urls = await nursery.start(hypercorn_serve, make_app(server), config)
        task_status.started(urls[0])


@contextmanager
def _listening(bind: str) -> Iterator[None]:
    try:
        with lone_errors():
            yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise InvalidSetting(f"bind={bind} cannot be listened on: {reason}; choose another, or port 0") from error


def _json(body: BaseModel, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(body.model_dump_json(), status, headers, content_type="application/json")


def _address(scope: HTTPScope | WebsocketScope | None) -> str | None:
    """The address of ours that a client has connected to."""
    server = scope and scope.get("server")
    return server[0] if server else None


def _held_by(asked: Request) -> AsyncExitStack:
    return cast(dict[str, AsyncExitStack], asked.scope)[_HELD]


@asynccontextmanager
async def _body() -> AsyncIterator[bytes]:
    """The request's body, for the block."""
    try:
        body = cast(bytes, await request.get_data(cache=False, as_text=False))
    except RequestEntityTooLarge:
        raise PayloadTooLarge(f"the body is over {MOST_BODY_BYTES} bytes: send less") from None
    try:
        yield body
    finally:
        _upload_of(request).let_go()


def _upload_of(asked: Request) -> Upload:
    return cast(Upload, asked.body)


class Connection(TrioASGIHTTPConnection):
    """One request: what it holds until its last byte is sent or its client has left, and how it is counted."""

    def __init__(self, server: Server, app: Quart, scope: HTTPScope) -> None:
        super().__init__(app, scope)
        self._server = server

    async def handle_request(  # type: ignore[override] # quart-trio's has a nursery more than quart's.
        self, nursery: trio.Nursery, request: Request, send: ASGISendCallable
    ) -> None:
        status = _CLIENT_LEFT

        async def send_and_note(event: ASGISendEvent) -> None:
            nonlocal status
            if event["type"] == "http.response.start":
                status = str(event["status"])
            is_last = event["type"] == "http.response.body" and not event.get("more_body")
            # From within the last call Hypercorn says that the client has left, which cancels this task, and only then
            # does it close the connection or read on.
            with trio.CancelScope(shield=is_last):
                await send(event)

        began = trio.current_time()
        with request_span(request.method):
            try:
                async with AsyncExitStack() as held:
                    cast(dict[str, object], request.scope)[_HELD] = held
                    await super().handle_request(nursery, request, send_and_note)
            finally:
                # A part of it may come even now.
                _upload_of(request).pass_over()
                self._count(request, status, trio.current_time() - began)

    def _count(self, request: Request, status: str, seconds: float) -> None:
        metrics = self._server.metrics
        path = request.url_rule.rule if request.url_rule else "unmatched"
        method = request.method if request.method in _METHODS else "other"
        metrics.http_requests_total.labels(method, path, status).inc()
        metrics.http_request_duration_seconds.labels(method, path).observe(seconds)
        told: dict[str, str | int] = {
            "http.request.method": method,
            "http.route": path,
            "http.response.status_code": int(status),
        }
        describe_request(told, f"{method} {path}")


app = EitherLoop(HostedApplication(cast(Callable[[Server], TrioApplication], make_app)))
