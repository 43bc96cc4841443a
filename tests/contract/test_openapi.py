"""The HTTP door against the document in which it describes itself, with requests made of that document."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import strategies as st
from jsonschema_rs import meta
from schemathesis.config import SchemathesisConfig
from schemathesis.schemas import BaseSchema

from api.dialects.chat.request import CompletionRequest
from api.http import make_app, routes_of
from api.http.openapi import document
from api.server import Server
from runtime import Settings
from runtime.models import SEEDLING
from tests.contract.loops import MOST_S
from tests.contract.servers import ServerProcess, held_model, started
from tests.contract.test_http_bad_input import COMPLETIONS, ENDLESS, HELLO, permit_taken, until_idle, with_schema

KEY = "right"
# A window so small that an answer soon ends, whatever length is asked for.
IDLE: dict[str, Any] = {"sink": 4, "window": 60, "max_concurrent": 2, "default_max_tokens": 1}
BUSY: dict[str, Any] = {"sink": 4, "window": 60, "max_concurrent": 1, "http_overflow": "evict"}

schemathesis.openapi.format(
    "json-object", st.dictionaries(st.text(), st.none() | st.integers() | st.text(), max_size=2).map(json.dumps)
)


def described(**settings: Any) -> dict[str, Any]:
    server = Server(Settings(**settings))
    return document(routes_of(make_app(server)), server.settings, server.label)


def narrowed(described: dict[str, Any]) -> dict[str, Any]:
    """The document without what seedling's chat template refuses, and with a format for what it can only say in prose."""
    parts = described["components"]["schemas"]
    parts["ChatMessage"]["properties"]["role"]["enum"].remove("tool")
    parts["CompletionRequest"]["properties"]["tools"]["maxItems"] = 0
    parts["CalledFunction"]["properties"]["arguments"]["format"] = "json-object"
    return described


def schema_of(described: dict[str, Any], examples: int, *accepted: int, **more: Any) -> BaseSchema:
    """Makes requests of a document. What it allows is to be answered with one of the statuses that are `accepted`."""
    config = {
        "seed": 1,
        "suppress-health-check": ["too_slow"],
        # A stream is read to its end.
        "max-stream-events": 10**6,
        "generation": {
            "deterministic": True,
            "database": "none",
            "max-examples": examples,
            "with-security-parameters": False,
        },
        "auth": {"openapi": {"key": {"bearer": KEY}}},
        "checks": {"positive_data_acceptance": {"expected-statuses": [str(status) for status in accepted]}},
        **more,
    }
    return schemathesis.openapi.from_dict(described, config=SchemathesisConfig.from_dict(config))


@pytest.fixture(scope="module")
def idle() -> Iterator[ServerProcess]:
    with started("perennial", api_keys=KEY, **IDLE) as server:
        yield server


@pytest.fixture(scope="module")
def busy() -> Iterator[ServerProcess]:
    """A server whose one permit is taken."""
    with started("perennial", request_timeout_s=3600, reader_timeout_s=3600, **BUSY) as server, permit_taken(server):
        yield server


