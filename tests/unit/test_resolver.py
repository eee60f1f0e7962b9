"""Hard constraints exclude by name; what is left is ranked by the documented score."""

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.catalogue import Anchor, Catalogue
from controlplane.intent import Intent
from controlplane.resolver import AnchorState, AnchorView, Resolution, resolve

TASK = "text-generation"


def anchor(name: str, *, serves: str = "chat", ms: float = 20, **members: Any) -> dict[str, Any]:
    usual = {"region": "north", "trust_tier": 3, "slots": 4, "cost": 2, "path_rtt_ms": 0}
    hosts = [{"aisi": serves, "service_time_ms": ms, "rate_rps": 50}]
    return {"name": name, "hosts": hosts, **usual, **members}


def service(aisi: str, number: int, task: str = TASK, model: str = "m") -> dict[str, Any]:
    addresses = {"address4": f"198.18.0.{number}", "address6": f"fd00:a151::{number}"}
    return {"aisi": aisi, "task": task, "model": model, **addresses}


def catalogue(*anchors: dict[str, Any]) -> Catalogue:
    return Catalogue.model_validate(
        {
            "qos_profiles": [{"name": "QOS_E"}],
            "providers": [{"name": "operator", "operator": True}, {"name": "guest"}],
            "models": [
                {"name": "m", "task": TASK, "accuracy": 0.7},
                {"name": "w", "task": "asr"},
            ],
            "services": [service("chat", 1), service("talk", 2), service("ears", 3, "asr", "w")],
            "anchors": anchors,
        }
    )


def ask(
    *anchors: dict[str, Any],
    used: Mapping[str, int] | None = None,
    only: dict[str, Any] | None = None,
    live: dict[str, Any] | None = None,
    **members: Any,
) -> Resolution:
    known, intent = catalogue(*anchors), Intent.model_validate({"task": TASK, **members})
    return resolve(known, intent, views(known, used or {}, **(live or {})), **(only or {}))


def views(known: Catalogue, used: Mapping[str, int], **live: Any) -> list[AnchorView]:
    """Every anchor as it is, all in the same condition."""
    usual = {"state": AnchorState.UP, "load": 0.0, "latency_ms": None, "ready_aisis": None}
    return [
        AnchorView(anchor=anchor, slots_used=used.get(anchor.name, 0), **{**usual, **live})
        for anchor in known.anchors
    ]


def names(resolution: Resolution) -> list[str]:
    return [candidate.anchor.name for candidate in resolution.candidates]


# Each constraint, just kept and just broken.
@pytest.mark.parametrize(
    ("members", "offer", "used", "broken"),
    [
        ({"regions": ["south", "north"]}, {}, 0, None),
        ({"regions": ["south"]}, {}, 0, ("region", "north is not among south")),
        ({"minTrustTier": 3}, {}, 0, None),
        ({"minTrustTier": 4}, {}, 0, ("trustTier", "tier 3, asked for 4 or more")),
        ({"maxLatencyMs": 50.0}, {"path_rtt_ms": 30}, 0, None),
        (
            {"maxLatencyMs": 49.9},
            {"path_rtt_ms": 30},
            0,
            ("latency", "50 ms expected, at most 49.9 ms allowed"),
        ),
        ({"maxCost": 2.0}, {}, 0, None),
        ({"maxCost": 1.5}, {}, 0, ("cost", "costs 2, at most 1.5 allowed")),
        ({"maxCost": 0.0}, {"cost": 0}, 0, None),
        ({"minRateRps": 50.0}, {}, 0, None),
        ({"minRateRps": 51.0}, {}, 0, ("rate", "50 requests/s, asked for 51 or more")),
        ({"minAccuracy": 0.7}, {}, 0, None),
        ({"minAccuracy": 0.8}, {}, 0, ("accuracy", "accuracy 0.7, asked for 0.8 or more")),
        ({"onPremises": True}, {}, 0, None),
        (
            {"onPremises": True},
            {"on_premises": False},
            0,
            ("premises", "is not on the operator's premises"),
        ),
        (
            {"onPremises": True},
            {"provider": "guest"},
            0,
            ("premises", "is not on the operator's premises"),
        ),
        ({}, {}, 3, None),
        ({}, {}, 4, ("capacity", "all 4 slots are taken")),
    ],
)
def test_constraint(
    members: dict[str, Any], offer: dict[str, Any], used: int, broken: tuple[str, str] | None
) -> None:
    resolution = ask(anchor("a", **offer), used={"a": used}, **members)
    excluded = [(e.aisi, e.anchor, e.constraint, e.detail) for e in resolution.excluded]
    if broken is None:
        assert (names(resolution), excluded) == (["a"], [])
    else:
        assert (names(resolution), excluded) == ([], [("chat", "a", *broken)])


