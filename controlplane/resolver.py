"""Resolution: from an intent to a ranked list of candidates, and why each other was excluded.

Hard constraints first: a candidate that breaks one is excluded, with the constraint's name. What
is left is ranked by a score; lower is better:

    score = latency_ms / LATENCY_SCALE_MS + cost / COST_SCALE + load

where latency is the expected path round trip plus the service time, cost is per 1,000 requests
and load is the fraction of the anchor's slots in use. Each scale is what weighs as much as an
idle anchor filling up entirely. Ties go to the anchor's name, so that the choice is reproducible.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from controlplane.catalogue import Anchor, Catalogue, Service
from controlplane.intent import Intent

LATENCY_SCALE_MS = 100.0
COST_SCALE = 10.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A service at an anchor that satisfies every hard constraint."""

    service: Service
    anchor: Anchor
    latency_ms: float
    score: float


@dataclass(frozen=True, slots=True)
class Exclusion:
    """A service at an anchor that does not, and which constraint says so."""

    aisi: str
    anchor: str
    constraint: str
    detail: str


@dataclass(frozen=True, slots=True)
class Resolution:
    """Candidates, best first, and exclusions."""

    candidates: tuple[Candidate, ...]
    excluded: tuple[Exclusion, ...]


@dataclass(frozen=True, slots=True)
class _Offer:
    service: Service
    anchor: Anchor
    latency_ms: float
    used: int


_Constraint = Callable[[Intent, _Offer], str | None]


def _region(intent: Intent, offer: _Offer) -> str | None:
    if intent.regions and offer.anchor.region not in intent.regions:
        return f"{offer.anchor.region} is not among {', '.join(intent.regions)}"
    return None


def _trust_tier(intent: Intent, offer: _Offer) -> str | None:
    if offer.anchor.trust_tier < intent.min_trust_tier:
        return f"tier {offer.anchor.trust_tier}, asked for {intent.min_trust_tier} or more"
    return None


def _latency(intent: Intent, offer: _Offer) -> str | None:
    if intent.max_latency_ms is not None and offer.latency_ms > intent.max_latency_ms:
        return f"{offer.latency_ms:g} ms expected, at most {intent.max_latency_ms:g} ms allowed"
    return None


def _cost(intent: Intent, offer: _Offer) -> str | None:
    if intent.max_cost is not None and offer.anchor.cost > intent.max_cost:
        return f"costs {offer.anchor.cost:g}, at most {intent.max_cost:g} allowed"
    return None


def _capacity(intent: Intent, offer: _Offer) -> str | None:
    if offer.used >= offer.anchor.slots:
        return f"all {offer.anchor.slots} slots are taken"
    return None


CONSTRAINTS: dict[str, _Constraint] = {
    "region": _region,
    "trustTier": _trust_tier,
    "latency": _latency,
    "cost": _cost,
    "capacity": _capacity,
}


def resolve(
    catalogue: Catalogue,
    intent: Intent,
    slots_used: Mapping[str, int],
    *,
    only_aisi: str | None = None,
    not_anchor: str | None = None,
) -> Resolution:
    """Rank what can serve an intent now.

    `slots_used`: by anchor name. `only_aisi` and `not_anchor` narrow a relocation: the same
    service, somewhere else.
    """
    candidates: list[Candidate] = []
    excluded: list[Exclusion] = []
    for service in catalogue.services:
        if service.task != intent.task or (only_aisi is not None and service.aisi != only_aisi):
            continue
        for anchor in catalogue.anchors:
            hosting = anchor.hosting(service.aisi)
            if hosting is None or anchor.name == not_anchor:
                continue
            used = slots_used.get(anchor.name, 0)
            offer = _Offer(service, anchor, anchor.path_rtt_ms + hosting.service_time_ms, used)
            for name, constraint in CONSTRAINTS.items():
                detail = constraint(intent, offer)
                if detail is not None:
                    excluded.append(Exclusion(service.aisi, anchor.name, name, detail))
                    break
            else:
                score = (
                    offer.latency_ms / LATENCY_SCALE_MS
                    + anchor.cost / COST_SCALE
                    + used / anchor.slots
                )
                candidates.append(Candidate(service, anchor, offer.latency_ms, score))
    candidates.sort(key=lambda candidate: (candidate.score, candidate.anchor.name))
    return Resolution(tuple(candidates), tuple(excluded))
