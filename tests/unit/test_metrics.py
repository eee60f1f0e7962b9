"""Figures in Prometheus' exposition format."""

import time

from prometheus_client.parser import text_string_to_metric_families

from controlplane.metrics import SUCCESS, Levels, Metrics, Transaction


def samples(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    text, content_type = metrics.exposition()
    assert content_type.startswith("text/plain")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return samples(metrics).get((f"aipaging_{name}", frozenset(labels.items())))


def test_what_is_counted_is_exposed_in_seconds_and_by_label() -> None:
    metrics = Metrics()
    steps = {"resolve": 100_000, "kernel": 500_000}
    metrics.transaction(Transaction.PAGE, SUCCESS, 2_000_000, steps)
    metrics.transaction(Transaction.PAGE, SUCCESS, 3_000_001, steps)
    metrics.transaction(Transaction.RELOCATION_LOAD, "NO_CANDIDATE", 5_000_000_000, {})
    metrics.journal_batch(entries=3, sync_ns=700_000)
    metrics.kernel_batch(operations=2, duration_ns=30_000)
    metrics.token_refused("invalid_token")
    metrics.rate_limited("acme")

    assert value(metrics, "transactions_total", kind="page", outcome="SUCCESS") == 2
    assert value(metrics, "transactions_total", kind="relocation_load", outcome="NO_CANDIDATE") == 1
    bucket = "transaction_duration_seconds_bucket"
    # An upper bound is within its bucket, and buckets are cumulative.
    assert value(metrics, bucket, kind="page", le="0.001") == 0
    assert value(metrics, bucket, kind="page", le="0.002") == 1
    assert value(metrics, bucket, kind="page", le="0.003") == 1
    assert value(metrics, bucket, kind="page", le="0.005") == 2
    assert value(metrics, bucket, kind="relocation_load", le="1.0") == 0
    assert value(metrics, bucket, kind="relocation_load", le="+Inf") == 1
    assert value(metrics, "transaction_duration_seconds_count", kind="page") == 2
    assert value(metrics, "transaction_duration_seconds_sum", kind="page") == 0.005000001
    assert value(metrics, "step_duration_seconds_sum", step="kernel") == 0.001
    assert value(metrics, "journal_batch_entries_bucket", le="4.0") == 1
    assert value(metrics, "journal_sync_duration_seconds_sum") == 0.0007
    assert value(metrics, "kernel_batch_operations_sum") == 2
    assert value(metrics, "token_refusals_total", reason="invalid_token") == 1
    assert value(metrics, "rate_limited_requests_total", tenant="acme") == 1


def test_states_are_read_when_they_are_asked_for() -> None:
    metrics = Metrics()
    leases = {"COMMITTED": 1}
    metrics.watch(
        lambda: Levels(
            leases=leases, dropped_packets={"no_lease_uplink": 7}, notices={"given_up": 4}
        )
    )
    assert value(metrics, "notices_total", outcome="given_up") == 4
    assert value(metrics, "leases", state="COMMITTED") == 1
    leases["COMMITTED"] = 2
    assert value(metrics, "leases", state="COMMITTED") == 2
    assert value(metrics, "dropped_packets_total", reason="no_lease_uplink") == 7


def test_two_instances_share_nothing() -> None:
    one, other = Metrics(), Metrics()
    one.rate_limited("acme")
    assert value(other, "rate_limited_requests_total", tenant="acme") is None
    assert value(other, "journal_batch_entries_count") == 0  # there before anything happened


def test_counting_a_transaction_is_cheap() -> None:
    metrics = Metrics()
    steps = {"resolve": 100_000, "prepare": 200_000, "commit": 900_000, "kernel": 500_000}
    best_ns = min(_time_ns(metrics, steps) for _ in range(20))
    assert best_ns < 5_000  # of 2,700 when this was written


def _time_ns(metrics: Metrics, steps: dict[str, int]) -> float:
    started_ns = time.perf_counter_ns()
    for _ in range(500):
        metrics.transaction(Transaction.PAGE, SUCCESS, 2_000_000, steps)
    return (time.perf_counter_ns() - started_ns) / 500
