"""The HTTP door on the wire: what is refused, with which status, and what every response says."""

from __future__ import annotations

import json
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming

from runtime.models import SEEDLING
from tests.contract.loops import MOST_S
from tests.contract.servers import JSON, PATIENT, ServerProcess, held_model, started, until
from tests.contract.stubs import ENDLESS as MOST_TOKENS
from tests.contract.stubs import PROMPT, Stubs, stock

pytestmark = pytest.mark.door

COMPLETIONS = "/v1/chat/completions"
MIGRATION = "/docs/adr/0008-session-bound-runtime-and-grpc-protocol.md"
HELLO: dict[str, Any] = {
    "model": SEEDLING,
    "messages": [{"role": "user", "content": "Hello"}],
    "temperature": 0,
    "max_tokens": 4,
}
# What only the time limit ends, where the server forgets rather than refuses.
ENDLESS = HELLO | {"max_tokens": 2**31 - 1, "ignore_eos": True}
SMALL: dict[str, Any] = {"sink": 4, "window": 60}
MOST_BODY_BYTES = 8 * 2**20


@pytest.fixture(scope="module")
def locked() -> Iterator[ServerProcess]:
    """A server with two keys and a window of a few words, over which it refuses."""
    with started("perennial", api_keys="right,other", **SMALL) as server:
        yield server


@pytest.fixture(scope="module")
def forgetful() -> Iterator[ServerProcess]:
    """A server with a window of a few words, over which it forgets, and one permit."""
    with started("perennial", http_overflow="evict", max_concurrent=1, **SMALL) as server:
        yield server


@pytest.fixture(scope="module")
def queueing() -> Iterator[ServerProcess]:
    """A server with one permit, for which a completion waits half a second."""
    with started(
        "perennial", http_overflow="evict", max_concurrent=1, admission_policy="queue", queue_max_wait_s=0.5, **SMALL
    ) as server:
        yield server


def checked(response: httpx.Response) -> httpx.Response:
    """The response, which says that the door is deprecated as every one does."""
    assert response.headers["deprecation"] == "true"
    assert response.headers["sunset"] == "Wed, 31 Dec 2025 00:00:00 GMT"
    assert response.headers["link"] == f'<{MIGRATION}>; rel="successor-version"; type="text/markdown"'
    return response


def ask(server: ServerProcess, method: str, path: str, **more: Any) -> httpx.Response:
    return checked(httpx.request(method, server.http + path, timeout=MOST_S, **more))


def post(server: ServerProcess, body: object, **more: Any) -> httpx.Response:
    """The answer to a completion, asked for by a JSON value or by raw bytes."""
    more["headers"] = {"Content-Type": "application/json"} | more.get("headers", {})
    return ask(server, "POST", COMPLETIONS, content=body if isinstance(body, bytes) else json.dumps(body), **more)


