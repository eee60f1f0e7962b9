"""How each kind of event is written in an entry of the evidence log, and read back.

Instants are RFC 3339 UTC in the log and on the process's own clock outside it. What is None is left
out. What is written here must stay readable: members may be added, none may change its meaning.
"""

from collections.abc import Callable
from functools import lru_cache
from ipaddress import ip_address
from operator import attrgetter, itemgetter
from typing import Any, TypeVar

import orjson
from orjson import Fragment

from controlplane.addresses import text_of
from controlplane.canonical import canonical
from controlplane.catalogue import Anchor
from controlplane.clock import Clock, parse_rfc3339, rfc3339
from controlplane.enforcement import Flow, Usage
from controlplane.facts import (
    Acknowledged,
    Fact,
    PolicySet,
    Started,
    UeMoved,
    UplinkHeld,
    UplinkResumed,
)
from controlplane.five_qi import BEST_EFFORT, FIVE_QIS
from controlplane.fleet import (
    AnchorDeregistered,
    AnchorDraining,
    AnchorEvent,
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
    Event,
    Prepared,
    Renewed,
    Terms,
)
from controlplane.policy import Policy

Record = Event | AnchorEvent | Fact
Members = dict[str, Any]
Kind = TypeVar("Kind")
_NAMES = ("lease_id", "session_id", "cause", "tenant", "ue", "aisi", "qos_profile")
_NUMBERS = ("epoch", "downlink_bps", "uplink_bps", "priority_level")
_OPTIONAL = ("anchor", "cell", "request", "key")
_OPTIONAL_NUMBERS = ("five_qi", "max_downlink_bps", "max_uplink_bps")
_COUNTS = ("uplink_packets", "uplink_bytes", "downlink_packets", "downlink_bytes")
_TERMS = frozenset(
    {*_NAMES, *_NUMBERS, *_OPTIONAL, *_OPTIONAL_NUMBERS, "preemptible", "flows", "intent"}
)
_COUNT_NAMES = frozenset(_COUNTS)
_ALWAYS = (*_NAMES, *_NUMBERS, "preemptible")
_always_of = attrgetter(*_ALWAYS)
_names_in, _numbers_in, _counts_in = (itemgetter(*names) for names in (_NAMES, _NUMBERS, _COUNTS))
_KNOWN = {
    kind: frozenset({"at", "digest", "index", "previous", "type", *members})
    for kind, members in {
        "Prepared": ("terms", "until"),
        "Committed": ("lease_id", "until"),
        "Renewed": ("lease_id", "until"),
        "DrainStarted": ("lease_id", "until"),
        "Ended": ("lease_id", "reason", "usage", "counted"),
        "Acknowledged": ("leases", "acknowledged"),
        "UplinkHeld": ("lease_id", "until"),
        "UplinkResumed": ("lease_id",),
        "Started": ("instance",),
        "UeMoved": ("ue", "cell"),
        "PolicySet": ("tenant", "policy"),
        "AnchorRegistered": ("anchor", "provider"),
        "AnchorDraining": ("name",),
        "AnchorDeregistered": ("name",),
        "AnchorFailed": ("name", "why"),
        "AnchorRecovered": ("name",),
    }.items()
}


