"""Traces of a server go where OpenTelemetry's own environment variables say."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from runtime.models import SEEDLING
from tests.contract.loops import MOST_S
from tests.contract.servers import started

pytestmark = pytest.mark.door


@contextmanager
def collector(received: list[bytes]) -> Iterator[str]:
    """The address of something that takes what is exported."""

    class Taker(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Taker) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("kind", ["perennial", "hypercorn-asyncio"])
def test_what_was_traced_is_exported_by_the_end(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[bytes] = []
    with collector(received) as endpoint:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", str(MOST_S))
        with started(kind) as server:
            body = {"model": SEEDLING, "messages": [{"role": "user", "content": "a secret"}], "max_tokens": 2}
            assert httpx.post(f"{server.http}/v1/chat/completions", json=body, timeout=MOST_S).status_code == 200

    exported = [ExportTraceServiceRequest.FromString(data) for data in received]
    resources = [resource for one in exported for resource in one.resource_spans]
    names = [span.name for one in resources for scope in one.scope_spans for span in scope.spans]
    assert {"queue", "prefill", "decode", "POST /v1/chat/completions"} <= set(names)
    services = {
        each.value.string_value for one in resources for each in one.resource.attributes if each.key == "service.name"
    }
    assert services == {"perennial"}
    assert not any(b"a secret" in data for data in received)