@pytest.fixture(scope="module")
def loading(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server whose model does not come."""
    home = tmp_path_factory.mktemp("loading")
    with (
        held_model(home / "model") as (model, release),
        started("perennial", is_awaited=False, model=model, model_label=SEEDLING, state_dir=home) as server,
    ):
        yield server
        release()


# Combinations, and prompts over the window, are refused with 400 though each field is as it should be. Ids that are made up are
# not found, and who asks for no WebSocket is told to.
of_idle = schema_of(narrowed(described(api_keys=(KEY,), **IDLE)), 30, 200, 400, 404, 426)
FUZZING = {"phases": {"coverage": {"enabled": False}, "examples": {"enabled": False}}}
of_busy = schema_of(narrowed(described(**BUSY)), 10, 200, 400, 404, 426, 429, **FUZZING)
of_loading = schema_of(narrowed(described()), 5, 200, 426, 503, **FUZZING)


@pytest.mark.door
@of_idle.parametrize()
def test_whatever_is_asked_is_answered_as_the_document_says(idle: ServerProcess, case: schemathesis.Case[Any]) -> None:
    case.call_and_validate(base_url=idle.http, timeout=MOST_S)


@pytest.mark.door
@of_busy.parametrize()
def test_a_busy_server_answers_as_the_document_says(busy: ServerProcess, case: schemathesis.Case[Any]) -> None:
    case.call_and_validate(base_url=busy.http, timeout=MOST_S)


@pytest.mark.door
@of_loading.parametrize()
def test_a_server_that_loads_answers_as_the_document_says(loading: ServerProcess, case: schemathesis.Case[Any]) -> None:
    case.call_and_validate(
        base_url=loading.http, timeout=MOST_S, excluded_checks=[schemathesis.checks.not_a_server_error]
    )


@pytest.mark.door
@pytest.mark.parametrize(
    ("more", "status"),
    [
        ({"stream": True}, 200),
        ({"stream": True, "stream_options": {"include_usage": True}, "n": 2}, 200),
        ({"stream": True, "logprobs": True, "top_logprobs": 2}, 200),
        ({"logprobs": True, "top_logprobs": 2, "n": 2}, 200),
        (with_schema({"enum": [1, 2]}), 200),
        ({"model": "gpt-4"}, 404),
        ({"messages": [{"role": "user", "content": "sea " * 100}]}, 400),
        ({"messages": [{"role": "user", "content": "a" * 9 * 2**20}]}, 413),
        (with_schema({"type": "nothing"}), 422),
    ],
    ids=lambda value: str(value)[:60],
)
def test_each_kind_of_answer_is_as_the_document_says(idle: ServerProcess, more: dict[str, Any], status: int) -> None:
    case = of_idle[COMPLETIONS]["POST"].Case(
        body={**HELLO, **more}, media_type="application/json", headers={"Authorization": f"Bearer {KEY}"}
    )

    response = case.call(base_url=idle.http, timeout=MOST_S)

    assert response.status_code == status
    case.validate_response(response)


@pytest.mark.door
def test_a_stream_that_ends_with_an_error_is_as_the_document_says(hurried: ServerProcess) -> None:
    case = of_busy[COMPLETIONS]["POST"].Case(body=ENDLESS | {"stream": True}, media_type="application/json")
    until_idle(hurried)

    response = case.call(base_url=hurried.http, timeout=MOST_S)
    while response.status_code == 504:  # A slow machine takes all the time before the stream begins.
        until_idle(hurried)
        response = case.call(base_url=hurried.http, timeout=MOST_S)

    assert response.text.split("\n\n")[-2].startswith('data: {"error":')
    case.validate_response(response)


@pytest.mark.door
def test_the_document_is_served_to_everybody_from_the_start(idle: ServerProcess, loading: ServerProcess) -> None:
    assert httpx.get(f"{idle.http}/openapi.json", timeout=MOST_S).json() == described(api_keys=(KEY,), **IDLE)
    assert httpx.get(f"{loading.http}/openapi.json", timeout=MOST_S).json() == described()


def test_the_document_is_valid() -> None:
    document = described()

    schemathesis.openapi.from_dict(document).validate()
    for schema in document["components"]["schemas"].values():
        meta.validate(schema | {"$schema": "https://json-schema.org/draft/2020-12/schema"})


def test_every_reference_leads_somewhere() -> None:
    document = described()

    for reference in references_in(document):
        place: Any = document
        for name in reference.removeprefix("#/").split("/"):
            place = place[name]
        assert place


def references_in(part: object) -> Iterator[str]:
    if isinstance(part, dict):
        if isinstance(part.get("$ref"), str):
            yield part["$ref"]
        for value in part.values():
            yield from references_in(value)
    elif isinstance(part, list):
        for value in part:
            yield from references_in(value)


def test_every_route_is_described_and_every_description_has_a_route() -> None:
    routes = routes_of(make_app(Server(Settings())))
    paths = described()["paths"]

    assert {(route.method.lower(), re.sub(r"<(?:path:)?(\w+)>", r"{\1}", route.path)) for route in routes} == {
        (method, path) for path, methods in paths.items() for method in methods
    }


def test_what_hangs_on_settings_is_described_as_they_are() -> None:
    document = described(model_label="my model", max_concurrent=3, api_keys=("a",))

    fields = document["components"]["schemas"]["CompletionRequest"]["properties"]
    assert fields["model"]["const"] == "my model"
    assert fields["n"]["maximum"] == 3
    assert document["paths"][COMPLETIONS]["post"]["security"] == [{"key": []}]
    assert "security" not in document["paths"]["/healthz"]["get"]


def test_a_field_that_is_not_supported_is_described_with_the_values_that_ask_for_nothing() -> None:
    fields = described()["components"]["schemas"]["CompletionRequest"]["properties"]

    for name, neutral in CompletionRequest.NEUTRAL.items():
        assert fields[name]["enum"] == [None, *neutral]