def error_in(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error in a body that has nothing else."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert list(response.json()) == ["error"]
    error: dict[str, Any] = response.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert error["message"]
    assert "\n" not in error["message"]
    assert error["type"].endswith("_error")
    return error


def events_in(response: httpx.Response) -> list[Any]:
    """What the events of a stream carry, `[DONE]` as it is."""
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, nothing = response.text.split("\n\n")
    assert nothing == ""
    data = [event.removeprefix("data: ") for event in events]
    return [each if each == "[DONE]" else json.loads(each) for each in data]


def metric(server: ServerProcess, line: str) -> float:
    """The value of one series, 0 where nobody has counted it yet."""
    found = re.search(rf"^{re.escape(line)} (\S+)$", ask(server, "GET", "/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


@contextmanager
def permit_taken(server: ServerProcess) -> Iterator[httpx.Response]:
    """An endless stream runs in the block. After it the permit is free again."""
    with httpx.stream("POST", server.http + COMPLETIONS, json=ENDLESS | {"stream": True}, timeout=MOST_S) as stream:
        assert stream.status_code == 200
        yield checked(stream)
    until_idle(server)


def until_idle(server: ServerProcess) -> None:
    """Returns once no slab is held: a server notices a little later that a client has left."""
    until(lambda: not metric(server, "perennial_slab_in_use"))


def test_health_says_ok_and_names_the_model(plain: ServerProcess) -> None:
    response = ask(plain, "GET", "/healthz")

    assert (response.status_code, response.json()) == (200, {"status": "ok", "model": SEEDLING})


def test_a_model_label_is_what_the_door_calls_the_model() -> None:
    with started("perennial", model_label="my model") as server:
        assert ask(server, "GET", "/healthz").json()["model"] == "my model"
        assert [model["id"] for model in ask(server, "GET", "/v1/models").json()["data"]] == ["my model"]
        assert post(server, HELLO | {"model": "my model"}).json()["model"] == "my model"
        assert error_in(post(server, HELLO), 404)["code"] == "model_not_found"


def test_models_are_listed_in_openais_shape(plain: ServerProcess) -> None:
    listed = ask(plain, "GET", "/v1/models").json()

    assert listed["object"] == "list"
    assert [(model["id"], model["object"]) for model in listed["data"]] == [(SEEDLING, "model")]


def test_the_page_that_the_link_names_is_served_as_markdown(plain: ServerProcess) -> None:
    link = re.match("<(.*)>", ask(plain, "GET", "/healthz").headers["link"])
    assert link is not None

    response = ask(plain, "GET", link[1])

    assert response.status_code == 200
    assert response.headers["content-type"].partition(";")[0] == "text/markdown"
    assert response.text.startswith("#")


def test_a_completion_is_counted_once_by_everything_that_counts_it(plain: ServerProcess) -> None:
    lines = [
        'perennial_admission_total{result="admitted"}',
        'perennial_completions_total{finish_reason="length"}',
        f'perennial_http_requests_total{{method="POST",path="{COMPLETIONS}",status="200"}}',
        'perennial_session_total{outcome="closed"}',
    ]
    before = [metric(plain, line) for line in lines]

    post(plain, HELLO)

    # A request is counted a little after its last byte; sessions of the other door may hold slabs all the while.
    until(lambda: metric(plain, lines[2]) > before[2])
    assert [metric(plain, line) for line in lines] == [count + 1 for count in before]


def test_a_method_that_a_client_made_up_makes_no_series_of_its_own(plain: ServerProcess) -> None:
    error_in(ask(plain, "BREW", "/healthz"), 405)

    assert 'method="other"' in ask(plain, "GET", "/metrics").text
    assert "BREW" not in ask(plain, "GET", "/metrics").text


def test_a_stream_is_a_role_then_text_then_a_reason_then_done(plain: ServerProcess) -> None:
    response = post(plain, HELLO | {"stream": True})

    *chunks, done = events_in(response)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert done == "[DONE]"
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert [list(delta) for delta in deltas[1:]] == [["content"]] * (len(deltas) - 2) + [[]]
    assert reasons == [None] * (len(chunks) - 1) + ["length"]
    assert not any("usage" in chunk for chunk in chunks)


def test_usage_is_null_in_every_chunk_but_the_last_where_it_was_asked_for(plain: ServerProcess) -> None:
    response = post(plain, HELLO | {"stream": True, "stream_options": {"include_usage": True}})

    *chunks, last, done = events_in(response)
    assert done == "[DONE]"
    assert [chunk["usage"] for chunk in chunks] == [None] * len(chunks)
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 4)


def test_a_route_that_is_not_there_is_not_found(plain: ServerProcess) -> None:
    for path in ("/nothing", "/v1", "/v1/completions", "/v1/chat/completions/", "/v1/models/../secrets"):
        assert error_in(ask(plain, "GET", path), 404)["type"] == "not_found_error"


def test_a_method_that_a_route_does_not_take_is_refused_with_those_that_it_takes(plain: ServerProcess) -> None:
    for method, path, allowed in (
        ("GET", COMPLETIONS, {"POST", "OPTIONS"}),
        ("DELETE", COMPLETIONS, {"POST", "OPTIONS"}),
        ("POST", "/v1/models", {"GET", "HEAD", "OPTIONS"}),
        ("PUT", "/healthz", {"GET", "HEAD", "OPTIONS"}),
    ):
        response = ask(plain, method, path)

        error_in(response, 405)
        assert set(response.headers["allow"].split(", ")) == allowed


def test_a_handshake_for_a_websocket_is_refused_like_everything_else(plain: ServerProcess) -> None:
    handshake = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    }

    error_in(ask(plain, "GET", "/v1/models", headers=handshake), 400)
    error_in(ask(plain, "GET", "/nothing", headers=handshake), 404)


def test_a_model_that_is_not_here_is_not_found(plain: ServerProcess) -> None:
    for body in (HELLO | {"model": "gpt-4"}, HELLO | {"model": "gpt-4", "stream": True}, HELLO | {"model": ""}):
        error = error_in(post(plain, body), 404)

        assert (error["param"], error["code"]) == ("model", "model_not_found")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"hello",
        b"{'model': 'seedling'}",
        b'{"model": "seedling",}',
        b"\xff\xfe{}",
        b'{"model": "\xff"}',
        b'{"model": "\\ud800"}',
        b'{"model": 1} {}',
        b"[" * 100_000,
        b'{"messages": ' * 1000,
    ],
    ids=lambda body: repr(body[:24]),
)
def test_what_is_not_json_is_a_bad_request(plain: ServerProcess, body: bytes) -> None:
    error = error_in(post(plain, body), 400)

    assert "not JSON" in error["message"]
    assert error["param"] is None


