"""Figures of a running control plane, in Prometheus' exposition format.

Domain code calls typed methods and knows nothing of Prometheus. What happens on the way of a
transaction is counted in plain integers (a `prometheus_client` histogram costs six times as much);
what is a state is read when somebody asks. Use it from the event loop's thread only.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

NS_PER_S = 1_000_000_000
_DURATIONS_S = (
    *(0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03),
    *(0.05, 0.1, 0.2, 0.5, 1.0),
)
_DURATIONS_NS = tuple(round(bound_s * NS_PER_S) for bound_s in _DURATIONS_S)
_SIZES = tuple(2**exponent for exponent in range(11))  # 1 to 1,024
HELD = "held"  # of what becomes of parked packets, what is still to come
SUCCESS = "SUCCESS"  # the outcome of a transaction that has no cause of failure


class Transaction(StrEnum):
    """What a transaction was for."""

    PAGE = "page"
    FIRST_PACKET = "first_packet"
    RELOCATION_PLANNED = "relocation_planned"
    RELOCATION_HANDOVER = "relocation_handover"
    RELOCATION_LOAD = "relocation_load"
    RELOCATION_RECOVERY = "relocation_recovery"
    EXTEND = "extend"
    RELEASE = "release"


@dataclass(frozen=True, slots=True, kw_only=True)
class Levels:
    """What there is at an instant, by state or reason."""

    leases: Mapping[str, int] = field(default_factory=dict)
    sessions: Mapping[str, int] = field(default_factory=dict)
    anchors: Mapping[str, int] = field(default_factory=dict)
    dropped_packets: Mapping[str, int] = field(default_factory=dict)  # since the table was made
    parked_packets: Mapping[str, int] = field(default_factory=dict)  # by what became of them
    notices: Mapping[str, int] = field(default_factory=dict)  # by what became of them


class Metrics:
    """All figures. Durations are in ns here and in seconds where they are exposed."""

    def __init__(self) -> None:
        self._levels: Callable[[], Levels] = Levels
        self._families: list[_Counter | _Histogram] = []
        self._transactions = self._counter(
            "transactions", "Transactions by kind and outcome.", "kind", "outcome"
        )
        self._transaction = self._durations(
            "transaction_duration_seconds", "From request to answer.", "kind"
        )
        self._step = self._durations("step_duration_seconds", "Steps of transactions.", "step")
        self._journal_entries = self._sizes("journal_batch_entries", "Entries of one write.")
        self._journal_sync = self._durations(
            "journal_sync_duration_seconds", "One write until it is durable."
        )
        self._kernel_operations = self._sizes("kernel_batch_operations", "Operations of one batch.")
        self._kernel_batch = self._durations(
            "kernel_batch_duration_seconds", "One batch until the kernel acknowledges it."
        )
        self._token_refusals = self._counter(
            "token_refusals", "Access tokens, and requests for them, refused.", "reason"
        )
        self._rate_limited = self._counter(
            "rate_limited_requests", "Requests above their tenant's rate.", "tenant"
        )
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)
        GCCollector(registry=self._registry)

    def watch(self, levels: Callable[[], Levels]) -> None:
        """Read states from `levels`, which is called for each exposition."""
        self._levels = levels

    def transaction(
        self, kind: Transaction, outcome: str, total_ns: int, steps_ns: Mapping[str, int]
    ) -> None:
        """Count a transaction: SUCCESS or the cause of its failure, and the steps it got to."""
        self._transactions.add((kind, outcome))
        self._transaction.observe((kind,), total_ns)
        observe = self._step.observe
        for step, duration_ns in steps_ns.items():
            observe((step,), duration_ns)

    def journal_batch(self, entries: int, sync_ns: int) -> None:
        """Count one durable write."""
        self._journal_entries.observe((), entries)
        self._journal_sync.observe((), sync_ns)

    def kernel_batch(self, operations: int, duration_ns: int) -> None:
        """Count one batch of the user plane."""
        self._kernel_operations.observe((), operations)
        self._kernel_batch.observe((), duration_ns)

    def token_refused(self, reason: str) -> None:
        """Count a refusal; `reason` is an error code of RFC 6749 or RFC 6750."""
        self._token_refusals.add((reason,))

    def rate_limited(self, tenant: str) -> None:
        """Count a request that came too soon; `tenant` is one of those configured."""
        self._rate_limited.add((tenant,))

    def exposition(self) -> tuple[bytes, str]:
        """Return the text and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def collect(self) -> Iterable[Metric]:
        """Yield all families: the interface of a collector of `prometheus_client`."""
        for family in self._families:
            yield family.metric()
        levels = self._levels()
        for name, help_text, values in (
            ("leases", "Leases by state.", levels.leases),
            ("sessions", "Sessions by state.", levels.sessions),
            ("anchors", "Anchors by state.", levels.anchors),
        ):
            gauge = GaugeMetricFamily(f"aipaging_{name}", help_text, labels=("state",))
            for state, value in values.items():
                gauge.add_metric((state,), value)
            yield gauge
        dropped = CounterMetricFamily(
            "aipaging_dropped_packets", "Packets that the gate dropped.", labels=("reason",)
        )
        for reason, packets in levels.dropped_packets.items():
            dropped.add_metric((reason,), packets)
        yield dropped
        parked = CounterMetricFamily(
            "aipaging_parked_packets",
            "Packets at the queue: stored = released + dropped + expired + aipaging_held_packets.",
            labels=("outcome",),
        )
        held = GaugeMetricFamily("aipaging_held_packets", "Packets that wait for a lease now.")
        for outcome, packets in levels.parked_packets.items():
            if outcome == HELD:
                held.add_metric((), packets)
            else:
                parked.add_metric((outcome,), packets)
        yield from (parked, held)
        notices = CounterMetricFamily(
            "aipaging_notices", "Attempts to deliver notices, by outcome.", labels=("outcome",)
        )
        for outcome, count in levels.notices.items():
            notices.add_metric((outcome,), count)
        yield notices

    def _counter(self, name: str, help_text: str, *labels: str) -> "_Counter":
        counter = _Counter(f"aipaging_{name}", help_text, labels)
        self._families.append(counter)
        return counter

    def _durations(self, name: str, help_text: str, *labels: str) -> "_Histogram":
        return self._histogram(name, help_text, labels, _DURATIONS_NS, NS_PER_S)

    def _sizes(self, name: str, help_text: str) -> "_Histogram":
        return self._histogram(name, help_text, (), _SIZES, 1)

    def _histogram(
        self, name: str, help_text: str, labels: tuple[str, ...], bounds: tuple[int, ...], unit: int
    ) -> "_Histogram":
        histogram = _Histogram(f"aipaging_{name}", help_text, labels, bounds, unit)
        self._families.append(histogram)
        return histogram


