"""Traces: nothing unless configured, nested spans if it is."""

import time

import pytest

from controlplane.tracing import configure_tracing, span


def test_an_unconfigured_span_costs_next_to_nothing() -> None:
    def spans_ns() -> float:
        started_ns = time.perf_counter_ns()
        for _ in range(1000):
            with span("page", ue="ue1"):
                pass
        return (time.perf_counter_ns() - started_ns) / 1000

    assert min(spans_ns() for _ in range(20)) < 1000


def test_the_steps_of_a_transaction_are_below_it() -> None:
    memory = pytest.importorskip(
        "opentelemetry.sdk.trace.export.in_memory_span_exporter", reason="the extra otel is missing"
    )
    exporter = memory.InMemorySpanExporter()
    end = configure_tracing(exporter, service_name="test")
    with span("page", ue="ue1"):
        with span("resolve", candidates=3):
            pass
        with pytest.raises(ValueError, match="no room"), span("prepare"):
            raise ValueError("no room")
    end()
    with span("later"):
        pass
    resolve, prepare, page = exporter.get_finished_spans()
    assert [resolve.name, prepare.name, page.name] == ["resolve", "prepare", "page"]
    assert page.parent is None and page.attributes == {"ue": "ue1"}
    assert page.resource.attributes["service.name"] == "test"
    for step in (resolve, prepare):
        assert step.parent.span_id == page.context.span_id
    assert resolve.attributes == {"candidates": 3}
    assert not prepare.status.is_ok and prepare.events[0].name == "exception"
