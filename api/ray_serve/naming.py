"""How a request over HTTP tells Serve's router its session, where only its body names one."""

from __future__ import annotations

import re
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

from api.affinity import ROUTE_HEADER, route_of, route_of_headers, route_of_response

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[Any], Awaitable[None]]
Application = Callable[[Any, Any, Any], Awaitable[None]]

# The longest body that a replica takes.
_LONGEST_BODY_BYTES = 8 * 2**20
# Within strings of JSON these quotes would be escaped, so this is a key of an object, though it may be of an inner one.
_KEY_IN_BODY = re.compile(rb'"(previous_response_id|prompt_cache_key)"\s*:\s*"([^"\\]{1,256})"')
_PATHS = ("/v1/responses", "/v1/messages", "/v1/chat/completions")


class Routes:
    """ASGI middleware that adds a request's route to its headers: its session's, or one drawn for a new session."""

    def __init__(self, app: Application) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope.get("path", "")
        if scope["type"] not in ("http", "websocket") or not path.startswith(_PATHS):
            await self._app(scope, receive, send)
            return
        route = route_of_headers(scope["headers"]) or route_of_response(path.rpartition("/")[2])
        if route is None and scope.get("method") == "POST":
            receive, route = await _route_in_body(receive)
        header = ROUTE_HEADER.encode()
        others = [(name, value) for name, value in scope["headers"] if name.lower() != header]
        added = (header, (route or route_of(secrets.token_hex())).encode())
        await self._app({**scope, "headers": [*others, added]}, receive, send)


async def _route_in_body(receive: Receive) -> tuple[Receive, str | None]:
    """What gives the body anew, and the route that it names."""
    begun: list[dict[str, Any]] = []
    body = bytearray()
    while not begun or (begun[-1].get("more_body") and len(body) <= _LONGEST_BODY_BYTES):
        begun.append(await receive())
        body += begun[-1].get("body", b"")
    messages = iter(begun)

    async def receive_anew() -> dict[str, Any]:
        return next(messages, None) or await receive()

    named = {name: value.decode("latin-1") for name, value in _KEY_IN_BODY.findall(body)}
    previous, key = named.get(b"previous_response_id", ""), named.get(b"prompt_cache_key", "")
    route = route_of_response(previous) or (route_of(key or previous) if key or previous else None)
    return receive_anew, route
