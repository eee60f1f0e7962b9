"""Resolution: from an intent to a ranked list of candidates, and why each other was excluded.

Hard constraints first: a candidate that breaks one is excluded, with the name of the first that it
breaks. What is left is ranked by a score; lower is better:

    score = latency_ms / LATENCY_SCALE_MS + cost / COST_SCALE + load + TEXT_SCALE * (1 - relevance)

where latency is the path's round trip plus the service time, cost is per 1,000 requests, load is
the larger of the fraction of slots in use and what the anchor reports, and relevance (0 to 1) is
how well the service fits a description in free text; without one the last term is left out. Each
scale is what weighs as much as an idle anchor filling up entirely. Ties go to the anchor's name, so
that the choice is reproducible.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from controlplane.catalogue import Anchor, Catalogue, Hosting, Service
from controlplane.intent import Intent
from controlplane.values import value

LATENCY_SCALE_MS = 100.0
COST_SCALE = 10.0
TEXT_SCALE = 1.0


class AnchorState(StrEnum):
    """Whether an anchor takes sessions."""

    UP = "UP"
    DRAINING = "DRAINING"
    DOWN = "DOWN"


@value(frozen=True, slots=True)
class AnchorView:
    """An anchor as it is now."""

    anchor: Anchor
    slots_used: int
    state: AnchorState
    load: float  # 0 to 1, as it reports; 0 if it does not
    latency_ms: float | None  # of a request there, measured; None: as its hosting expects
    ready_aisis: frozenset[str] | None  # None: it does not say, and must be asked


@value(frozen=True, slots=True)
class Candidate:
    """A service at an anchor that satisfies every hard constraint."""

    service: Service
    anchor: Anchor
    latency_ms: float
    score: float
    ready: bool | None  # whether the anchor has said so; None: it must be asked


@value(frozen=True, slots=True)
class Exclusion:
    """A service at an anchor that does not, and which constraint says so."""

    aisi: str
    anchor: str
    constraint: str
    detail: str


@value(frozen=True, slots=True)
class Resolution:
    """Candidates, best first, and exclusions.

    `full` would be candidates if they had a slot: pre-emption may give them one. They are among
    the exclusions too.
    """

    candidates: tuple[Candidate, ...]
    excluded: tuple[Exclusion, ...]
    full: tuple[Candidate, ...]


@dataclass(slots=True)
class _Offer:
    catalogue: Catalogue
    service: Service
    view: AnchorView
    anchor: Anchor
    hosting: Hosting
    latency_ms: float


_Constraint = Callable[[Intent, _Offer], str | None]
Extra = Callable[[Service, Anchor], tuple[str, str] | None]
Rank = Callable[[Catalogue, str, Sequence[Service]], Sequence[float]]


def _region(intent: Intent, offer: _Offer) -> str | None:
    if intent.regions and offer.anchor.region not in intent.regions:
        return f"{offer.anchor.region} is not among {', '.join(intent.regions)}"
    return None


def _premises(intent: Intent, offer: _Offer) -> str | None:
    if intent.on_premises and not (
        offer.anchor.on_premises and offer.catalogue.is_operator(offer.anchor.provider)
    ):
        return "is not on the operator's premises"
    return None


def _trust_tier(intent: Intent, offer: _Offer) -> str | None:
    if offer.anchor.trust_tier < intent.min_trust_tier:
        return f"tier {offer.anchor.trust_tier}, asked for {intent.min_trust_tier} or more"
    return None


def _latency(intent: Intent, offer: _Offer) -> str | None:
    if intent.max_latency_ms is not None and offer.latency_ms > intent.max_latency_ms:
        return f"{offer.latency_ms:g} ms expected, at most {intent.max_latency_ms:g} ms allowed"
    return None


def _rate(intent: Intent, offer: _Offer) -> str | None:
    wanted, has = intent.min_rate_rps, offer.hosting.rate_rps
    if wanted is not None and (has is None or has < wanted):
        said = "unknown" if has is None else f"{has:g}"
        return f"{said} requests/s, asked for {wanted:g} or more"
    return None


def _accuracy(intent: Intent, offer: _Offer) -> str | None:
    if intent.min_accuracy is None:
        return None
    model = offer.catalogue.model_of(offer.service)
    has = None if model is None else model.accuracy
    if has is None or has < intent.min_accuracy:
        said = "unknown" if has is None else f"{has:g}"
        return f"accuracy {said}, asked for {intent.min_accuracy:g} or more"
    return None


def _cost(intent: Intent, offer: _Offer) -> str | None:
    if intent.max_cost is not None and offer.anchor.cost > intent.max_cost:
        return f"costs {offer.anchor.cost:g}, at most {intent.max_cost:g} allowed"
    return None


# Constraints of the intent: name, the member that asks for it, and the check. The anchor's state
# comes before them; its readiness, the tenant's policy and the capacity come after.
CONSTRAINTS: tuple[tuple[str, str, _Constraint], ...] = (
    ("region", "regions", _region),
    ("premises", "on_premises", _premises),
    ("trustTier", "min_trust_tier", _trust_tier),
    ("latency", "max_latency_ms", _latency),
    ("rate", "min_rate_rps", _rate),
    ("accuracy", "min_accuracy", _accuracy),
    ("cost", "max_cost", _cost),
)
CAPACITY = "capacity"  # comes last: what is excluded by it alone is `full`


def resolve(
    catalogue: Catalogue,
    intent: Intent,
    anchors: Iterable[AnchorView],
    *,
    only_aisi: str | None = None,
    not_anchor: str | None = None,
    unready: bool = False,
    cell: str | None = None,
    extra: Extra | None = None,
    rank: Rank | None = None,
) -> Resolution:
    """Rank what can serve an intent now.

    `only_aisi` and `not_anchor` narrow a relocation: the same service, somewhere else. `unready`:
    also anchors that do not say they are ready, for who can wait until they are. `cell`: where the
    UE is. `extra` returns a constraint and a detail to exclude something else by; `rank`, the
    relevance of services to a description.
    """
    services = [
        service
        for service in catalogue.services_for(intent.task)
        if only_aisi is None or service.aisi == only_aisi
    ]
    views = [view for view in anchors if view.anchor.name != not_anchor]
    text = dict.fromkeys((service.aisi for service in services), 0.0)
    if intent.description is not None and rank is not None and len(services) > 1:
        for service, relevance in zip(
            services, rank(catalogue, intent.description, services), strict=True
        ):
            text[service.aisi] = TEXT_SCALE * (1 - relevance)
    constraints = [
        (name, constraint)
        for name, member, constraint in CONSTRAINTS
        if member in intent.model_fields_set
    ]
    candidates: list[Candidate] = []
    full: list[Candidate] = []
    excluded: list[Exclusion] = []
    for service in services:
        aisi = service.aisi
        for view in views:
            anchor = view.anchor
            hosting = anchor.hosting(aisi)
            if hosting is None:
                continue
            path_ms = anchor.path_rtt_ms
            if cell is not None and anchor.path_rtt_ms_from:
                path_ms = anchor.path_rtt_ms_from.get(cell, path_ms)
            measured_ms = view.latency_ms
            latency_ms = path_ms + (hosting.service_time_ms if measured_ms is None else measured_ms)
            broken = None
            if view.state is not AnchorState.UP:
                broken = "state", f"is {view.state}"
            elif constraints:
                offer = _Offer(catalogue, service, view, anchor, hosting, latency_ms)
                broken = _broken(constraints, intent, offer)
            said = view.ready_aisis is not None and aisi in view.ready_aisis
            if broken is None and view.ready_aisis is not None and not (said or unready):
                broken = "readiness", f"does not say that {aisi} is ready"
            if broken is None and extra is not None:
                broken = extra(service, anchor)
            if broken:
                excluded.append(Exclusion(aisi, anchor.name, *broken))
                continue
            load = max(view.slots_used / anchor.slots, view.load)
            score = latency_ms / LATENCY_SCALE_MS + anchor.cost / COST_SCALE + load + text[aisi]
            candidate = Candidate(service, anchor, latency_ms, score, True if said else None)
            if view.slots_used < anchor.slots:
                candidates.append(candidate)
            else:
                full.append(candidate)
                detail = f"all {anchor.slots} slots are taken"
                excluded.append(Exclusion(aisi, anchor.name, CAPACITY, detail))
    for found in (candidates, full):
        found.sort(key=_order)
    return Resolution(tuple(candidates), tuple(excluded), tuple(full))


def _broken(
    constraints: Sequence[tuple[str, _Constraint]], intent: Intent, offer: _Offer
) -> tuple[str, str] | None:
    for name, constraint in constraints:
        detail = constraint(intent, offer)
        if detail is not None:
            return name, detail
    return None


def _order(candidate: Candidate) -> tuple[float, str]:
    return candidate.score, candidate.anchor.name
