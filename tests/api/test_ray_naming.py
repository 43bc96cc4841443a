"""What Serve's proxy is told of a request's session, where only the body names one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from api.affinity import ROUTE_HEADER, is_route, route_of
from api.ray_serve.naming import Routes
from api.ray_serve.scaling import LOAD, replicas_for_load

ROUTE = route_of("a session")


async def passed_on(body: bytes, *headers: tuple[bytes, bytes], path: str = "/v1/responses") -> tuple[str, bytes]:
    """The route that a POST in parts is given, and the body that comes through."""
    seen: dict[str, Any] = {}

    async def application(scope: dict[str, Any], receive: Any, send: Any) -> None:
        seen["headers"] = scope["headers"]
        seen["body"] = b""
        while (message := await receive())["type"] == "http.request":
            seen["body"] += message["body"]

    parts = [body[start : start + 50] for start in range(0, len(body), 50)] or [b""]
    messages: list[dict[str, Any]] = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    messages[-1]["more_body"] = False
    coming = iter([*messages, {"type": "http.disconnect"}])

    async def receive() -> dict[str, Any]:
        return next(coming)

    async def send(_: object) -> None:
        raise AssertionError("nothing is answered here")

    await Routes(application)({"type": "http", "method": "POST", "path": path, "headers": headers}, receive, send)
    (route,) = [value.decode() for name, value in seen["headers"] if name.decode() == ROUTE_HEADER] or [""]
    return route, seen["body"]


@pytest.mark.parametrize(
    ("asked", "route"),
    [
        ({"prompt_cache_key": "a session", "input": "x" * 200}, ROUTE),
        ({"input": "hello", "previous_response_id": f"resp_{ROUTE}{'1' * 48}", "prompt_cache_key": "another"}, ROUTE),
        ({"input": "hello", "previous_response_id": "resp_of-elsewhere"}, route_of("resp_of-elsewhere")),
    ],
)
async def test_a_body_names_the_session_and_comes_through_whole(asked: dict[str, object], route: str) -> None:
    body = json.dumps(asked).encode()
    assert await passed_on(body) == (route, body)


@pytest.mark.parametrize("text", ['"prompt_cache_key": "a session"', '\\"prompt_cache_key\\": \\"a session\\"'])
async def test_what_a_user_says_names_no_session(text: str) -> None:
    first, _ = await passed_on(json.dumps({"input": text}).encode())
    second, _ = await passed_on(json.dumps({"input": text}).encode())
    assert is_route(first)
    assert len({first, second, ROUTE}) == 3


async def test_a_header_goes_before_the_body_and_a_route_of_a_clients_own_counts_once() -> None:
    body = b'{"prompt_cache_key": "another"}'
    assert await passed_on(body, (b"x-session-id", b"a session")) == (ROUTE, body)
    given = (ROUTE_HEADER.encode(), ROUTE.encode())
    assert await passed_on(body, given, given) == (ROUTE, body)
    assert await passed_on(b"not json \xff") != (ROUTE, body)


async def test_other_paths_are_left_alone() -> None:
    assert await passed_on(b"", path="/metrics") == ("", b"")


class Reported:
    """What Serve tells a policy."""

    def __init__(self, *loads: float) -> None:
        self.aggregated_metrics = {LOAD: dict(enumerate(loads))} if loads else {}
        self.target_num_replicas = 5


@pytest.mark.parametrize(
    ("loads", "replicas"), [((), 5), ((0.0, 0.0), 1), ((0.7, 0.7), 2), ((1.4, 0.7), 3), ((2.0, 2.0, 2.0), 9)]
)
def test_there_are_as_many_replicas_as_the_load_fills(loads: tuple[float, ...], replicas: int) -> None:
    assert replicas_for_load(Reported(*loads))[0] == replicas
