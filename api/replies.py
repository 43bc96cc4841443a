"""Turns errors into the statuses and bodies of both doors."""

from __future__ import annotations

import logging

from grpclib import GRPCError, Status
from werkzeug.exceptions import HTTPException

from api.schemas import ErrorBody, ErrorReply
from api.wire import error_on_wire
from runtime.errors import InvalidRequest, PerennialError

RETRY_AFTER_S = "1"

_log = logging.getLogger("perennial.api")

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_OURS = "a fault of the server ended this request: its log says more"


def as_grpc(error: Exception) -> GRPCError:
    """Status and message for a gRPC client, with the error on the wire as its details.

    An unexpected error is logged, and the client is told INTERNAL.
    """
    if isinstance(error, GRPCError):
        return error
    if isinstance(error, PerennialError):
        return GRPCError(Status[error.grpc], str(error), error_on_wire(error))
    _log.error("call failed", exc_info=error)
    return GRPCError(Status.INTERNAL, _OURS)


def as_http(error: Exception) -> tuple[int, ErrorReply, dict[str, str]]:
    """Status, body and headers for an HTTP client."""
    param = error.param if isinstance(error, InvalidRequest) else None
    code: str | None = None
    headers = {}
    if isinstance(error, PerennialError):
        status, message, code = error.http, str(error), error.code
    elif isinstance(error, HTTPException):
        status, message = error.code or 500, error.description or error.name
        headers = {name: value for name, value in error.get_headers() if name == "Allow"}
    else:
        _log.error("request failed", exc_info=error)
        status, message = 500, _OURS
    error_body = ErrorBody(message=message, type=type_of(status), param=param, code=code)
    return status, ErrorReply(error=error_body), headers | headers_of(status)


def headers_of(status: int) -> dict[str, str]:
    """Headers that every answer with this status has."""
    if status == 401:
        return {"WWW-Authenticate": "Bearer"}
    return {"Retry-After": RETRY_AFTER_S} if status in (429, 503) else {}


def type_of(status: int) -> str:
    """The `type` in the body of an error with this status."""
    return _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
