"""Traces by OpenTelemetry, where it is installed (the extra `otel`): one span a request, its phases inside.

Names of attributes are those of OpenTelemetry's semantic conventions for HTTP and generative AI.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Self

try:
    from opentelemetry import trace
    from opentelemetry.trace import StatusCode
except ImportError:
    _is_installed = False
else:
    _is_installed = True

if TYPE_CHECKING:
    from opentelemetry.trace import Span

_NAME = "perennial"
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")

_log = logging.getLogger("perennial.api")


def configure_tracing() -> None:
    """Sends traces to where OpenTelemetry's environment variables say, or else to where the host program sends them."""
    named = next((name for name in _ENDPOINTS if os.environ.get(name)), None)
    if named is None:
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        _log.warning("%s is set and OpenTelemetry is not here: pip install 'perennial[otel]'", named)
        return
    name = os.environ.get("OTEL_SERVICE_NAME", _NAME)
    provider = TracerProvider(resource=Resource.create({"service.name": name}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)


@contextmanager
def request_span(method: str) -> Iterator[None]:
    """The span of one HTTP request. `describe_request` gives it its name and attributes."""
    if not _is_installed:
        yield
        return
    with trace.get_tracer(_NAME).start_as_current_span(method, kind=trace.SpanKind.SERVER):
        yield


def describe_request(attributes: Mapping[str, str | int], name: str | None = None) -> None:
    """Adds attributes, and a name if given, to the span of the request that this task serves."""
    if _is_installed:
        span = trace.get_current_span()
        span.set_attributes(dict(attributes))
        if name is not None:
            span.update_name(name)


class Phases:
    """Consecutive spans within the request's span; the last one ends with the block."""

    def __init__(self) -> None:
        self._span: Span | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace_back: TracebackType | None
    ) -> None:
        if self._span is not None:
            if error is not None:
                self._span.set_status(StatusCode.ERROR, type(error).__name__)
            self._span.end()

    def begin(self, name: str) -> None:
        """Ends the current phase and begins the next."""
        if _is_installed:
            if self._span is not None:
                self._span.end()
            self._span = trace.get_tracer(_NAME).start_span(name)
