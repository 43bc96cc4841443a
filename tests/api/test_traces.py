"""One span a request, with queue, prefill and decode inside."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.api.doors import HELLO, House, open_house


@pytest.fixture(scope="module")
def exporter() -> InMemorySpanExporter:
    """What ends up in the one provider that a process can have."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> Iterator[InMemorySpanExporter]:
    exporter.clear()
    yield exporter
    exporter.clear()


async def post(house: House, body: dict[str, object], path: str = "/v1/chat/completions") -> httpx.Response:
    host, port = house.http
    async with httpx.AsyncClient(base_url=f"http://{host}:{port}", timeout=60) as client:
        return await client.post(path, json=body)


def by_name(spans: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    found = {span.name: span for span in spans.get_finished_spans()}
    assert len(found) == len(spans.get_finished_spans())
    return found


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_completion_has_its_phases_inside_its_request(spans: InMemorySpanExporter, is_stream: bool) -> None:
    async with open_house() as house:
        answer = await post(house, HELLO | {"max_tokens": 3, "stream": is_stream, "ignore_eos": True, "n": 2})

    assert answer.status_code == 200
    found = by_name(spans)
    assert list(found) == ["queue", "prefill", "decode", "POST /v1/chat/completions"]
    request = found["POST /v1/chat/completions"]
    assert dict(request.attributes or {}) == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "gen_ai.request.model": "seedling",
        "gen_ai.usage.input_tokens": 1,
        "gen_ai.usage.output_tokens": 6,
    }
    phases = [found[name] for name in ("queue", "prefill", "decode")]
    assert {phase.parent and phase.parent.span_id for phase in phases} == {request.context.span_id}
    times = [time or 0 for phase in phases for time in (phase.start_time, phase.end_time)]
    assert times == sorted(times)


async def test_a_request_that_is_refused_ends_in_the_phase_that_refused_it(spans: InMemorySpanExporter) -> None:
    async with open_house(max_concurrent=1) as house:
        answer = await post(house, HELLO | {"n": 2})

    assert answer.status_code == 422
    found = by_name(spans)
    assert list(found) == ["queue", "POST /v1/chat/completions"]
    assert not found["queue"].status.is_ok
    assert (found["POST /v1/chat/completions"].attributes or {})["http.response.status_code"] == 422


async def test_a_path_that_a_client_made_up_names_no_span(spans: InMemorySpanExporter) -> None:
    async with open_house() as house:
        await post(house, {}, "/made/up")

    assert list(by_name(spans)) == ["POST unmatched"]