@pytest.mark.parametrize("body", [[], "seedling", 5, None, True], ids=repr)
def test_json_that_is_no_object_is_refused(plain: ServerProcess, body: object) -> None:
    assert error_in(post(plain, body), 422)["param"] is None


def with_content(content: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": content}]}


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


TOOL = {"type": "function", "function": {"name": "f"}}
CALLED = {"name": "f", "arguments": "{}"}
CALL = {"id": "1", "type": "function", "function": CALLED}


def with_schema(schema: dict[str, Any]) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}}


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"model": 5}, "model"),
        ({"model": None}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": ["Hello"]}, "messages.0"),
        ({"messages": [{"content": "Hello"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "wizard", "content": "Hello"}]}, "messages.0.role"),
        ({"messages": [*HELLO["messages"], {"role": "user", "content": 5}]}, "messages.1.content"),
        (with_content(None), "messages.0.content"),
        (with_content(["Hello"]), "messages.0.content.0"),
        (with_content([{"type": "text"}]), "messages.0.content.0.text"),
        (with_content([{"type": "text", "text": "Hello"}, IMAGE]), "messages.0.content.1.type"),
        (with_content([{"type": "input_audio", "text": ""}]), "messages.0.content.0.type"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": "4"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 2**31}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"seed": 2**64}, "seed"),
        ({"seed": "lucky"}, "seed"),
        ({"stop": 5}, "stop"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": ["a", 5]}, "stop.1"),
        ({"stop": ""}, "stop.0"),
        ({"stream": "yes"}, "stream"),
        ({"stream": 1}, "stream"),
        ({"stream": True, "stream_options": True}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
        ({"stream": True, "stream_options": {"include_obfuscation": 0}}, "stream_options.include_obfuscation"),
        ({"store": 0}, "store"),
        ({"store": 0.0}, "store"),
        ({"user": 5}, "user"),
        ({"ignore_eos": "yes"}, "ignore_eos"),
        ({"n": 0}, "n"),
        ({"n": 5}, "n"),
        ({"n": 1.5}, "n"),
        ({"logprobs": 1}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
        ),
        (with_schema({"type": "nothing"}), "response_format"),
        (with_schema({"$ref": "#/nowhere"}), "response_format"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"tools": [{"type": "function", "function": {"name": "a" * 129}}]}, "tools.0.function.name"),
        ({"tools": [TOOL | {"function": {"name": f"f{n}"}} for n in range(1025)]}, "tools"),
        ({"metadata": []}, "metadata"),
        ({"reasoning_effort": 5}, "reasoning_effort"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_field_of_the_wrong_type_or_range_is_named(plain: ServerProcess, wrong: Any, param: str) -> None:
    error = error_in(post(plain, HELLO | wrong), 422)

    assert error["param"] == param
    assert param in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("missing", ["model", "messages"])
def test_a_field_that_has_to_be_there_is_named_when_it_is_missing(plain: ServerProcess, missing: str) -> None:
    body = {name: value for name, value in HELLO.items() if name != missing}

    assert error_in(post(plain, body), 422)["param"] == missing


# What CONTRACT names as part of a request.
SUPPORTED = {
    *("messages", "model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop", "stream"),
    *("stream_options", "n", "logprobs", "top_logprobs", "user"),
    *("response_format", "tools", "tool_choice", "parallel_tool_calls", "reasoning_effort"),
}
# What CONTRACT calls hints: they change no answer. The values are such as clients send.
HINTS: dict[str, object] = {
    "metadata": {"run": "7"},
    "prediction": {"type": "content", "content": "The sea."},
    "prompt_cache_key": "a key",
    "prompt_cache_options": {"mode": "implicit"},
    "prompt_cache_retention": "24h",
    "safety_identifier": "somebody",
    "service_tier": "flex",
    "store": True,
    "user": "me",
    "verbosity": "low",
}
SUPPORTED |= HINTS.keys()
NOT_SUPPORTED = sorted(set(CompletionCreateParamsStreaming.__annotations__) - SUPPORTED)


@pytest.mark.parametrize("name", HINTS)
def test_a_hint_is_taken_and_changes_no_answer(plain: ServerProcess, name: str) -> None:
    answer = post(plain, HELLO | {name: HINTS[name]}).json()

    assert answer["choices"] == post(plain, HELLO).json()["choices"]


@pytest.mark.parametrize("name", NOT_SUPPORTED)
def test_a_field_that_openai_defines_and_this_server_does_not_have_is_refused_by_name(
    plain: ServerProcess, name: str
) -> None:
    for value in ({"type": "unheard of"}, "unheard of", 17):
        error = error_in(post(plain, HELLO | {name: value}), 422)

        assert error["param"] == name
        assert f"{name} is not supported" in error["message"]


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "include_obfuscation"),
        (with_content([{"type": "text", "text": "a", "prompt_cache_breakpoint": {"a": 1}}]), "prompt_cache_breakpoint"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [CALL]}]}, "tool_calls"),
        ({"messages": [{"role": "assistant", "content": "a", "function_call": {"name": "f"}}]}, "function_call"),
        ({"messages": [{"role": "assistant", "content": "a", "audio": {"id": "1"}}]}, "audio"),
        ({"messages": [{"role": "assistant", "content": "a", "refusal": "No."}]}, "refusal"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_supported_further_in_is_refused_by_name_too(plain: ServerProcess, wrong: Any, named: str) -> None:
    error = error_in(post(plain, HELLO | wrong), 422)

    assert named in error["message"]
    assert error["param"]


def test_values_that_ask_for_nothing_are_taken(plain: ServerProcess) -> None:
    nothing = {
        "n": 1,
        "logprobs": False,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "metadata": {},
        "service_tier": "auto",
        "store": False,
        "stop": [],
        "user": "me",
    }
    nulls = dict.fromkeys([*NOT_SUPPORTED, *(SUPPORTED - {"model", "messages"})])

    texts = [post(plain, HELLO | more).json()["choices"][0]["message"]["content"] for more in ({}, nothing)]

    assert texts[0] == texts[1]
    assert post(plain, nulls | HELLO).status_code == 200


def test_a_whole_number_may_be_written_with_a_fraction_of_nothing(plain: ServerProcess) -> None:
    written = {"max_tokens": 4.0, "n": 1.0, "seed": -1e3, "top_k": 0.0, "logprobs": True, "top_logprobs": 1.0}

    answer = post(plain, HELLO | written).json()

    assert answer["usage"]["completion_tokens"] == 4
    assert len(answer["choices"]) == 1


def test_a_field_that_openai_does_not_define_is_ignored(plain: ServerProcess) -> None:
    more = {"repetition_penalty": 1.3, "no such field": {"deep": [1, 2]}, "": None}
    talk = {"messages": [HELLO["messages"][0] | {"mood": "good"}]}

    response = post(plain, HELLO | more | talk)

    assert response.json()["choices"] == post(plain, HELLO).json()["choices"]


@pytest.mark.parametrize(
    ("both", "param"),
    [
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": False, "stream_options": {"include_usage": True}}, "stream_options"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"logprobs": False, "top_logprobs": 1}, "top_logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [TOOL]}, "tool_choice"),
        ({"tools": [TOOL], "response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [TOOL], "logprobs": True}, "logprobs"),
        ({"tools": [TOOL], "ignore_eos": True}, "ignore_eos"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
        ({"chat_template_kwargs": {"messages": "none"}}, "chat_template_kwargs"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt"),
        ({"continue_final_message": True}, "messages"),
    ],
)
def test_a_combination_that_cannot_be_honoured_is_a_bad_request(plain: ServerProcess, both: Any, param: str) -> None:
    assert error_in(post(plain, HELLO | both), 400)["param"] == param


def test_developer_is_the_newer_name_of_system(plain: ServerProcess) -> None:
    answers = [
        post(plain, HELLO | {"messages": [{"role": role, "content": "Be brief."}, *HELLO["messages"]]}).json()
        for role in ("developer", "system")
    ]

    assert answers[0]["choices"] == answers[1]["choices"]
    assert answers[0]["usage"]["prompt_tokens"] == answers[1]["usage"]["prompt_tokens"]


def test_parts_of_text_are_one_text(plain: ServerProcess) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]

    response = post(plain, HELLO | with_content(parts))

    whole = post(plain, HELLO).json()
    assert response.json()["choices"] == whole["choices"]
    assert response.json()["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"]


def test_any_text_is_taken(plain: ServerProcess) -> None:
    for content in ("", " \n", "\0", "<|im_end|>", "👩‍👩‍👧 ﷺ \ufffd", "\U0010ffff"):
        assert post(plain, HELLO | with_content(content)).status_code == 200


def test_any_content_type_is_taken_for_json(plain: ServerProcess) -> None:
    for kind in ("application/json; charset=utf-8", "text/plain", "application/x-www-form-urlencoded"):
        assert post(plain, HELLO, headers={"content-type": kind}).status_code == 200


def test_a_body_over_8_mib_is_too_large_however_it_comes(plain: ServerProcess) -> None:
    error_in(post(plain, b" " * (MOST_BODY_BYTES + 1)), 413)
    chunks = (b" " * 2**20 for _ in range(9))
    error_in(ask(plain, "POST", COMPLETIONS, content=chunks, headers={"Content-Type": "application/json"}), 413)


def test_a_body_of_8_mib_is_read(plain: ServerProcess) -> None:
    body = json.dumps(HELLO).encode()

    assert post(plain, body.ljust(MOST_BODY_BYTES)).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_over_the_models_whole_context_is_refused(plain: ServerProcess, stream: bool) -> None:
    error = error_in(post(plain, HELLO | with_content("sea " * 2000) | {"stream": stream}), 400)

    assert error["code"] == "context_length_exceeded"


@contextmanager
def connected(server: ServerProcess) -> Iterator[socket.socket]:
    """A connection without a client that tidies up what is sent."""
    host, port = server.http.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=MOST_S) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield connection


def received(connection: socket.socket, mark: bytes) -> bytes:
    """What came up to and with `mark`."""
    data = b""
    while mark not in data:
        more = connection.recv(4096)
        assert more, data
        data += more
    return data


@pytest.mark.parametrize(
    "request_line_and_headers",
    ["GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close", "GET /healthz HTTP/1.0"],
    ids=["close", "HTTP/1.0"],
)
def test_a_connection_is_closed_after_the_answer_where_the_client_wants_no_more(
    server: ServerProcess, request_line_and_headers: str
) -> None:
    with connected(server) as connection:
        connection.sendall(f"{request_line_and_headers}\r\n\r\n".encode())

        assert received(connection, b'"ok"').startswith(b"HTTP/1.1 200 ")
        while connection.recv(4096):
            pass


def test_a_connection_goes_on_after_a_refusal_whose_body_came_late(server: ServerProcess) -> None:
    for _ in range(20):
        with connected(server) as connection:
            connection.sendall(f"POST /nothing {JSON}6\r\n\r\n".encode())
            connection.sendall(b"hel")
            connection.sendall(b"lo!")
            assert received(connection, b"}}").startswith(b"HTTP/1.1 404 ")

            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")

            assert received(connection, b'"ok"').startswith(b"HTTP/1.1 200 ")


def test_a_connection_whose_body_will_not_be_read_is_closed_and_the_answer_says_so(server: ServerProcess) -> None:
    with connected(server) as connection:
        connection.sendall(f"POST {COMPLETIONS} {JSON}{10**12}\r\n\r\n".encode())

        answer = received(connection, b"}}")

        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b"connection: close" in answer.lower()
        while connection.recv(4096):
            pass


KEY = {"authorization": "Bearer right"}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ""},
        {"authorization": "right"},
        {"authorization": "Bearer"},
        {"authorization": "Bearer wrong"},
        {"authorization": "Bearer right2"},
        {"authorization": "Bearer righ"},
        {"authorization": "Bearer right,other"},
        {"authorization": "Bearer RIGHT"},
        {"authorization": "Basic right"},
        {"authorization": b"Bearer \xc3\xa9\xff"},
        {"x-api-key": "right"},
    ],
    ids=str,
)
def test_without_a_key_nothing_under_v1_is_open(locked: ServerProcess, headers: Any) -> None:
    for method, path in (("GET", "/v1/models"), ("POST", COMPLETIONS), ("GET", "/v1/nothing"), ("PUT", "/v1/models")):
        response = ask(locked, method, path, headers=headers)

        error = error_in(response, 401)
        assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
        assert response.headers["www-authenticate"] == "Bearer"


