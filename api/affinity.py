"""Which server a call is for: its route, made of whatever names its session, by which several servers share sessions out."""

from __future__ import annotations

import re
from collections.abc import Iterable
from hashlib import blake2b

ROUTE_HEADER = "x-perennial-route"
"""What a proxy adds to a request over HTTP: the route of its session. Ids of responses then begin with it."""

_SESSION_HEADERS = ("x-session-id", "thread-id")
_ROUTE_BYTES = 8
_ROUTE = re.compile(rf"[0-9a-f]{{{2 * _ROUTE_BYTES}}}")
# The key of a message's first field, which is text. In every request on a session that is the session's id.
_FIRST_TEXT = 0x0A


def route_of(key: str) -> str:
    """The route of whatever names a session: 16 hexadecimal digits."""
    return blake2b(key.encode(errors="surrogatepass"), digest_size=_ROUTE_BYTES).hexdigest()


def is_route(text: str) -> bool:
    return _ROUTE.fullmatch(text) is not None


def route_of_headers(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """The route that the headers of a request over HTTP tell."""
    told = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in headers}
    if is_route(given := told.get(ROUTE_HEADER, "")):
        return given
    return next((route_of(key) for name in _SESSION_HEADERS if (key := told.get(name))), None)


def route_of_response(response_id: str) -> str | None:
    """The route that an id of a response begins with, where a replica has made it."""
    route = response_id.removeprefix("resp_")[: 2 * _ROUTE_BYTES]
    return route if response_id.startswith("resp_") and is_route(route) else None


def route_of_message(message: bytes) -> str | None:
    """The route that a request's message tells: that of the session whose id is its first field."""
    if len(message) < 2 or message[0] != _FIRST_TEXT or not 0 < (length := message[1]) < 0x80:
        return None
    return route_of(message[2 : 2 + length].decode("latin-1"))
