"""What /metrics says: every name of the contract with its kind, and after a script of calls the counts to the last one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from runtime.models import SEEDLING
from tests.contract.loops import MOST_S
from tests.contract.servers import KINDS, ServerProcess, started, until
from tests.contract.stubs import PROMPT, Stubs, stock

pytestmark = pytest.mark.door

COMPLETIONS = "/v1/chat/completions"
CAPACITY = 2

COUNTERS = """
session_total session_evicted_total generated_tokens_total cache_invariant_violations_total admission_total
http_requests_total grpc_requests_total completions_total proposed_tokens_total accepted_tokens_total
session_moved_here_total session_moved_away_total reread_tokens_total
""".split()
GAUGES = """
session_active session_kv_live_bytes session_history_tokens slab_in_use slab_total admission_pending
""".split()
HISTOGRAMS = """
generate_prefill_tokens generate_prefill_duration_seconds time_to_first_token_seconds inter_token_seconds
forward_duration_seconds forward_rows http_request_duration_seconds
""".split()


def read(server: ServerProcess) -> httpx.Response:
    return httpx.get(f"{server.http}/metrics", timeout=MOST_S)


def test_every_metric_of_the_contract_is_there_and_is_of_its_kind(plain: ServerProcess) -> None:
    response = read(plain)

    kinds = {family.name: family.type for family in text_string_to_metric_families(response.text)}
    assert response.headers["content-type"].startswith("text/plain; version=")
    for names, kind in ((COUNTERS, "counter"), (GAUGES, "gauge"), (HISTOGRAMS, "histogram")):
        # A family of counters goes without the suffix of its samples.
        described = [f"perennial_{name.removesuffix('_total') if kind == 'counter' else name}" for name in names]
        assert [kinds.get(name) for name in described] == [kind] * len(names)


Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@dataclass(frozen=True)
class Played:
    """What /metrics says after the script, and how many tokens the clients saw: all prompts', and each generation's."""

    samples: Samples
    prompt_tokens: int
    generated: list[int]

    def one(self, name: str) -> float:
        """The sample of a name without labels."""
        return self.samples[f"perennial_{name}", frozenset()]

    def by(self, name: str, *names: str, **fixed: str) -> dict[tuple[str, ...], float]:
        """The samples of a name whose other labels are `fixed`, by the labels `names`; none that nobody has counted."""
        found = {}
        for (sampled, labels), value in self.samples.items():
            label = dict(labels)
            if sampled == f"perennial_{name}" and value and fixed.items() <= label.items():
                found[tuple(label[one] for one in names)] = value
        return found


def body(content: str = "Hello!", **more: object) -> dict[str, object]:
    return {"model": SEEDLING, "messages": [{"role": "user", "content": content}], "temperature": 0, **more}


def sampled(server: ServerProcess) -> Samples:
    families = list(text_string_to_metric_families(read(server).text))
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def settled(server: ServerProcess, completions: int) -> Samples:
    """The samples once so many completions are counted: each is, and gives its permit back, a little after its last byte."""

    def counted() -> float:
        return sum(
            value
            for (name, labels), value in sampled(server).items()
            if name == "perennial_http_requests_total" and ("path", COMPLETIONS) in labels
        )

    until(lambda: counted() == completions)
    return sampled(server)


@pytest.fixture(scope="module", params=KINDS)
def played(request: pytest.FixtureRequest, stubs: Stubs) -> Iterator[Played]:
    """The script: seven completions, of which three are refused, and a session, on a server that does nothing else."""
    settings: dict[str, Any] = {"max_concurrent": 1, "capacity": CAPACITY, "http_overflow": "evict"}
    with started(request.param, **settings) as server, httpx.Client(base_url=server.http, timeout=MOST_S) as client:
        usages = []
        for asked in (body("Tell me about the sea."), body(max_tokens=1), body(max_tokens=9, ignore_eos=True)):
            usages.append(client.post(COMPLETIONS, json=asked).json()["usage"])
            settled(server, len(usages))
        assert client.post(COMPLETIONS, json=body(top_p=5)).status_code == 422
        assert client.post(COMPLETIONS, json=body() | {"model": "other"}).status_code == 404
        # Logprobs fill the socket, so that this one runs until it is read, however late the next one comes.
        wordy: dict[str, Any] = {"logprobs": True, "top_logprobs": 20, "stream_options": {"include_usage": True}}
        long = body(max_tokens=600, ignore_eos=True, stream=True, **wordy)
        with client.stream("POST", COMPLETIONS, json=long) as stream:
            lines = stream.iter_lines()
            next(lines)
            assert client.post(COMPLETIONS, json=body()).status_code == 429
            *_, counted, done = (line for line in lines if line)
        assert done == "data: [DONE]"
        usages.append(json.loads(counted.removeprefix("data: "))["usage"])
        with stock(stubs, server.grpc) as session:
            session_id = session.create(PROMPT)
            generated = len(session.generated(session_id, 7))
            session.close(session_id)
        yield Played(
            settled(server, 7),
            # Of what a slab had read before no row runs.
            sum(usage["prompt_tokens_details"]["read"] for usage in usages) + len(PROMPT),
            [usage["completion_tokens"] for usage in usages] + [generated],
        )


def test_requests_are_counted_by_how_they_ended(played: Played) -> None:
    here = {"method": "POST", "path": COMPLETIONS}

    statuses = played.by("http_requests_total", "status", **here)

    assert statuses == {("200",): 4, ("404",): 1, ("422",): 1, ("429",): 1}
    assert played.by("http_request_duration_seconds_count", **here) == {(): 7}
    assert played.by("admission_total", "result") == {("admitted",): 4, ("rejected",): 1}
    assert played.by("completions_total", "finish_reason") == {("stop",): 1, ("length",): 3}


def test_calls_are_counted_by_method_and_code(played: Played) -> None:
    calls = played.by("grpc_requests_total", "method", "code")

    methods = ("CreateSession", "AppendTokens", "Generate", "CloseSession")
    assert calls == {(method, "OK"): 1 for method in methods}


def test_tokens_are_counted_to_the_last_one(played: Played) -> None:
    generations, tokens = len(played.generated), sum(played.generated)

    assert played.generated[1:] == [1, 9, 600, 7]
    assert played.one("generated_tokens_total") == tokens
    assert played.one("time_to_first_token_seconds_count") == generations
    assert played.one("generate_prefill_duration_seconds_count") == generations
    assert played.one("inter_token_seconds_count") == tokens - generations
    # An append has read the prompt, and what is drawn needs a row each time.
    assert played.one("generate_prefill_tokens_count") == played.one("generate_prefill_tokens_sum") == generations
    assert played.one("forward_rows_sum") == played.prompt_tokens + tokens
    assert played.one("forward_duration_seconds_count") == played.one("forward_rows_count")
    assert played.one("proposed_tokens_total") == played.one("accepted_tokens_total") == 0


def test_sessions_are_counted_by_their_end_and_leave_nothing(played: Played) -> None:
    assert played.by("session_total", "outcome") == {("closed",): 5}
    assert played.by("session_evicted_total", "reason") == {("close",): 5}
    assert played.by("cache_invariant_violations_total", "kind") == {}
    left = {name: played.one(name) for name in GAUGES}
    assert left == dict.fromkeys(GAUGES, 0) | {"slab_total": CAPACITY + 1}
