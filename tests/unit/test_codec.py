"""Every kind of event is told back as it was, and what is not understood is refused."""

import hashlib
import json
from typing import Any, get_args

import pytest
from histories import EDGE3, EVERYTHING, T0, USAGE, Watch, at, ended, lines
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.canonical import canonical, canonical_plain
from controlplane.clock import NS_PER_S
from controlplane.codec import Codec, Record
from controlplane.enforcement import Flow, Usage
from controlplane.entries import NO_ENTRY, UTC_CLOCK, Chain, EntryError, entry_digest
from controlplane.facts import Acknowledged, PolicySet, Started, UeMoved, UplinkHeld, UplinkResumed
from controlplane.five_qi import FIVE_QIS
from controlplane.fleet import (
    AnchorDeregistered,
    AnchorDraining,
    AnchorFailed,
    AnchorRecovered,
    AnchorRegistered,
)
from controlplane.intent import MAX_DURATION_MS, MIN_DURATION_MS, Intent
from controlplane.lease import (
    Committed,
    DrainStarted,
    Ended,
    EndReason,
    Prepared,
    Renewed,
    Terms,
)
from controlplane.merkle import leaf_hash
from controlplane.policy import Arp, Policy

NAMES = ("lease_id", "session_id", "cause", "tenant", "ue", "aisi", "qos_profile")
NUMBERS = ("epoch", "downlink_bps", "uplink_bps", "priority_level")

texts = st.text('aZ09é漢_.:- "\\\n\U0001f600', max_size=12)
names = st.text("aZ09é漢_.:-", min_size=1, max_size=12)
instants = st.integers(T0, T0 + 10**9 * NS_PER_S)
counts = st.integers(0, 2**53 - 1)
numbers = st.floats(0, 1e9)
intents = st.builds(
    lambda **members: Intent.model_validate({k: v for k, v in members.items() if v is not None}),
    task=st.sampled_from(["text-generation", "mask", "a-b-3"]),
    description=st.none() | texts,
    regions=st.lists(names, max_size=3),
    onPremises=st.booleans(),
    minTrustTier=st.integers(0, 10),
    maxLatencyMs=st.none() | st.floats(0, 3_600_000, exclude_min=True),
    minAccuracy=st.none() | st.floats(0, 1),
    maxCost=st.none() | numbers,
    qosProfile=st.none() | st.just("QOS_E"),
    durationMs=st.integers(MIN_DURATION_MS, MAX_DURATION_MS),
)
flows = st.one_of(
    st.builds(Flow, st.ip_addresses(v=4), st.ip_addresses(v=4)),
    st.builds(Flow, st.ip_addresses(v=6), st.ip_addresses(v=6)),
)
terms = st.builds(
    Terms,
    **dict.fromkeys(
        ("lease_id", "session_id", "cause", "tenant", "ue", "aisi", "qos_profile"), texts
    ),
    **{name: st.none() | texts for name in ("anchor", "cell", "request", "key")},
    **dict.fromkeys(NUMBERS, counts),
    flows=st.lists(flows, max_size=3).map(tuple),
    preemptible=st.booleans(),
    five_qi=st.sampled_from(sorted(FIVE_QIS)),
    max_downlink_bps=st.none() | counts,
    max_uplink_bps=st.none() | counts,
    intent=st.none() | intents,
)
usages = st.builds(
    Usage,
    uplink_packets=counts,
    uplink_bytes=counts,
    downlink_packets=counts,
    downlink_bytes=counts,
)
policies = st.builds(
    lambda **members: Policy.model_validate(members),
    tasks=st.none() | st.just(("text-generation",)),
    regions=st.none() | st.lists(names, max_size=2).map(tuple),
    max_sessions=st.none() | st.integers(0, 9),
    pages_per_s=st.none() | st.floats(0.001, 1e6),
    arp=st.none() | st.integers(1, 15).map(lambda level: Arp(priority_level=level)),
)
anchors = st.builds(
    lambda **changed: EDGE3.model_copy(update=changed),
    cost=numbers,
    path_rtt_ms=st.floats(0, 3_600_000),
    path_rtt_ms_from=st.dictionaries(names, st.floats(0, 3_600_000), max_size=3),
    memory_mb=st.none() | st.integers(0, 9),
)
OF_KIND: dict[type, st.SearchStrategy[Record]] = {
    Prepared: st.builds(Prepared, terms, instants),
    Committed: st.builds(Committed, texts, instants),
    Renewed: st.builds(Renewed, texts, instants),
    DrainStarted: st.builds(DrainStarted, texts, instants),
    Ended: st.builds(Ended, texts, st.sampled_from(EndReason))
    | st.builds(Ended, texts, st.sampled_from(EndReason), usages, instants),
    Acknowledged: st.builds(Acknowledged, st.lists(texts, max_size=4).map(tuple), instants),
    Started: st.builds(Started, texts),
    UplinkHeld: st.builds(UplinkHeld, texts, instants),
    UplinkResumed: st.builds(UplinkResumed, texts),
    UeMoved: st.builds(UeMoved, texts, texts),
    PolicySet: st.builds(PolicySet, texts, policies),
    AnchorRegistered: st.builds(AnchorRegistered, anchors, texts),
    AnchorDraining: st.builds(AnchorDraining, texts),
    AnchorDeregistered: st.builds(AnchorDeregistered, texts),
    AnchorFailed: st.builds(AnchorFailed, texts, texts),
    AnchorRecovered: st.builds(AnchorRecovered, texts),
}


