"""What a server says over HTTP is the same whatever proposes, in every form of request."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.contract.loops import MOST_S
from tests.contract.servers import ServerProcess, started

pytestmark = pytest.mark.door

COMPLETIONS = "/v1/chat/completions"
HELLO = {"model": "seedling", "messages": [{"role": "user", "content": "Tell me a story. Then tell me a story again."}]}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "ages": {"type": "array", "items": {"enum": [1, 2, 3]}},
    },
    "required": ["name", "ages"],
    "additionalProperties": False,
}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA, "strict": True}}
REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0, "max_tokens": 60, "ignore_eos": True},
    "to its end": {"temperature": 0},
    "sampled": {"temperature": 0.9, "top_p": 0.9, "seed": 4, "max_tokens": 60},
    "stopped": {"temperature": 0, "stop": ["the", "box"], "ignore_eos": True, "max_tokens": 60},
    "several": {"temperature": 1.2, "seed": 5, "n": 2, "max_tokens": 40},
    "with logprobs": {"temperature": 0, "logprobs": True, "top_logprobs": 3, "max_tokens": 40},
    "of a schema": {"temperature": 1.0, "seed": 6, "max_tokens": 120, "response_format": JSON_SCHEMA},
}


@pytest.fixture(scope="module")
def plain() -> Iterator[ServerProcess]:
    with started("perennial", window=252) as server:
        yield server


@pytest.fixture(scope="module", params=["ngram", "draft", "diffusion"])
def proposing(request: pytest.FixtureRequest) -> Iterator[ServerProcess]:
    with started("perennial", window=252, proposer=request.param) as server:
        yield server


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_the_answer_is_the_one_without_a_proposer(
    plain: ServerProcess, proposing: ServerProcess, request_: dict[str, Any], stream: bool
) -> None:
    assert said(proposing, request_ | {"stream": stream}) == said(plain, request_ | {"stream": stream})


def said(server: ServerProcess, request: dict[str, Any]) -> list[dict[str, Any]]:
    """The bodies of an answer, without what is of one answer alone; those of a stream choice by choice."""
    response = httpx.post(f"{server.http}{COMPLETIONS}", json=HELLO | request, timeout=MOST_S)
    assert response.status_code == 200, response.text
    parts = [part.removeprefix("data: ") for part in response.text.split("\n\n") if part not in ("", "data: [DONE]")]
    bodies = [json.loads(part) for part in parts]
    lasting = [{name: value for name, value in body.items() if name not in ("id", "created")} for body in bodies]
    for body in lasting:
        # What a slab had read before hangs on who asked before.
        body.get("usage", {}).pop("prompt_tokens_details", None)
    return sorted(lasting, key=lambda body: body["choices"][0]["index"])