def test_the_key_is_asked_for_before_the_body_is_read(locked: ServerProcess) -> None:
    error_in(post(locked, b"not JSON"), 401)


@pytest.mark.parametrize("key", ["Bearer right", "Bearer other", "bearer right", "Bearer  right"])
def test_each_key_opens_the_door(locked: ServerProcess, key: str) -> None:
    assert ask(locked, "GET", "/v1/models", headers={"authorization": key}).status_code == 200
    assert post(locked, HELLO, headers={"authorization": key}).status_code == 200


def test_health_metrics_the_page_and_options_are_open(locked: ServerProcess) -> None:
    for path in ("/healthz", "/metrics", MIGRATION):
        assert ask(locked, "GET", path).status_code == 200
    for path in ("/v1/models", COMPLETIONS):
        assert ask(locked, "OPTIONS", path).status_code == 200


# Other ways to write a path; httpx would tidy them up.
@pytest.mark.parametrize(
    "target", ["//v1/models", "/v1//models", "/%761/models", "/%2fv1/models", "http://x/v1/models"]
)
def test_no_way_to_write_the_path_gets_around_the_key(locked: ServerProcess, target: str) -> None:
    with connected(locked) as connection:
        connection.sendall(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())

        assert received(connection, b"}}")[9:12] in (b"401", b"404")