def test_every_kind_is_tried() -> None:
    assert set(OF_KIND) == set(get_args(Record))
    assert {type(event) for _, events in EVERYTHING for event in events} == set(OF_KIND)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.one_of(*OF_KIND.values()), max_size=6))
def test_is_told_back(told: list[Record]) -> None:
    writer, reader = Chain(Watch()), Chain(UTC_CLOCK)  # type: ignore[arg-type]
    written = writer.lines(told)
    for line in written:
        assert b"\n" not in line
        writer.add(line)
    assert [reader.check(line).event for line in written] == told
    assert reader.tree.root() == writer.tree.root()


def test_an_entry_is_what_the_documentation_says() -> None:
    """Canonical, numbered, linked, and digested without its digest: computed by other means."""
    previous = NO_ENTRY
    for index, line in enumerate(lines(EVERYTHING)):
        members = json.loads(line)
        assert canonical(members) + b"\n" == line
        assert (members["index"], members["previous"]) == (index, previous.hex())
        digest = members.pop("digest")
        assert digest == hashlib.sha256(canonical(members)).hexdigest()
        previous = hashlib.sha256(b"\0" + line[:-1]).digest()


def test_nothing_is_written_that_is_none() -> None:
    members = Codec(UTC_CLOCK).encode(Ended("a", EndReason.EXPIRED))
    assert members == {"lease_id": "a", "reason": "EXPIRED"}


# What is refused


def forged(event: Record, **changes: Any) -> bytes:
    """A first entry whose digest is right, whatever it says; a value of None drops a member."""
    members = {
        **{"at": "2026-01-01T00:00:00.000000000Z", "index": 0, "previous": NO_ENTRY.hex()},
        **{"type": type(event).__name__},
        **json.loads(canonical_plain(Codec(UTC_CLOCK).encode(event))),
    }
    for path, value in changes.items():
        *outer, name = path.split("__")
        where = members
        for part in outer:
            where = where[part]
        if value is None:
            del where[name]
        else:
            where[name] = value
    return canonical({**members, "digest": entry_digest(members)})


PREPARED = Prepared(
    Terms(
        **dict.fromkeys(
            ("lease_id", "session_id", "cause", "tenant", "ue", "aisi", "qos_profile"), "x"
        ),
        **dict.fromkeys(NUMBERS, 1),
        anchor="edge1",
        cell=None,
        preemptible=True,
        flows=(),
        intent=Intent(task="text-generation"),
    ),
    T0,
)
COUNTED = ended("a", EndReason.RELEASED, 1)


def test_what_is_right_is_read() -> None:
    for event in (PREPARED, COUNTED):
        assert Chain(UTC_CLOCK).check(forged(event)).event == event
    assert Ended("a", EndReason.RELEASED, USAGE, at(1)) == COUNTED


