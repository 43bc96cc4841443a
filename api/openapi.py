"""What the HTTP door says of itself: an OpenAPI document, made of its routes and of the schemas that check and answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import JsonSchemaMode
from werkzeug.exceptions import HTTPException, MethodNotAllowed, RequestTimeout

from api.auth import needs_key
from api.replies import headers_of, type_of
from api.request import CompletionRequest
from api.schemas import Chunk, Completion, CountedChunk, ErrorReply, Health, ModelList
from api.status import RuntimeStatus
from runtime.errors import (
    CapacityExhausted,
    DeadlineExceeded,
    EngineFailed,
    ForbiddenHost,
    ForbiddenOrigin,
    InvalidRequest,
    MalformedRequest,
    ModelNotFound,
    NotServing,
    PayloadTooLarge,
    PerennialError,
    Saturated,
    SessionFailed,
    SlabOverflow,
    Unauthenticated,
    UnsupportedMediaType,
)
from runtime.settings import Settings

JSON = "application/json"
_REF = "#/components/schemas/{model}"
_KEY = "key"


@dataclass(frozen=True)
class Route:
    """Where the app has what `OPERATIONS` describes under this name."""

    name: str
    method: str
    path: str


@dataclass(frozen=True)
class Events:
    """Server-sent events, each with the JSON of one of these; the last one of a stream without an error says `[DONE]`."""

    kinds: tuple[type[BaseModel], ...]


@dataclass(frozen=True)
class Operation:
    """What a route is for, takes and answers, each media type of each status with the type of its body.

    `errors` are its own; those that any route may answer with are added.
    """

    summary: str
    answers: Mapping[int, Mapping[str, type | Events]]
    errors: tuple[type[Exception], ...] = ()
    takes: type[BaseModel] | None = None


OPERATIONS = {
    "healthz": Operation(
        "Whether the server takes calls, and the name of its model.",
        {200: {JSON: Health}, NotServing.http: {JSON: Health}},
    ),
    "metrics": Operation("Metrics, as Prometheus reads them.", {200: {"text/plain": str}}),
    "openapi": Operation("This document.", {200: {JSON: dict}}),
    "migration_page": Operation("How to leave this door for gRPC.", {200: {"text/markdown": str}}),
    "page": Operation("A page that shows the runtime at work.", {200: {"text/html": str}}),
    "runtime": Operation("Sessions, slabs, permits and the last turns.", {200: {JSON: RuntimeStatus}}, (NotServing,)),
    "models": Operation("The one model that there is.", {200: {JSON: ModelList}}, (NotServing,)),
    "chat_completions": Operation(
        "Answers a conversation, as JSON or, with `stream`, as server-sent events. An error that comes when events have "
        "been sent is the last event.",
        {200: {JSON: Completion, "text/event-stream": Events((Chunk, CountedChunk, ErrorReply))}},
        (
            *(MalformedRequest, SlabOverflow, ModelNotFound, RequestTimeout, PayloadTooLarge, InvalidRequest),
            *(CapacityExhausted, Saturated, EngineFailed, SessionFailed, NotServing, DeadlineExceeded),
        ),
        CompletionRequest,
    ),
}


def document(
    routes: Iterable[Route], settings: Settings, label: str, every_response: Mapping[str, str]
) -> dict[str, Any]:
    """The OpenAPI document of a server of these settings whose model is called `label`.

    `every_response` are headers that no response is without. A route that `OPERATIONS` lacks is a KeyError.
    """
    described = [(route, OPERATIONS[route.name]) for route in routes]
    schemas = _Schemas(operation for _, operation in described)
    schemas.narrow(CompletionRequest, "model", const=label)
    schemas.narrow(CompletionRequest, "n", maximum=settings.max_concurrent)
    paths: dict[str, dict[str, Any]] = {}
    for route, operation in described:
        paths.setdefault(route.path, {})[route.method.lower()] = _described(
            route, operation, schemas, is_locked=bool(settings.api_keys), every_response=every_response
        )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Perennial",
            "version": version("perennial"),
            "description": "The HTTP door, which is deprecated: every response says where to read on. What is not under "
            "`paths` is answered with 404, and the error's body is the one that all errors have.",
        },
        "paths": paths,
        "components": {
            "schemas": schemas.components,
            "headers": {name: _header(value) for name, value in every_response.items()},
            "securitySchemes": {_KEY: {"type": "http", "scheme": "bearer"}},
        },
    }


def _described(
    route: Route, operation: Operation, schemas: _Schemas, *, is_locked: bool, every_response: Mapping[str, str]
) -> dict[str, Any]:
    is_keyed = needs_key(route.path)
    guarded: tuple[type[Exception], ...] = () if is_locked else (ForbiddenHost, ForbiddenOrigin)
    if operation.takes and not is_locked:
        guarded += (UnsupportedMediaType,)
    errors = (*operation.errors, MethodNotAllowed, *guarded, *((Unauthenticated,) if is_keyed else ()))
    responses = {status: _answer(status, bodies, schemas) for status, bodies in operation.answers.items()}
    for status in {_status_of(error) for error in errors}:
        responses[status] = _refusal(status, [error for error in errors if _status_of(error) == status], schemas)
    for response in responses.values():
        response["headers"] |= {name: {"$ref": f"#/components/headers/{name}"} for name in every_response}
    described = {
        "operationId": route.name,
        "summary": operation.summary,
        "deprecated": True,
        "responses": {str(status): responses[status] for status in sorted(responses)},
    }
    if operation.takes:
        described["requestBody"] = {
            "required": True,
            "content": {JSON: {"schema": schemas.of(operation.takes, "validation")}},
        }
    if is_keyed:
        described["security"] = [{_KEY: []}, *([] if is_locked else [{}])]
    return described


def _answer(status: int, bodies: Mapping[str, type | Events], schemas: _Schemas) -> dict[str, Any]:
    return {
        "description": "As asked." if status < 400 else "The same, from a server that takes no calls now.",
        "headers": {name: _header(value) for name, value in headers_of(status).items()},
        "content": {media: {"schema": schemas.of(body)} for media, body in bodies.items()},
    }


def _refusal(status: int, errors: list[type[Exception]], schemas: _Schemas) -> dict[str, Any]:
    codes = {error.code if issubclass(error, PerennialError) else None for error in errors}
    said = {"type": {"const": type_of(status)}, "code": {"enum": sorted(codes, key=str)}}
    headers = {name: _header(value) for name, value in headers_of(status).items()}
    if MethodNotAllowed in errors:
        headers["Allow"] = {"required": True, "schema": {"type": "string"}}
    return {
        "description": " ".join(_reason(error) for error in errors),
        "headers": headers,
        "content": {
            JSON: {"schema": schemas.of(ErrorReply) | {"properties": {"error": {"properties": said}}}},
        },
    }


def _status_of(error: type[Exception]) -> int:
    status = (
        error.http if issubclass(error, PerennialError) else error.code if issubclass(error, HTTPException) else 500
    )
    assert status is not None
    return status


def _reason(error: type[Exception]) -> str:
    words = error.description if issubclass(error, HTTPException) else error.__doc__
    return " ".join((words or "").split())


def _header(value: str) -> dict[str, Any]:
    return {"required": True, "schema": {"type": "string", "const": value}}


class _Schemas:
    """The JSON schemas of all bodies, which share their parts."""

    def __init__(self, operations: Iterable[Operation]) -> None:
        inputs: dict[tuple[type, JsonSchemaMode], TypeAdapter[Any]] = {
            (ErrorReply, "serialization"): TypeAdapter(ErrorReply)
        }
        for operation in operations:
            if operation.takes:
                inputs[operation.takes, "validation"] = TypeAdapter(operation.takes)
            for bodies in operation.answers.values():
                for body in bodies.values():
                    for kind in body.kinds if isinstance(body, Events) else (body,):
                        inputs[kind, "serialization"] = TypeAdapter(kind)
        self._of, shared = TypeAdapter.json_schemas(
            [(kind, mode, adapter) for (kind, mode), adapter in inputs.items()], ref_template=_REF
        )
        self.components: dict[str, Any] = shared["$defs"]

    def of(self, body: type | Events, mode: JsonSchemaMode = "serialization") -> dict[str, Any]:
        if not isinstance(body, Events):
            return dict(self._of[body, mode])
        data = {"contentMediaType": JSON, "contentSchema": {"anyOf": [self.of(kind) for kind in body.kinds]}}
        return {
            "description": Events.__doc__,
            "type": "object",
            "properties": {"data": {"type": "string", "anyOf": [{"const": "[DONE]"}, data]}},
            "required": ["data"],
        }

    def narrow(self, kind: type[BaseModel], field: str, **keywords: object) -> None:
        """Says what this server's settings leave of a field, if any body is of this kind."""
        if schema := self.components.get(kind.__name__):
            schema["properties"][field] |= keywords