class Codec:
    """Between events and the members of entries."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._encoders: dict[type, Callable[[Any], Members]] = {
            Prepared: self._prepared,
            Committed: lambda e: {"lease_id": e.lease_id, "until": self._at(e.expires_ns)},
            Renewed: lambda e: {"lease_id": e.lease_id, "until": self._at(e.expires_ns)},
            DrainStarted: lambda e: {"lease_id": e.lease_id, "until": self._at(e.until_ns)},
            Ended: self._ended,
            Acknowledged: lambda e: {
                "leases": e.lease_ids,
                "acknowledged": self._at(e.acknowledged_ns),
            },
            UplinkHeld: lambda e: {"lease_id": e.lease_id, "until": self._at(e.until_ns)},
            UplinkResumed: lambda e: {"lease_id": e.lease_id},
            Started: lambda e: {"instance": e.instance},
            UeMoved: lambda e: {"ue": e.ue, "cell": e.cell},
            PolicySet: lambda e: {
                "tenant": e.tenant,
                "policy": Fragment(canonical(e.policy.model_dump(mode="json"))),
            },
            AnchorRegistered: lambda e: {
                "anchor": Fragment(canonical(e.anchor.model_dump(mode="json"))),
                "provider": e.provider,
            },
            AnchorDraining: lambda e: {"name": e.name},
            AnchorDeregistered: lambda e: {"name": e.name},
            AnchorFailed: lambda e: {"name": e.name, "why": e.why},
            AnchorRecovered: lambda e: {"name": e.name},
        }
        self._decoders: dict[str, Callable[[Members], Record]] = {
            "Prepared": lambda m: Prepared(_terms(m["terms"]), self._instant(m["until"])),
            "Committed": lambda m: Committed(_text(m, "lease_id"), self._instant(m["until"])),
            "Renewed": lambda m: Renewed(_text(m, "lease_id"), self._instant(m["until"])),
            "DrainStarted": lambda m: DrainStarted(_text(m, "lease_id"), self._instant(m["until"])),
            "Ended": self._read_ended,
            "Acknowledged": lambda m: Acknowledged(
                _all(str, tuple(_typed(list, m["leases"]))),
                self._instant(m["acknowledged"]),
            ),
            "UplinkHeld": lambda m: UplinkHeld(_text(m, "lease_id"), self._instant(m["until"])),
            "UplinkResumed": lambda m: UplinkResumed(_text(m, "lease_id")),
            "Started": lambda m: Started(_text(m, "instance")),
            "UeMoved": lambda m: UeMoved(_text(m, "ue"), _text(m, "cell")),
            "PolicySet": lambda m: PolicySet(
                _text(m, "tenant"), Policy.model_validate(m["policy"])
            ),
            "AnchorRegistered": lambda m: AnchorRegistered(
                Anchor.model_validate(m["anchor"]), _text(m, "provider")
            ),
            "AnchorDraining": lambda m: AnchorDraining(_text(m, "name")),
            "AnchorDeregistered": lambda m: AnchorDeregistered(_text(m, "name")),
            "AnchorFailed": lambda m: AnchorFailed(_text(m, "name"), _text(m, "why")),
            "AnchorRecovered": lambda m: AnchorRecovered(_text(m, "name")),
        }

    def encode(self, event: Record) -> Members:
        """Return the members that say what happened, for `canonical_plain`: a new dict."""
        return self._encoders[type(event)](event)

    def decode(self, members: Members) -> Record:
        """Return the event that an entry's members tell of.

        Raises ValueError (pydantic's ValidationError is one), TypeError or KeyError.
        """
        kind = _text(members, "type")
        if kind not in self._decoders:
            raise ValueError(f"unknown type {kind!r}")
        _only(_KNOWN[kind], members)
        return self._decoders[kind](members)

    def _prepared(self, event: Prepared) -> Members:
        terms = event.terms
        members: Members = dict(zip(_ALWAYS, _always_of(terms), strict=True))
        members["flows"] = [(text_of(flow.ue), text_of(flow.service)) for flow in terms.flows]
        for name in (*_OPTIONAL, *_OPTIONAL_NUMBERS):
            value = getattr(terms, name)
            if value is not None:
                members[name] = value
        if terms.intent is not None:
            members["intent"] = Fragment(terms.intent.canonical)
        return {"terms": members, "until": self._at(event.prepare_until_ns)}

    def _ended(self, event: Ended) -> Members:
        members: Members = {"lease_id": event.lease_id, "reason": event.reason.value}
        if event.usage is not None:
            usage = event.usage
            members["usage"] = {name: getattr(usage, name) for name in _COUNTS}
            members["counted"] = self._at(event.counted_ns)
        return members

    def _read_ended(self, members: Members) -> Ended:
        lease_id, reason = _text(members, "lease_id"), EndReason(members["reason"])
        if "usage" not in members and "counted" not in members:
            return Ended(lease_id, reason)
        counts = _all(int, _counts_in(members["usage"]))
        _only(_COUNT_NAMES, members["usage"])
        if min(counts) < 0:
            raise ValueError("a count is negative")
        usage = Usage(**dict(zip(_COUNTS, counts, strict=True)))
        return Ended(lease_id, reason, usage, self._instant(members["counted"]))

    def _at(self, monotonic_ns: int) -> str:
        return rfc3339(self._clock.to_unix_ns(monotonic_ns))

    def _instant(self, text: str) -> int:
        return self._clock.from_unix_ns(parse_rfc3339(text))


def _terms(members: Members) -> Terms:
    _only(_TERMS, members)
    fields: Members = {
        name: _text(members, name) if name in members else None for name in _OPTIONAL
    }
    for name in _OPTIONAL_NUMBERS:  # entries of older versions do not have them: best effort
        if name in members:
            fields[name] = _typed(int, members[name])
    if fields.get("five_qi", BEST_EFFORT) not in FIVE_QIS:
        raise ValueError(f"there is no 5QI {fields['five_qi']}")
    fields.update(zip(_NAMES, _all(str, _names_in(members)), strict=True))
    fields.update(zip(_NUMBERS, _all(int, _numbers_in(members)), strict=True))
    return Terms(
        **fields,
        preemptible=_typed(bool, members["preemptible"]),
        flows=tuple(_flow(ue, service) for ue, service in _typed(list, members["flows"])),
        intent=_intent(orjson.dumps(members["intent"])) if "intent" in members else None,
    )


# Most entries are about few intents and few flows.


@lru_cache(maxsize=1_024)
def _intent(text: bytes) -> Intent:
    return Intent.model_validate(orjson.loads(text))


@lru_cache(maxsize=65_536)
def _flow(ue: str, service: str) -> Flow:
    return Flow(ip_address(_typed(str, ue)), ip_address(_typed(str, service)))


def _only(known: frozenset[str], members: Members) -> None:
    """Raise ValueError if there are members that nobody here knows the meaning of."""
    if not known.issuperset(members):
        raise ValueError(f"unknown members {', '.join(sorted(members.keys() - known))}")


def _all(kind: type[Kind], values: tuple[Any, ...]) -> tuple[Kind, ...]:
    for value in values:
        if type(value) is not kind:
            _typed(kind, value)
    return values


def _text(members: Members, name: str) -> str:
    return _typed(str, members[name])


def _typed(kind: type[Kind], value: object) -> Kind:
    if type(value) is not kind:
        raise TypeError(f"{value!r} is not of type {kind.__name__}")
    return value
