"""Every error that a user of Perennial can meet, with its gRPC code and HTTP status as data.

A `StartError` stops the start. A `RequestError` is the answer to one request: the actor that raises it carries on.
Every other `PerennialError` ends something: one session, or the engine and all that depends on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar


class PerennialError(Exception):
    """One line that says what is wrong and what to do about it."""

    grpc: ClassVar[str] = "INTERNAL"
    http: ClassVar[int] = 500
    code: ClassVar[str | None] = None


class StartError(PerennialError):
    """The server cannot start; nothing was served."""


class InvalidSetting(StartError):
    """A setting's value makes no sense; the message names the field and what it accepts."""


class NotExact(InvalidSetting):
    """Under `strict`: no form that the settings allow gives a row the same bits in every batch on this machine."""


class ModelUnavailable(StartError):
    """The model's files are missing, or of a kind that no engine here can run."""


class NotEnoughMemory(StartError):
    """Weights and slabs together do not fit in this machine's memory."""


class UntestedLibrary(StartError):
    """A library has a version with which this server's limits were not tried."""


class RequestError(PerennialError):
    """This request failed. What was delivered before stays, and unless it is SessionMoved the session goes on."""


class InvalidRequest(RequestError):
    """A value in the request is out of range. `param` names the field, if a field is at fault."""

    grpc, http = "INVALID_ARGUMENT", 422

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class MalformedRequest(InvalidRequest):
    """The request cannot be read, or asks for a combination that cannot be honoured."""

    http = 400


class Unauthenticated(RequestError):
    """The request has no key, or a wrong one."""

    grpc, http, code = "UNAUTHENTICATED", 401, "invalid_api_key"


class ForbiddenHost(RequestError):
    """The request's Host is not a name of this server; a page may have made its own name resolve to this server."""

    grpc, http, code = "PERMISSION_DENIED", 403, "host_not_allowed"


class ForbiddenOrigin(RequestError):
    """A page of a site that may not call this server."""

    grpc, http, code = "PERMISSION_DENIED", 403, "origin_not_allowed"


class UnsupportedMediaType(RequestError):
    """The body is not declared as JSON, so a browser may have sent it without asking."""

    grpc, http = "INVALID_ARGUMENT", 415


class SessionNotFound(RequestError):
    """No session has this id: it never did, it was closed, or it was evicted."""

    grpc, http = "NOT_FOUND", 404


class ModelNotFound(InvalidRequest):
    """The request names a model that this server does not run."""

    grpc, http, code = "NOT_FOUND", 404, "model_not_found"


class PreviousResponseNotFound(MalformedRequest):
    """The response that the request is to follow is not held, or not any more. Send the whole conversation instead."""

    grpc, code = "NOT_FOUND", "previous_response_not_found"


class ResponseNotFound(RequestError):
    """No response of this id is stored."""

    grpc, http = "NOT_FOUND", 404


class UpgradeRequired(RequestError):
    """This path is for WebSockets: ask for an upgrade, or send a POST."""

    grpc, http = "UNIMPLEMENTED", 426


class HistoryMismatch(RequestError):
    """`expected_history_length` is not the session's length, which the message has."""

    grpc, http = "ABORTED", 409


class SessionMoved(RequestError):
    """Another server holds the session, or has taken it; the message begins with "moved". What was delivered is kept."""

    grpc, http, code = "ABORTED", 409, "session_moved"


class SlabOverflow(RequestError):
    """The tokens do not fit beside those held, and the session refuses rather than forgets."""

    grpc, http, code = "OUT_OF_RANGE", 400, "context_length_exceeded"


class SnapshotNotFound(SessionNotFound):
    """No snapshot has this id, so there is no session to go on with."""

    grpc, http = "NOT_FOUND", 404


class SnapshotMismatch(RequestError):
    """The snapshot's session cannot continue here bit for bit."""

    grpc, http = "FAILED_PRECONDITION", 409


class SnapshotUnreadable(RequestError):
    """The file is damaged, or not a snapshot."""

    grpc, http = "DATA_LOSS", 500


class StorageFailed(RequestError):
    """The store cannot be written or read. Nothing that was acknowledged is lost."""

    grpc, http = "INTERNAL", 500


class StorageFull(StorageFailed):
    """The store has no room now. Make room, or try again."""

    grpc, http = "UNAVAILABLE", 503


class NotDurable(SnapshotMismatch):
    """The server has no directory to save sessions in, so no snapshot is one of its own."""

    grpc, http = "FAILED_PRECONDITION", 409


class PayloadTooLarge(RequestError):
    """The request's body is over the limit."""

    grpc, http = "RESOURCE_EXHAUSTED", 413


class CapacityExhausted(RequestError):
    """Every slab is held by a session at work."""

    grpc, http = "RESOURCE_EXHAUSTED", 429


class Saturated(CapacityExhausted):
    """There is no permit for another completion, or none became free within the longest wait."""

    code = "rate_limit_exceeded"


class NotSupported(RequestError):
    """The server does not know this call."""

    grpc, http = "UNIMPLEMENTED", 501


class DeadlineExceeded(RequestError):
    """The completion took longer than `request_timeout_s`."""

    grpc, http, code = "DEADLINE_EXCEEDED", 504, "timeout"


class NotServing(RequestError):
    """The model is loading, or the server is draining."""

    grpc, http = "UNAVAILABLE", 503


class InvariantViolation(PerennialError):
    """An invariant was broken in this session, which has failed. `kind` is `inv1` or `inv2`."""

    grpc = "FAILED_PRECONDITION"

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


class SessionFailed(PerennialError):
    """A fault of ours ended this session; others are not affected."""


class EngineFailed(PerennialError):
    """The engine stopped; the server is going down."""

    grpc = "UNAVAILABLE"


@contextmanager
def lone_errors() -> Iterator[None]:
    """Raises an error that is alone in its exception groups as itself, so that callers need not know of nurseries."""
    try:
        yield
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            if len(error.exceptions) > 1:
                raise
            error = error.exceptions[0]
        context = error.__context__
        try:
            raise error
        finally:
            # The group contains the error; it is not its cause.
            error.__context__ = context
