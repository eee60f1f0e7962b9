"""Traces: nothing unless configured, nested spans if it is."""

import pytest

from controlplane.tracing import configure_tracing, span


def test_an_unconfigured_span_is_one_and_the_same_nothing() -> None:
    assert span("page", ue="ue1") is span("resolve")
    with pytest.raises(ValueError, match="no room"), span("page"):
        raise ValueError("no room")


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
