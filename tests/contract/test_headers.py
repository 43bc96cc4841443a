"""That the door is deprecated stands on every response, whoever runs the loop, and whatever the response says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.contract.loops import MOST_S
from tests.contract.servers import KINDS, ServerProcess, held_model, started

pytestmark = pytest.mark.door

HEADERS = {
    "deprecation": "true",
    "sunset": "Wed, 31 Dec 2025 00:00:00 GMT",
    "link": '</docs/adr/0008-session-bound-runtime-and-grpc-protocol.md>; rel="successor-version"; type="text/markdown"',
}
COMPLETIONS = "/v1/chat/completions"
KEY = {"authorization": "Bearer key"}
HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
ENDLESS = HELLO | {"max_tokens": 2**31 - 1, "ignore_eos": True, "stream": True}
MOST_BODY_BYTES = 8 * 2**20


@pytest.fixture(scope="module", params=KINDS[1:])
def hosted(request: pytest.FixtureRequest) -> Iterator[ServerProcess]:
    """A server under each worker class of Hypercorn with a key and one permit, of which one route fails."""
    settings: dict[str, Any] = {"model_label": "tiny", "api_keys": "key", "max_concurrent": 1, "http_overflow": "evict"}
    with started(request.param, application="tests.contract.failing:app", **settings) as server:
        yield server


def check_headers(response: httpx.Response) -> None:
    """Each of them is there once, and as the contract spells it."""
    found = {name: response.headers.get_list(name) for name in HEADERS}
    assert found == {name: [value] for name, value in HEADERS.items()}


def asked(body: object, **headers: str) -> dict[str, Any]:
    return {"method": "POST", "url": COMPLETIONS, "json": body, "headers": KEY | headers}


REQUESTS: list[tuple[int, dict[str, Any]]] = [
    (200, {"method": "GET", "url": "/healthz"}),
    (200, {"method": "HEAD", "url": "/healthz"}),
    (200, {"method": "GET", "url": "/metrics"}),
    (200, {"method": "GET", "url": "/v1/models", "headers": KEY}),
    (200, {"method": "OPTIONS", "url": COMPLETIONS}),
    (200, asked(HELLO)),
    (200, asked(HELLO | {"stream": True})),
    (400, asked(HELLO | {"top_logprobs": 1})),
    (401, asked(HELLO, authorization="Bearer wrong")),
    (404, {"method": "GET", "url": "/nothing"}),
    (404, asked(HELLO | {"model": "other"})),
    (405, {"method": "DELETE", "url": "/healthz"}),
    (413, {"method": "POST", "url": COMPLETIONS, "headers": KEY, "content": b" " * (MOST_BODY_BYTES + 1)}),
    (422, asked(HELLO | {"top_p": 5})),
    (500, {"method": "GET", "url": "/fails"}),
]


@pytest.mark.parametrize(("status", "request_"), REQUESTS, ids=lambda value: str(value)[:60])
def test_a_response_says_that_the_door_is_deprecated(
    hosted: ServerProcess, status: int, request_: dict[str, Any]
) -> None:
    with httpx.Client(base_url=hosted.http, timeout=MOST_S) as client:
        response = client.request(**request_)
        while response.status_code == 429:  # A client that has its answer is a little ahead of the permit.
            response = client.request(**request_)

    assert response.status_code == status
    check_headers(response)


def test_a_stream_and_what_is_refused_beside_it_say_so_too(hosted: ServerProcess) -> None:
    with httpx.Client(base_url=hosted.http, timeout=MOST_S) as client, client.stream(**asked(ENDLESS)) as stream:
        refused = client.request(**asked(HELLO))

        assert (stream.status_code, refused.status_code) == (200, 429)
        check_headers(stream)
        check_headers(refused)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_server_that_loads_says_so_too(kind: str, tmp_path: Path) -> None:
    with (
        held_model(tmp_path / "model") as (model, release),
        started(kind, is_awaited=False, model=model, state_dir=tmp_path / "state") as server,
    ):
        for path in ("/healthz", "/v1/models"):
            response = httpx.get(server.http + path, timeout=MOST_S)
            assert response.status_code == 503
            check_headers(response)
        release()