def test_keys_are_never_in_the_log_nor_is_what_was_said(locked: ServerProcess) -> None:
    post(locked, HELLO | with_content("a secret"), headers=KEY)
    post(locked, HELLO, headers={"authorization": "Bearer guessed"})

    log = "".join(locked.said)
    assert not [word for word in ("right", "guessed", "a secret") if word in log]


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_over_the_window_is_refused(locked: ServerProcess, stream: bool) -> None:
    error = error_in(post(locked, HELLO | with_content("sea " * 70) | {"stream": stream}, headers=KEY), 400)

    assert error["code"] == "context_length_exceeded"
    assert "64" in error["message"]


def test_a_completion_that_fills_the_slab_ends_with_length_and_nothing_is_evicted(locked: ServerProcess) -> None:
    answer = post(locked, ENDLESS, headers=KEY).json()

    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == SMALL["sink"] + SMALL["window"]
    assert answer["evicted_token_count"] == 0


def test_a_longer_prompt_is_taken_where_the_server_forgets_and_the_answer_says_how_much(
    forgetful: ServerProcess,
) -> None:
    body = HELLO | with_content("sea " * 100)

    answer = post(forgetful, body).json()
    until_idle(forgetful)
    *_, last, done = events_in(post(forgetful, body | {"stream": True}))

    assert done == "[DONE]"
    assert answer["usage"]["completion_tokens"] == 4
    assert answer["evicted_token_count"] == answer["usage"]["total_tokens"] - SMALL["sink"] - SMALL["window"] > 40
    assert last["evicted_token_count"] == answer["evicted_token_count"]
    until_idle(forgetful)


