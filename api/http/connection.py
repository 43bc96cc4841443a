"""One HTTP request: its body, what it holds until its end, and how it is counted."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TypeVar, cast

import trio
from hypercorn.typing import ASGISendCallable, ASGISendEvent, HTTPScope
from quart import Quart, request
from quart.wrappers import Request
from quart_trio.asgi import TrioASGIHTTPConnection
from werkzeug.exceptions import RequestEntityTooLarge

from api.reading import Parse, ReadBody
from api.server import Server
from api.traces import describe_request, request_span
from api.uploads import Upload
from runtime.errors import PayloadTooLarge

R = TypeVar("R")

MOST_BODY_BYTES = 8 * 2**20
# Status under which requests are counted whose client left before the answer.
_CLIENT_LEFT = "499"
# Key of what a request holds until its end, in its scope.
_HELD = "perennial.held"
# Methods under which requests are counted: otherwise a client could create a series with each method that it invents.
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def held_by(asked: Request) -> AsyncExitStack:
    """What a request holds until its last byte is sent or its client has left."""
    return cast(dict[str, AsyncExitStack], asked.scope)[_HELD]


async def read_question(server: Server, parse: Parse[R]) -> R:
    """The request's body, read by `parse` in another process. Raises what is wrong with the body, or NotServing."""
    with server.may_be_ended():
        async with request_body() as body:
            return await server.reader.read(ReadBody(parse, body), len(body))


def upload_of(asked: Request) -> Upload:
    return cast(Upload, asked.body)


@asynccontextmanager
async def request_body() -> AsyncIterator[bytes]:
    """The request's body; its room is given back when the block ends."""
    try:
        body = cast(bytes, await request.get_data(cache=False, as_text=False))
    except RequestEntityTooLarge:
        raise PayloadTooLarge(f"the body is over {MOST_BODY_BYTES} bytes: send less") from None
    try:
        yield body
    finally:
        upload_of(request).let_go()


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
            # Within the last call Hypercorn tells that the client has left, which cancels this task, and only afterwards
            # closes the connection or reads on.
            with trio.CancelScope(shield=is_last):
                await send(event)

        began = trio.current_time()
        with request_span(request.method):
            try:
                async with AsyncExitStack() as held:
                    cast(dict[str, object], request.scope)[_HELD] = held
                    await super().handle_request(nursery, request, send_and_note)
            finally:
                # A part of the body may still arrive.
                upload_of(request).pass_over()
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
