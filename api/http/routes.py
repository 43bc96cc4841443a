"""How families of routes are added to the HTTP door, each route with its description for the OpenAPI document."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from pydantic import BaseModel
from quart import Response
from quart_trio import QuartTrio
from werkzeug.exceptions import RequestTimeout

from api.replies import as_http
from api.schemas import ErrorReply
from api.server import Server
from api.uploads import UploadRoom
from runtime.errors import (
    CapacityExhausted,
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    MalformedRequest,
    ModelNotFound,
    NotServing,
    PayloadTooLarge,
    Saturated,
    SessionFailed,
    SlabOverflow,
)

MIGRATION_PAGE = "0008-session-bound-runtime-and-grpc-protocol.md"
MIGRATION_PATH = f"/docs/adr/{MIGRATION_PAGE}"
DEPRECATION = {
    "Deprecation": "true",
    "Sunset": "Wed, 31 Dec 2025 00:00:00 GMT",
    "Link": f'<{MIGRATION_PATH}>; rel="successor-version"; type="text/markdown"',
}

JSON = "application/json"
EVENTS = "text/event-stream"

# Errors of every route that makes the model generate.
ANSWER_ERRORS: tuple[type[Exception], ...] = (
    *(MalformedRequest, SlabOverflow, ModelNotFound, RequestTimeout, PayloadTooLarge, InvalidRequest),
    *(CapacityExhausted, Saturated, EngineFailed, SessionFailed, NotServing, DeadlineExceeded),
)

Handler = Callable[..., Awaitable[Response]]


@dataclass(frozen=True)
class EventKinds:
    """Server-sent events, each with the JSON of one of `kinds`. A stream without an error ends with the data `last`, if given."""

    kinds: tuple[type[BaseModel], ...]
    last: str | None = None


@dataclass(frozen=True)
class Family:
    """The routes below a path: whether their answers say that they are deprecated, and the shape of their errors.

    `key_header` is the header in which clients may send their key instead of `Authorization`.
    """

    base: str
    is_deprecated: bool = True
    error_body: type[BaseModel] = ErrorReply
    as_error: Callable[[Exception], tuple[int, BaseModel, dict[str, str]]] = as_http
    key_header: str | None = None

    def holds(self, path: str) -> bool:
        return path == self.base or path.startswith(f"{self.base.rstrip('/')}/")


# Everything that no other family holds, unknown paths included.
SHIM = Family("/")


@dataclass(frozen=True)
class Operation:
    """A route's purpose, its request's body, and its answers: for each status and media type the type of the body.

    `errors` are those of this route; the errors that any route may answer with are added.
    """

    summary: str
    answers: Mapping[int, Mapping[str, type | EventKinds]]
    errors: tuple[type[Exception], ...] = ()
    takes: type[BaseModel] | None = None


@dataclass(frozen=True)
class Route:
    """A route of the door. Names in angle brackets in its path are parameters."""

    name: str
    method: str
    path: str
    operation: Operation
    family: Family


class Door:
    """The application of one server, to which families add their routes. `uploads` is the room for what clients send."""

    def __init__(self, app: QuartTrio, server: Server, uploads: UploadRoom) -> None:
        self.app = app
        self.server = server
        self.uploads = uploads
        self._routes: list[Route] = []

    def route(
        self, method: str, path: str, operation: Operation, family: Family = SHIM
    ) -> Callable[[Handler], Handler]:
        """Makes a function answer requests of this method for this path.

        The function's name, unique in the door, names the route.
        """

        def add(handler: Handler) -> Handler:
            name = handler.__name__
            self._routes.append(Route(name, method, path, operation, family))
            self.app.add_url_rule(path, name, handler, methods=[method])
            return handler

        return add

    @property
    def routes(self) -> list[Route]:
        """All routes, in the order of their paths."""
        return sorted(self._routes, key=lambda route: (route.path, route.method))

    def family_of(self, path: str) -> Family:
        """The family that answers requests for a path."""
        held = {route.family for route in self._routes if route.family.holds(path)}
        return max(held, key=lambda family: len(family.base), default=SHIM)