def test_what_fits_where_the_server_forgets_evicts_nothing(forgetful: ServerProcess) -> None:
    assert post(forgetful, HELLO).json()["evicted_token_count"] == 0
    until_idle(forgetful)


def test_one_completion_more_than_there_are_permits_is_told_to_come_again(forgetful: ServerProcess) -> None:
    with permit_taken(forgetful):
        for stream in (False, True):
            response = post(forgetful, HELLO | {"stream": stream})

            error = error_in(response, 429)
            assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
            assert int(response.headers["retry-after"]) > 0


def test_a_request_that_is_refused_takes_no_permit(forgetful: ServerProcess) -> None:
    with permit_taken(forgetful):
        error_in(post(forgetful, HELLO | {"top_p": 5}), 422)
        error_in(post(forgetful, HELLO | {"model": "gpt-4"}), 404)
        assert ask(forgetful, "GET", "/v1/models").status_code == 200


def test_a_completion_over_the_time_limit_is_a_timeout(hurried: ServerProcess) -> None:
    error = error_in(post(hurried, ENDLESS), 504)

    assert (error["type"], error["code"]) == ("timeout_error", "timeout")
    until_idle(hurried)


def test_a_stream_over_the_time_limit_ends_with_an_error_and_is_not_done(hurried: ServerProcess) -> None:
    response = post(hurried, ENDLESS | {"stream": True})
    while response.status_code == 504:  # A slow machine takes all the time before the stream begins.
        until_idle(hurried)
        response = post(hurried, ENDLESS | {"stream": True})

    first, *chunks, last = events_in(response)

    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)
    assert list(last) == ["error"]
    assert (last["error"]["type"], last["error"]["code"]) == ("timeout_error", "timeout")
    until_idle(hurried)


