"""Histories to audit: events at instants, and the evidence log that a controller makes of them."""

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address

from controlplane.catalogue import Anchor
from controlplane.clock import NS_PER_S
from controlplane.codec import Record
from controlplane.enforcement import Flow, Usage
from controlplane.entries import Chain, Entry
from controlplane.facts import Acknowledged, PolicySet, Started, UeMoved, UplinkHeld, UplinkResumed
from controlplane.fleet import (
    AnchorDeregistered,
    AnchorDraining,
    AnchorFailed,
    AnchorRecovered,
    AnchorRegistered,
)
from controlplane.intent import Intent
from controlplane.lease import (
    Committed,
    DrainStarted,
    Ended,
    EndReason,
    Prepared,
    Renewed,
    Terms,
)
from controlplane.policy import Policy

T0 = 1_760_000_000 * NS_PER_S
INTENT = Intent.model_validate({"task": "text-generation", "maxLatencyMs": 50.0})
USAGE = Usage(uplink_packets=10, uplink_bytes=1_000, downlink_packets=20, downlink_bytes=2_000)
EDGE3 = Anchor.model_validate(
    {
        "name": "edge3",
        "provider": "acme",
        "region": "north",
        "trustTier": 2,
        "slots": 4,
        "cost": 1.5,
        "hosts": [{"aisi": "chat", "serviceTimeMs": 20.0}],
    }
)
FLOWS = (
    Flow(IPv4Address("10.45.0.1"), IPv4Address("198.18.0.1")),
    Flow(IPv6Address("fd00:45::1"), IPv6Address("fd00:a151::1")),
)

Write = tuple[float, Sequence[Record]]  # seconds after T0, what became durable then


def at(seconds: float) -> int:
    return T0 + round(seconds * NS_PER_S)


def terms(lease: str = "a", epoch: int = 1, session: str = "s", **others: object) -> Terms:
    fields: dict[str, object] = {
        "lease_id": lease,
        "session_id": session,
        "cause": "PAGE",
        "tenant": "clinic",
        "ue": "ue1",
        "aisi": "chat",
        "anchor": "edge1",
        "flows": FLOWS,
        "epoch": epoch,
        "qos_profile": "QOS_E",
        "cell": "gnb1",
        "downlink_bps": 1_000_000,
        "uplink_bps": 500_000,
        "priority_level": 8,
        "preemptible": True,
        "intent": INTENT,
    }
    return Terms(**{**fields, **others})  # type: ignore[arg-type]


def prepared(
    lease: str = "a", epoch: int = 1, session: str = "s", *, until: float = 99, **others: object
) -> Prepared:
    return Prepared(terms(lease, epoch, session, **others), at(until))


def committed(lease: str = "a", until: float = 60) -> Committed:
    return Committed(lease, at(until))


def renewed(lease: str = "a", until: float = 90) -> Renewed:
    return Renewed(lease, at(until))


def drained(lease: str = "a", until: float = 11) -> DrainStarted:
    return DrainStarted(lease, at(until))


def ended(lease: str, reason: EndReason, counted: float | None = None) -> Ended:
    if counted is None:
        return Ended(lease, reason)
    return Ended(lease, reason, USAGE, at(counted))


def acknowledged(*leases: str, when: float) -> Acknowledged:
    return Acknowledged(leases, at(when))


def entries(writes: Sequence[Write]) -> list[Entry]:
    """Return what an auditor reads, if the log is sound."""
    stamped = [(seconds, event) for seconds, events in writes for event in events]
    return [Entry(index, at(when), event) for index, (when, event) in enumerate(stamped)]


class Watch:
    """A clock (`controlplane.clock.Clock`) that shows what it is set to; its epoch is Unix's."""

    now = T0

    def now_ns(self) -> int:
        return self.now

    def to_unix_ns(self, monotonic_ns: int) -> int:
        return monotonic_ns

    def from_unix_ns(self, unix_ns: int) -> int:
        return unix_ns


def lines(writes: Sequence[Write]) -> list[bytes]:
    """Return the log of these writes, its lines ended."""
    clock, made = Watch(), []
    chain = Chain(clock)  # type: ignore[arg-type]
    for seconds, events in writes:
        clock.now = at(seconds)
        for line in chain.lines(events):
            chain.add(line)
            made.append(line + b"\n")
    return made


PAGE: list[Write] = [(0, [prepared()]), (1, [committed()]), (1.1, [acknowledged("a", when=1.05)])]
MOVE: list[Write] = [
    *PAGE,
    (9, [prepared("b", 2, until=14, cause="REQUEST")]),
    (10, [committed("b"), drained("a")]),
    (11, [acknowledged("b", when=10.1), ended("a", EndReason.RELOCATED, 10.98)]),
]
# A bit of everything: six sessions, each of which keeps every rule.
EVERYTHING: list[Write] = [
    (-3, [Started("first")]),
    (-2, [AnchorRegistered(EDGE3, "acme"), PolicySet("clinic", Policy(max_sessions=9))]),
    *MOVE,  # session s, of ue1
    (20, [renewed("b", 90), prepared("c", 1, "t", ue="ue2"), committed("c", 80)]),
    (20.1, [acknowledged("c", when=20.05), UeMoved("ue2", "gnb2"), AnchorFailed("edge1", "dead")]),
    # a target that did not get ready in time
    (20.2, [UplinkHeld("b", at(22))]),
    (20.25, [UplinkResumed("b")]),
    # recovery: its anchor is dead
    (
        20.3,
        [
            prepared("d", 2, "t", ue="ue2", cause="FAILURE", anchor="edge2"),
            committed("d", 80),
            ended("c", EndReason.ANCHOR_FAILED, 20.3),
        ],
    ),
    (20.4, [acknowledged("d", when=20.35), AnchorRecovered("edge1")]),
    # QoS alone, then taken for somebody more important
    (
        30,
        [
            prepared("e", 1, "u", ue="ue3", anchor=None, intent=None, request="{}", key="k"),
            committed("e", 80),
        ],
    ),
    (
        31,
        [
            ended("e", EndReason.PREEMPTED, 31),
            prepared("f", 1, "v", ue="ue4", priority_level=2, preemptible=False),
            committed("f", 80),
        ],
    ),
    # no anchor of its service is left: another service
    (40, [AnchorDraining("edge2"), AnchorDeregistered("edge3")]),
    (41, [prepared("g", 1, "w", ue="ue2", aisi="ears", cause="DRAIN"), committed("g", 80)]),
    (41.1, [acknowledged("f", "g", when=41.05), ended("d", EndReason.REPAGED, 41.1)]),
    # one that did not get ready, one that the kernel refused
    (50, [prepared("h", 1, "x", ue="ue5", until=52), ended("h", EndReason.ABORTED)]),
    (51, [prepared("i", 2, "y", ue="ue5"), committed("i", 80)]),
    (51.1, [ended("i", EndReason.NOT_ENFORCED)]),
    # a crash; what was over meanwhile has no counts
    (85, [Started("second"), *(ended(lease, EndReason.EXPIRED) for lease in "fg")]),
    (90.01, [ended("b", EndReason.EXPIRED, 89.97)]),
]