@pytest.mark.parametrize(
    ("live", "broken"),
    [
        ({"state": AnchorState.DRAINING}, ("state", "is DRAINING")),
        ({"state": AnchorState.DOWN}, ("state", "is DOWN")),
        ({"ready_aisis": frozenset({"talk"})}, ("readiness", "does not say that chat is ready")),
        ({"latency_ms": 90.0}, ("latency", "90 ms expected, at most 50 ms allowed")),
    ],
)
def test_what_an_anchor_reports_counts(live: dict[str, Any], broken: tuple[str, str]) -> None:
    resolution = ask(anchor("a"), live=live, maxLatencyMs=50.0)
    assert [(e.constraint, e.detail) for e in resolution.excluded] == [broken]
    assert not resolution.candidates


def test_an_anchor_that_is_only_full_can_be_told_from_one_that_does_not_fit() -> None:
    anchors = [anchor("a", cost=3), anchor("b"), anchor("c", trust_tier=0), anchor("d")]
    resolution = ask(*anchors, used={"a": 4, "b": 4, "c": 4}, minTrustTier=1)
    assert names(resolution) == ["d"]
    assert [candidate.anchor.name for candidate in resolution.full] == ["b", "a"]


def test_readiness_is_said_or_must_be_asked() -> None:
    (silent,) = ask(anchor("a")).candidates
    (ready,) = ask(anchor("a"), live={"ready_aisis": frozenset({"chat"})}).candidates
    assert (silent.ready, ready.ready) == (None, True)


def test_the_path_from_a_cell_may_be_another() -> None:
    anchors = [anchor("a", path_rtt_ms_from={"gnb2": 30}), anchor("b", path_rtt_ms=10)]
    assert names(ask(*anchors, only={"cell": "gnb1"})) == ["a", "b"]
    assert names(ask(*anchors, only={"cell": "gnb2"})) == ["b", "a"]


def test_a_policy_excludes_with_its_own_constraint() -> None:
    def not_a(service: Any, anchor: Any) -> tuple[str, str] | None:
        return ("tenantRegion", "no") if anchor.name == "a" else None

    resolution = ask(anchor("a"), anchor("b"), only={"extra": not_a})
    assert names(resolution) == ["b"]
    assert [(e.anchor, e.constraint) for e in resolution.excluded] == [("a", "tenantRegion")]


def test_a_description_ranks_what_fits_and_nothing_else() -> None:
    def rank(known: Any, text: str, services: Any) -> list[float]:
        return [1.0 if service.aisi in text else 0.0 for service in services]

    anchors = [anchor("a", serves="talk"), anchor("b"), anchor("c", trust_tier=0)]
    wishes: dict[str, Any] = {"description": "chat", "minTrustTier": 1}
    assert names(ask(*anchors, only={"rank": rank}, **wishes)) == ["b", "a"]
    assert names(ask(*anchors, only={"rank": rank}, minTrustTier=1)) == ["a", "b"]