@pytest.mark.parametrize(
    ("event", "changes"),
    [
        (PREPARED, {"type": "Granted"}),
        (PREPARED, {"type": 1}),
        (PREPARED, {"extra": 1}),
        (PREPARED, {"terms__extra": 1}),
        (PREPARED, {"terms__intent__extra": 1}),
        (PREPARED, {"terms__intent__maxLatencyMs": "50"}),
        (PREPARED, {"terms__intent": []}),
        (PREPARED, {"terms__epoch": "1"}),
        (PREPARED, {"terms__epoch": True}),
        (PREPARED, {"terms__preemptible": 1}),
        (PREPARED, {"terms__cell": 1}),
        (PREPARED, {"terms__ue": None}),
        (PREPARED, {"terms__flows": [["10.45.0.1", "::1"]]}),
        (PREPARED, {"terms__flows": [[1, 2]]}),
        (PREPARED, {"terms__flows": [["10.45.0.1"]]}),
        (PREPARED, {"until": "2026-01-01T00:00:00+00:00"}),
        (PREPARED, {"until": "2026-02-30T00:00:00Z"}),
        (PREPARED, {"until": 5}),
        (PREPARED, {"until": None}),
        (PREPARED, {"at": "now"}),
        (PREPARED, {"index": False}),
        (PREPARED, {"index": 1}),
        (PREPARED, {"previous": "00"}),
        (COUNTED, {"reason": "BORED"}),
        (COUNTED, {"usage__uplink_bytes": -1}),
        (COUNTED, {"usage__uplink_bytes": 1.5}),
        (COUNTED, {"usage__uplink_bytes": None}),
        (COUNTED, {"usage__dropped": 1}),
        (COUNTED, {"usage": None}),
        (COUNTED, {"counted": None}),
        (Acknowledged(("a",), T0), {"leases": "abc"}),
        (Acknowledged(("a",), T0), {"leases": [1]}),
        (PolicySet("x", Policy()), {"policy__max_sessions": -1}),
        (AnchorRegistered(EDGE3, "x"), {"anchor__slots": 0}),
    ],
)
def test_what_is_not_understood_is_refused(event: Record, changes: dict[str, Any]) -> None:
    chain = Chain(UTC_CLOCK)
    with pytest.raises(EntryError):
        chain.check(forged(event, **changes))
    assert chain.tree.size == 0


@pytest.mark.parametrize(
    "line",
    [
        *(b"", b"{}", b"[]", b"1", b"null", b"\xff", b'{"digest":1}', b'{"digest":"?"}'),
        b"[" * 100_000,
        b'{"a":' * 100_000,
        forged(PREPARED)[:-1],
        forged(PREPARED) + b"\n",
        b" " + forged(PREPARED),
        forged(PREPARED).replace(b'"epoch":1', b'"epoch":1.0'),
        forged(PREPARED).replace(b'"epoch":1', b'"epoch":1,"epoch":1'),
        forged(PREPARED).replace(b"edge1", rb"\u0065dge1"),
        forged(PREPARED, terms__epoch=2**53 - 1).replace(b"9007199254740991", b"9007199254740992"),
    ],
)
def test_what_is_no_entry_is_refused(line: bytes) -> None:
    """Also what means the same, but is not canonical; its digest does not matter."""
    with pytest.raises(EntryError):
        Chain(UTC_CLOCK).check(line)


def redigested(line: bytes) -> bytes:
    """The same line with the digest that its other bytes have."""
    before, _, after = line.partition(b'"digest":"')
    after = after[66:]
    digest = hashlib.sha256(before + after).hexdigest().encode()
    return b'%s"digest":"%s",%s' % (before, digest, after)


@pytest.mark.parametrize(
    ("what", "by"),
    [(b'"epoch":1', b'"epoch":1.0'), (b"edge1", rb"\u0065dge1"), (b"{", b"{ "), (b"}", b"} ")],
)
def test_only_the_canonical_form_is_an_entry(what: bytes, by: bytes) -> None:
    """The digest does not tell: it is over the very bytes."""
    sound = forged(PREPARED)
    assert redigested(sound) == sound
    with pytest.raises(EntryError, match="canonical"):
        Chain(UTC_CLOCK).check(redigested(sound.replace(what, by, 1)))


def test_behind_damage_the_links_are_checked_on() -> None:
    log = [line[:-1] for line in lines(EVERYTHING)[:4]]
    chain = Chain(UTC_CLOCK)
    chain.check(log[0])
    with pytest.raises(EntryError) as refused:
        chain.check(log[1][:-1])
    assert refused.value.index is None
    chain.skip(log[1][:-1], None)
    assert chain.check(log[2]).index == 2
    with pytest.raises(EntryError) as refused:
        chain.check(log[2])
    assert refused.value.index == 2
    chain.skip(log[2], 2)
    with pytest.raises(EntryError, match="not linked"):
        chain.check(redigested(log[3].replace(leaf_hash(log[2]).hex().encode(), b"0" * 64)))
