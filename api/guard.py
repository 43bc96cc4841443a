"""What browsers may do: pages of other sites cannot call, read or steer a server without keys on its user's machine.

A page reaches such a server by its address, from its own origin, or by a name of its own that it makes resolve to that
address, and then it is of the same origin as the server. So origins are checked, and names too. A POST that only scripts can
send makes a browser ask first. Where there are keys, a page has none, and what is left is to say who may read answers.
"""

from __future__ import annotations

from werkzeug.datastructures import Headers

from runtime.errors import ForbiddenHost, ForbiddenOrigin, UnsupportedMediaType
from runtime.settings import Settings

_ANY = "*"
_METHODS = "GET, POST, DELETE, OPTIONS"
# Headers of an answer that a page may read.
_EXPOSED = "Deprecation, Sunset, Link, Retry-After, WWW-Authenticate"
_REMEMBERED_S = "600"


def check_caller(
    settings: Settings, headers: Headers, address: str | None, *, has_body: bool = False, is_old: bool = False
) -> None:
    """Raises ForbiddenHost, ForbiddenOrigin or UnsupportedMediaType if a foreign page may have made a browser send this.

    `address` is ours to which the client has connected; a Host equal to it cannot be another site's name. A client `is_old`
    if it speaks HTTP/1.0: it need not name a host, and is no browser.
    """
    if settings.api_keys:
        return
    host, origin = headers.get("Host", ""), headers.get("Origin")
    may_name = _ANY in settings.allowed_hosts or (is_old and not host)
    if not may_name and host_name(host) not in {*map(str.lower, settings.allowed_hosts), address}:
        raise ForbiddenHost("this Host is not served without keys: add it to allowed_hosts, or set api_keys")
    if origin is not None and not may_read(settings, origin, host):
        raise ForbiddenOrigin("pages of this Origin may not call: add it to allowed_origins")
    if has_body and headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
        raise UnsupportedMediaType("send the body as `content-type: application/json`")


def may_read(settings: Settings, origin: str, host: str) -> bool:
    """Whether pages of this origin may read answers: our own page may, and origins that the settings name."""
    scheme, _, rest = origin.lower().partition("://")
    is_ours = scheme in ("http", "https") and rest == host.lower()
    return is_ours or _ANY in settings.allowed_origins or origin in settings.allowed_origins


def host_name(host: str) -> str:
    """The name or address in a Host header, without brackets and port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def cors_headers(settings: Settings, headers: Headers) -> dict[str, str]:
    """The headers of an answer that make a browser give it to a page."""
    if not settings.allowed_origins:
        return {}
    origin = headers.get("Origin")
    if origin is None or not may_read(settings, origin, headers.get("Host", "")):
        return {"Vary": "Origin"}
    return {"Vary": "Origin", "Access-Control-Allow-Origin": origin, "Access-Control-Expose-Headers": _EXPOSED}


def preflight_headers(headers: Headers) -> dict[str, str] | None:
    """The headers that answer a browser's preflight, once `check_caller` has passed; None if the request is no preflight."""
    if "Origin" not in headers or "Access-Control-Request-Method" not in headers:
        return None
    told = {
        "Access-Control-Allow-Methods": _METHODS,
        "Access-Control-Allow-Headers": headers.get("Access-Control-Request-Headers", "authorization, content-type"),
        "Access-Control-Max-Age": _REMEMBERED_S,
    }
    if headers.get("Access-Control-Request-Private-Network") == "true":
        told["Access-Control-Allow-Private-Network"] = "true"
    return told