def test_score_is_the_documented_one() -> None:
    resolution = ask(anchor("a", ms=30, path_rtt_ms=20, cost=5, slots=8), used={"a": 2})
    (candidate,) = resolution.candidates
    assert candidate.latency_ms == 50
    assert candidate.score == pytest.approx(50 / 100 + 5 / 10 + 2 / 8)
    (busier,) = ask(anchor("a", slots=8), used={"a": 2}, live={"load": 0.5}).candidates
    assert busier.score == pytest.approx(20 / 100 + 2 / 10 + 0.5)


@pytest.mark.parametrize(
    ("worse", "used"),
    [({"path_rtt_ms": 1}, 0), ({"ms": 21}, 0), ({"cost": 2.1}, 0), ({}, 1)],
    ids=["path", "service time", "cost", "load"],
)
def test_each_part_of_the_score_decides(worse: dict[str, Any], used: int) -> None:
    assert names(ask(anchor("a", **worse), anchor("b"), used={"a": used})) == ["b", "a"]


def test_ties_go_to_the_name() -> None:
    assert names(ask(anchor("c"), anchor("a"), anchor("b"))) == ["a", "b", "c"]


def test_only_who_hosts_the_task_is_a_candidate() -> None:
    resolution = ask(anchor("a", serves="ears"), anchor("b", serves="talk"), anchor("c"))
    found = [(candidate.service.aisi, candidate.anchor.name) for candidate in resolution.candidates]
    assert found == [("talk", "b"), ("chat", "c")]
    assert not resolution.excluded


def test_a_relocation_is_to_the_same_service_somewhere_else() -> None:
    anchors = [anchor("a"), anchor("b", serves="talk"), anchor("c", trust_tier=0), anchor("d")]
    only = {"only_aisi": "chat", "not_anchor": "a"}
    resolution = ask(*anchors, only=only, minTrustTier=1)
    assert names(resolution) == ["d"]
    assert [(e.anchor, e.constraint) for e in resolution.excluded] == [("c", "trustTier")]


offers = st.lists(
    st.fixed_dictionaries(
        {
            "region": st.sampled_from(["north", "south"]),
            "trust_tier": st.integers(0, 10),
            "slots": st.integers(1, 3),
            "cost": st.floats(0, 20),
            "path_rtt_ms": st.floats(0, 200),
        }
    ),
    min_size=1,
    max_size=5,
)
wishes = st.fixed_dictionaries(
    {},
    optional={
        "regions": st.lists(st.sampled_from(["north", "south", "west"]), max_size=2),
        "minTrustTier": st.integers(0, 10),
        "maxLatencyMs": st.floats(1, 250),
        "maxCost": st.floats(0, 20),
    },
)


@given(offers, wishes, st.lists(st.integers(0, 3), min_size=5, max_size=5))
def test_every_anchor_is_either_fit_and_ranked_or_excluded(
    offered: list[dict[str, Any]], wanted: dict[str, Any], taken: list[int]
) -> None:
    anchors = [anchor(f"a{number}", **members) for number, members in enumerate(offered)]
    used = {f"a{number}": slots for number, slots in enumerate(taken)}
    resolution = ask(*anchors, used=used, **wanted)

    def fits(offer: Anchor) -> bool:
        regions = wanted.get("regions")
        return (
            (not regions or offer.region in regions)
            and offer.trust_tier >= wanted.get("minTrustTier", 0)
            and offer.path_rtt_ms + 20 <= wanted.get("maxLatencyMs", 1e9)
            and offer.cost <= wanted.get("maxCost", 1e9)
            and used[offer.name] < offer.slots
        )

    fit = {offer.name for offer in catalogue(*anchors).anchors if fits(offer)}
    assert set(names(resolution)) == fit
    assert sorted([*fit, *(e.anchor for e in resolution.excluded)]) == [a["name"] for a in anchors]
    scores = [candidate.score for candidate in resolution.candidates]
    assert scores == sorted(scores)