def test_a_completion_that_has_waited_its_longest_is_told_to_come_again(queueing: ServerProcess) -> None:
    with permit_taken(queueing):
        response = post(queueing, HELLO)

    assert error_in(response, 429)["code"] == "rate_limit_exceeded"
    assert int(response.headers["retry-after"]) > 0
    assert metric(queueing, 'perennial_admission_total{result="timed_out"}') == 1


def test_a_server_that_loads_says_so_and_takes_no_calls(tmp_path: Path) -> None:
    with (
        held_model(tmp_path / "model") as (model, release),
        started("perennial", is_awaited=False, model=model, model_label=SEEDLING, state_dir=tmp_path) as server,
    ):
        health = ask(server, "GET", "/healthz")
        refusals = [ask(server, "GET", "/v1/models"), post(server, HELLO), post(server, b"not JSON")]

        assert (health.status_code, health.json()) == (503, {"status": "loading", "model": SEEDLING})
        for refusal in refusals:
            assert error_in(refusal, 503)["type"] == "overloaded_error"
        assert [int(each.headers["retry-after"]) > 0 for each in (health, *refusals)] == [True] * 4
        assert ask(server, "GET", "/metrics").status_code == 200
        release()


def test_a_server_that_drains_says_so_takes_no_calls_and_lets_what_runs_come_to_its_end(stubs: Stubs) -> None:
    body = ENDLESS | {"max_tokens": 100, "stream": True}
    with (
        started("perennial", application=PATIENT, http_overflow="evict", **SMALL) as server,
        stock(stubs, server.grpc) as other,
    ):
        # Until this one is cancelled the drain goes on, however soon the other stream ends.
        endless = other.stream(other.create(PROMPT), MOST_TOKENS)
        next(endless)
        with httpx.stream("POST", server.http + COMPLETIONS, json=body, timeout=MOST_S) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)

            until(lambda: ask(server, "GET", "/healthz").json()["status"] == "draining")
            refusal = post(server, HELLO)
            endless.cancel()

            assert error_in(refusal, 503)["type"] == "overloaded_error"
            assert int(refusal.headers["retry-after"]) > 0
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert server.wait() == 0
