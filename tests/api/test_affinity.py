"""What a call tells of its session, and the route that is made of it."""

from __future__ import annotations

import pytest

from api.affinity import ROUTE_HEADER, is_route, route_of, route_of_headers, route_of_message, route_of_response
from proto.kakeya.v1 import AppendTokensRequest, CloseSessionRequest, GenerateRequest, GetModelInfoRequest

SESSION = "qL4yH0x-an_id-of-a-session-1"


@pytest.mark.parametrize(
    "request_",
    [AppendTokensRequest(SESSION, [5, 6], 7), GenerateRequest(SESSION, 9, seed=1), CloseSessionRequest(SESSION)],
)
def test_a_message_and_a_header_that_name_one_session_have_one_route(request_: object) -> None:
    assert route_of_message(bytes(request_)) == route_of(SESSION)  # type: ignore[call-overload]
    assert route_of_headers([(b"X-Session-Id", SESSION.encode())]) == route_of(SESSION)
    assert route_of_headers([(b"thread-id", SESSION.encode())]) == route_of(SESSION)


@pytest.mark.parametrize(
    "message", [bytes(GetModelInfoRequest()), b"", b"\x0a", b"\x0a\x00", b"\x0a\xff\x01abc", b"\x10\x05"]
)
def test_a_message_that_names_no_session_has_no_route(message: bytes) -> None:
    assert route_of_message(message) is None


def test_a_proxys_route_goes_before_what_the_client_says_and_a_false_one_is_none() -> None:
    given = route_of("another")
    headers = [(b"x-session-id", SESSION.encode()), (ROUTE_HEADER.encode(), given.encode())]
    assert route_of_headers(headers) == given
    assert route_of_headers([*headers[:1], (ROUTE_HEADER.encode(), b"../etc")]) == route_of(SESSION)
    assert route_of_headers([(b"accept", b"*/*")]) is None


def test_a_responses_id_tells_the_route_that_it_was_made_with() -> None:
    route = route_of(SESSION)
    assert is_route(route)
    assert route_of_response(f"resp_{route}{'0' * 48}") == route
    assert route_of_response("resp_short") is None
    assert route_of_response(route) is None
