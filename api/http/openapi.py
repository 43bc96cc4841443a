"""The HTTP door's OpenAPI document, made from its routes and from the models of their bodies."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import JsonSchemaMode
from werkzeug.exceptions import HTTPException, MethodNotAllowed

from api.auth import needs_key
from api.dialects.chat.request import CompletionRequest
from api.http.routes import DEPRECATION, JSON, EventKinds, Route
from api.replies import headers_of, type_of
from api.schemas import ErrorReply
from runtime.errors import ForbiddenHost, ForbiddenOrigin, PerennialError, Unauthenticated, UnsupportedMediaType
from runtime.settings import Settings

_REF = "#/components/schemas/{model}"
_KEY = "key"
_IN_PATH = re.compile(r"<(?:\w+:)?(\w+)>")


def document(routes: Iterable[Route], settings: Settings, label: str) -> dict[str, Any]:
    """The OpenAPI document of a server with these settings whose model is called `label`."""
    routes = [*routes]
    schemas = _Schemas(routes)
    for route in routes:
        if route.operation.takes:
            schemas.narrow(route.operation.takes, "model", const=label)
    schemas.narrow(CompletionRequest, "n", maximum=settings.max_concurrent)
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        path = paths.setdefault(_IN_PATH.sub(r"{\1}", route.path), {})
        path[route.method.lower()] = _describe(route, schemas, is_locked=bool(settings.api_keys))
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Perennial",
            "version": version("perennial"),
            "description": "The HTTP door. Responses of what is deprecated say where to read on. What is not under "
            "`paths` is answered with 404, and the error's body is the one that chat completions have.",
        },
        "paths": paths,
        "components": {
            "schemas": schemas.components,
            "headers": {name: _header(value) for name, value in DEPRECATION.items()},
            "securitySchemes": {_KEY: {"type": "http", "scheme": "bearer"}},
        },
    }


def _describe(route: Route, schemas: _Schemas, *, is_locked: bool) -> dict[str, Any]:
    operation, family = route.operation, route.family
    is_keyed = needs_key(route.path)
    guarded: tuple[type[Exception], ...] = () if is_locked else (ForbiddenHost, ForbiddenOrigin)
    if operation.takes and not is_locked:
        guarded += (UnsupportedMediaType,)
    errors = (*operation.errors, MethodNotAllowed, *guarded, *((Unauthenticated,) if is_keyed else ()))
    responses = {status: _answer(status, bodies, schemas) for status, bodies in operation.answers.items()}
    for status in {_status_of(error) for error in errors}:
        of_status = [error for error in errors if _status_of(error) == status]
        responses[status] = _refusal(status, of_status, family.error_body, schemas)
    if family.is_deprecated:
        for response in responses.values():
            response["headers"] |= {name: {"$ref": f"#/components/headers/{name}"} for name in DEPRECATION}
    described = {
        "operationId": route.name,
        "summary": operation.summary,
        "deprecated": family.is_deprecated,
        "responses": {str(status): responses[status] for status in sorted(responses)},
    }
    if names := _IN_PATH.findall(route.path):
        described["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    if operation.takes:
        described["requestBody"] = {
            "required": True,
            "content": {JSON: {"schema": schemas.of(operation.takes, "validation")}},
        }
    if is_keyed:
        described["security"] = [{_KEY: []}, *([] if is_locked else [{}])]
    return described


def _answer(status: int, bodies: Mapping[str, type | EventKinds], schemas: _Schemas) -> dict[str, Any]:
    return {
        "description": "As asked." if status < 400 else "The same, from a server that takes no calls now.",
        "headers": {name: _header(value) for name, value in headers_of(status).items()},
        "content": {media: {"schema": schemas.of(body)} for media, body in bodies.items()},
    }


def _refusal(
    status: int, errors: list[type[Exception]], error_body: type[BaseModel], schemas: _Schemas
) -> dict[str, Any]:
    codes = {error.code if issubclass(error, PerennialError) else None for error in errors}
    said = {"type": {"const": type_of(status)}, "code": {"enum": sorted(codes, key=str)}}
    headers = {name: _header(value) for name, value in headers_of(status).items()}
    if MethodNotAllowed in errors:
        headers["Allow"] = {"required": True, "schema": {"type": "string"}}
    return {
        "description": " ".join(_reason(error) for error in errors),
        "headers": headers,
        "content": {
            JSON: {
                "schema": schemas.of(error_body)
                | ({"properties": {"error": {"properties": said}}} if error_body is ErrorReply else {})
            },
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

    def __init__(self, routes: Iterable[Route]) -> None:
        inputs: dict[tuple[type, JsonSchemaMode], TypeAdapter[Any]] = {}
        for route in routes:
            operation = route.operation
            inputs[route.family.error_body, "serialization"] = TypeAdapter(route.family.error_body)
            if operation.takes:
                inputs[operation.takes, "validation"] = TypeAdapter(operation.takes)
            for bodies in operation.answers.values():
                for body in bodies.values():
                    for kind in body.kinds if isinstance(body, EventKinds) else (body,):
                        inputs[kind, "serialization"] = TypeAdapter(kind)
        self._of, shared = TypeAdapter.json_schemas(
            [(kind, mode, adapter) for (kind, mode), adapter in inputs.items()], ref_template=_REF
        )
        self.components: dict[str, Any] = shared["$defs"]

    def of(self, body: type | EventKinds, mode: JsonSchemaMode = "serialization") -> dict[str, Any]:
        if not isinstance(body, EventKinds):
            return dict(self._of[body, mode])
        data = {"contentMediaType": JSON, "contentSchema": {"anyOf": [self.of(kind) for kind in body.kinds]}}
        return {
            "description": EventKinds.__doc__,
            "type": "object",
            "properties": {"data": {"type": "string", "anyOf": [*([{"const": body.last}] if body.last else ()), data]}},
            "required": ["data"],
        }

    def narrow(self, kind: type[BaseModel], field: str, **keywords: object) -> None:
        """Narrows a field to what this server's settings allow, if any body is of this kind."""
        if schema := self.components.get(kind.__name__):
            schema["properties"][field] |= keywords
