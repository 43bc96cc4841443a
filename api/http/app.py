"""The HTTP door: routes, errors and the headers that say which routes are deprecated. `app` is for `hypercorn api.http:app`."""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import cast

import trio
from hypercorn.config import Config
from hypercorn.trio import serve as hypercorn_serve
from hypercorn.typing import HTTPScope, WebsocketScope
from quart import Response, has_request_context, request, websocket
from quart_trio import QuartTrio
from quart_trio.wrappers import TrioRequest
from werkzeug.exceptions import RequestEntityTooLarge, RequestTimeout

from actors.nursery import lone_errors, open_nursery
from api.auth import check_key, needs_key
from api.bridge import EitherLoop, TrioApplication
from api.foreign.hypercorn import Patience, patch
from api.guard import check_caller, cors_headers, preflight_headers
from api.hosting import HostedApplication
from api.http.chat import add_chat_routes
from api.http.connection import MOST_BODY_BYTES, Connection, upload_of
from api.http.messages import add_message_routes
from api.http.responses import add_response_routes
from api.http.routes import DEPRECATION, Door, Route
from api.http.standard import add_standard_routes, json_response
from api.server import Server
from api.uploads import Upload, UploadRoom
from runtime.errors import InvalidSetting, Saturated
from runtime.settings import UNIX

# Bound on all bodies and frames together, for clients without a key can send some too.
MOST_UPLOAD_BYTES = 64 * 2**20
# Each adds its routes.
_FAMILIES = (add_standard_routes, add_chat_routes, add_response_routes, add_message_routes)


def make_app(server: Server) -> QuartTrio:
    """The HTTP door of `server` as an ASGI application for trio."""
    app = QuartTrio("perennial", root_path=str(Path(__file__).parent), static_folder=None)
    app.config.update(RESPONSE_TIMEOUT=None, MAX_CONTENT_LENGTH=MOST_BODY_BYTES)
    uploads = UploadRoom(MOST_UPLOAD_BYTES)
    body_class = partial(Upload, uploads)
    app.request_class = cast(type[TrioRequest], type("UploadRequest", (TrioRequest,), {"body_class": body_class}))
    app.asgi_http_class = cast(type[Connection], partial(Connection, server))
    # Each path has one spelling here, and a redirect would lead to whatever Host the client named.
    app.url_map.merge_slashes = False
    app.url_map.redirect_defaults = False
    settings = server.settings
    door = Door(app, server, uploads)

    @app.before_websocket
    async def guard_handshake() -> None:
        check_caller(settings, websocket.headers, _address(websocket.scope))
        if needs_key(websocket.path):
            check_key(settings, websocket.headers.get("Authorization"))

    @app.before_request
    async def guard() -> Response | None:
        check_caller(
            settings,
            request.headers,
            _address(request.scope),
            # For an unknown path or method the answer must say that, and not ask for another content type.
            has_body=request.method == "POST" and request.routing_exception is None,
            is_old=request.http_version == "1.0",
        )
        if request.method == "OPTIONS" and (told := preflight_headers(request.headers)) is not None:
            return Response("", 204, told)
        return None

    @app.before_request
    async def authenticate() -> None:
        if needs_key(request.path) and request.method != "OPTIONS":
            header = door.family_of(request.path).key_header
            check_key(settings, request.headers.get("Authorization"), request.headers.get(header) if header else None)

    @app.after_request
    async def deprecate(response: Response) -> Response:
        if door.family_of(request.path).is_deprecated:
            response.headers.update(DEPRECATION)
        return response

    # A handshake for a path without a WebSocket is refused with a response. An accepted handshake has no response.
    @app.after_websocket  # type: ignore[type-var] # It comes without a response where it is accepted.
    async def deprecate_refusal(response: Response | None) -> Response | None:
        if response is not None and door.family_of(websocket.path).is_deprecated:
            response.headers.update(DEPRECATION)
        return response

    @app.after_request
    async def share(response: Response) -> Response:
        response.headers.update(cors_headers(settings, request.headers))
        return response

    @app.after_request
    async def let_the_body_come(response: Response) -> Response:
        # If an answer is sent before its request has arrived, Hypercorn closes the connection, and the client's next request
        # is lost.
        upload_of(request).pass_over()
        try:
            await request.get_data(cache=False)
        except (RequestEntityTooLarge, RequestTimeout, Saturated):
            if request.http_version.startswith("1"):
                response.headers["Connection"] = "close"
        return response

    @app.errorhandler(Exception)
    async def refuse(error: Exception) -> Response:
        path = request.path if has_request_context() else websocket.path
        status, body, headers = door.family_of(path).as_error(error)
        return json_response(body, status, headers)

    for add_routes in _FAMILIES:
        add_routes(door)
    app.extensions["door"] = door
    return app


def routes_of(app: QuartTrio) -> list[Route]:
    """The routes of an application that `make_app` made."""
    door: Door = app.extensions["door"]
    return door.routes


async def http_door(server: Server, bind: str, *, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED) -> None:
    """Serves HTTP on `bind`, HOST:PORT or unix:PATH, until cancelled. Started in a nursery, it returns the URL.

    Raises InvalidSetting.
    """
    settings = server.settings
    # Here the server drains by itself, so nobody needs to be told that Hypercorn stops.
    patch(Patience(settings.reader_timeout_s, on_stop=lambda _: None))
    config = Config()
    config.bind = [bind]
    config.keep_alive_timeout = settings.idle_connection_s
    config.errorlog = logging.getLogger("perennial.http")
    if not (settings.api_keys or settings.allow_unauthenticated):
        # For a socket in the file system: no other user may open it.
        config.umask = 0o077
    async with _own_socket(bind), open_nursery() as nursery:
        with _listening(bind):
            urls = await nursery.start(hypercorn_serve, make_app(server), config)
        task_status.started(urls[0])


@asynccontextmanager
async def _own_socket(bind: str) -> AsyncIterator[None]:
    """Checks that no other server listens on this path, and removes the socket when the block ends."""
    path = trio.Path(bind.removeprefix(UNIX))
    if not bind.startswith(UNIX):
        yield
        return
    # Hypercorn replaces a socket that nobody listens on any more.
    with suppress(OSError):
        async with await trio.open_unix_socket(path):
            raise InvalidSetting(f"bind={bind} is listened on already: stop that server, or choose another path")
    with _listening(bind):
        if not await path.exists():
            # Hypercorn leaves a socket that it cannot bind to the collector.
            with socket.socket(socket.AF_UNIX) as tried:
                tried.bind(str(path))
            await path.unlink()
        elif not await path.is_socket():
            raise InvalidSetting(f"bind={bind} is a file that is no socket: choose another path")
    try:
        yield
    finally:
        with trio.CancelScope(shield=True), suppress(OSError):
            await path.unlink()


@contextmanager
def _listening(bind: str) -> Iterator[None]:
    try:
        with lone_errors():
            yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise InvalidSetting(f"bind={bind} cannot be listened on: {reason}; choose another, or port 0") from error


def _address(scope: HTTPScope | WebsocketScope | None) -> str | None:
    """Our address to which the client has connected; None if it is not known."""
    server = scope and scope.get("server")
    return server[0] if server else None


app = EitherLoop(HostedApplication(cast(Callable[[Server], TrioApplication], make_app)))
