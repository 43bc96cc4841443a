"""Routes of no dialect: health, metrics, the model, what the runtime is doing, and the pages."""

from __future__ import annotations

import json
import time
from functools import cache

import trio
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from quart import Response

from api.dialects.asked import no_such_model
from api.http.openapi import document
from api.http.routes import JSON, MIGRATION_PAGE, MIGRATION_PATH, Door, Operation
from api.page import load_page
from api.replies import headers_of
from api.schemas import Health, Model, ModelList
from api.server import Phase
from api.status import RuntimeStatus, status_of
from runtime.errors import ModelNotFound, NotServing

_HEALTH = Operation(
    "Whether the server takes calls, and the name of its model.",
    {200: {JSON: Health}, NotServing.http: {JSON: Health}},
)
_METRICS = Operation("Metrics, as Prometheus reads them.", {200: {"text/plain": str}})
_OPENAPI = Operation("This document.", {200: {JSON: dict}})
_MIGRATION = Operation("How to leave this door for gRPC.", {200: {"text/markdown": str}})
_PAGE = Operation("A page that shows the runtime at work.", {200: {"text/html": str}})
_RUNTIME = Operation("Sessions, slabs, permits and the last turns.", {200: {JSON: RuntimeStatus}}, (NotServing,))
_MODELS = Operation("The one model that there is.", {200: {JSON: ModelList}}, (NotServing,))
_MODEL = Operation("What there is to know of a model.", {200: {JSON: Model}}, (NotServing, ModelNotFound))


def json_response(body: BaseModel, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(body.model_dump_json(), status, headers, content_type=JSON)


def add_standard_routes(door: Door) -> None:
    server, watching = door.server, load_page()
    started, began = int(time.time()), time.monotonic()

    def model_of(visible: int) -> Model:
        return Model(id=server.label, created=started, context_length=visible, max_model_len=visible)

    @door.route("GET", "/", _PAGE)
    async def page() -> Response:
        return Response(watching.html, headers=watching.headers, content_type="text/html; charset=utf-8")

    async def healthz() -> Response:
        health = Health(status=server.phase.value, model=server.label)
        if server.phase is Phase.SERVING:
            return json_response(health)
        return json_response(health, NotServing.http, headers_of(NotServing.http))

    async def health() -> Response:
        return await healthz()

    door.route("GET", "/healthz", _HEALTH)(healthz)
    door.route("GET", "/health", _HEALTH)(health)

    @door.route("GET", "/metrics", _METRICS)
    async def metrics() -> Response:
        return Response(generate_latest(server.metrics.registry), content_type=CONTENT_TYPE_LATEST)

    @cache
    def described() -> str:
        return json.dumps(document(door.routes, server.settings, server.label))

    @door.route("GET", "/openapi.json", _OPENAPI)
    async def openapi() -> Response:
        # It takes a tenth of a second, once.
        return Response(await trio.to_thread.run_sync(described), content_type=JSON)

    @door.route("GET", "/v1/models", _MODELS)
    async def models() -> Response:
        with server.call() as serving:
            return json_response(ModelList(data=[model_of(serving.shape.visible)]))

    # Names of models may have slashes in them.
    @door.route("GET", "/v1/models/<path:model>", _MODEL)
    async def one_model(model: str) -> Response:
        with server.call() as serving:
            if model != server.label:
                raise no_such_model(model)
            return json_response(model_of(serving.shape.visible))

    @door.route("GET", "/v1/runtime", _RUNTIME)
    async def runtime() -> Response:
        with server.call() as serving:
            status = status_of(serving, server.label, time.monotonic() - began)
            return json_response(status, headers={"Cache-Control": "no-store"})

    @door.route("GET", MIGRATION_PATH, _MIGRATION)
    async def migration_page() -> Response:
        text = await (trio.Path(__file__).parent.parent / MIGRATION_PAGE).read_text()
        return Response(text, content_type="text/markdown; charset=utf-8")
