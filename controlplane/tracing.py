"""Traces of transactions (OpenTelemetry), for who installs the extra `otel` and configures it.

A page is one span, `page`, with its steps below it: resolve, prepare, ready, commit, enforce,
answer. Unconfigured, `span` does nothing and costs next to nothing.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Tracer

_tracer: "Tracer | None" = None


class TracingUnavailable(Exception):
    """The packages that tracing needs are not installed."""


class _NoSpan:
    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass


_NO_SPAN = _NoSpan()


def span(name: str, **attributes: str | bool | int | float) -> AbstractContextManager[Any]:
    """Measure what runs within. Spans nest; an exception is recorded and passes."""
    if _tracer is None:
        return _NO_SPAN
    started: AbstractContextManager[Any] = _tracer.start_as_current_span(
        name, attributes=attributes
    )
    return started


def configure_tracing(
    exporter: "str | SpanExporter", service_name: str = "ai-paging"
) -> Callable[[], None]:
    """Export spans from now on, in batches, to an OTLP/HTTP endpoint (a URL) or an exporter.

    Returns what flushes them and ends it. Raises TracingUnavailable without the extra `otel`.
    """
    global _tracer
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        if isinstance(exporter, str):
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            exporter = OTLPSpanExporter(endpoint=exporter)
    except ImportError as error:
        raise TracingUnavailable(f"tracing needs the extra ai-paging[otel]: {error}") from error
    provider = TracerProvider(resource=Resource.create({"service.name": service_name}))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    _tracer = provider.get_tracer("ai-paging")

    def end() -> None:
        global _tracer
        _tracer = None
        provider.shutdown()

    return end