class _Counter:
    """Counts by label values."""

    def __init__(self, name: str, help_text: str, labels: tuple[str, ...]) -> None:
        self._name = name
        self._help = help_text
        self._labels = labels
        self._counts: dict[tuple[str, ...], int] = {}

    def add(self, values: tuple[str, ...]) -> None:
        self._counts[values] = self._counts.get(values, 0) + 1

    def metric(self) -> Metric:
        metric = CounterMetricFamily(self._name, self._help, labels=self._labels)
        for values, count in self._counts.items():
            metric.add_metric(values, count)
        return metric


class _Histogram:
    """Counts integers by upper bound; exposes them divided by `unit`."""

    def __init__(
        self,
        name: str,
        help_text: str,
        labels: tuple[str, ...],
        bounds: tuple[int, ...],
        unit: int,
    ) -> None:
        self._name = name
        self._help = help_text
        self._labels = labels
        self._bounds = bounds
        self._unit = unit
        self._counts: dict[tuple[str, ...], list[int]] = {}  # one a bucket, then the sum
        if not labels:
            self._counts[()] = self._zeros()  # a series is there before anything happened

    def _zeros(self) -> list[int]:
        return [0] * (len(self._bounds) + 2)

    def observe(self, values: tuple[str, ...], value: int) -> None:
        counts = self._counts.get(values)
        if counts is None:
            counts = self._counts[values] = self._zeros()
        counts[bisect_left(self._bounds, value)] += 1
        counts[-1] += value

    def metric(self) -> Metric:
        metric = HistogramMetricFamily(self._name, self._help, labels=self._labels)
        for values, (*counts, total) in self._counts.items():
            below = 0
            buckets = []
            for bound, count in zip((*self._bounds, None), counts, strict=True):
                below += count
                le = "+Inf" if bound is None else str(bound / self._unit)
                buckets.append((le, float(below)))
            metric.add_metric(values, buckets, total / self._unit)
        return metric
