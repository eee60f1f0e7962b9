"""An intent is what it says or it is refused: with ValidationError, whatever was sent."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from controlplane.intent import MAX_BPS, MAX_DURATION_MS, MIN_DURATION_MS, Intent

TASK = "text-generation"
# The least and the most of each number; one step outside is refused.
NUMBERS: dict[str, tuple[float, float, float]] = {
    "minTrustTier": (0, 10, 1),
    "minAccuracy": (0.0, 1.0, 0.001),
    "maxCost": (0.0, 1e9, 1.0),
    "durationMs": (MIN_DURATION_MS, MAX_DURATION_MS, 1),
}
FULL: dict[str, Any] = {
    "task": TASK,
    "description": "short answers, in Sámi 🦌",
    "regions": ["north"],
    "onPremises": True,
    "minTrustTier": 2,
    "maxLatencyMs": 50,
    "minRateRps": 10.5,
    "minAccuracy": 0.7,
    "maxCost": 3,
    "requiredRates": {"downlinkBps": MAX_BPS, "uplinkBps": 1},
    "durationMs": 60_000,
}


def from_json(data: Any) -> Intent:
    return Intent.model_validate_json(json.dumps(data))


def parse(members: dict[str, Any]) -> Intent:
    """Parse an intent both ways that it comes in: as an object, and as JSON text."""
    text = json.dumps(members)
    intent = Intent.model_validate_json(text)
    assert Intent.model_validate(json.loads(text)) == intent
    return intent


def refused(members: dict[str, Any]) -> bool:
    for read in (Intent.model_validate, from_json):
        try:
            read(members)
        except ValidationError:
            continue
        return False
    return True


def test_an_intent_survives_being_written_to_the_log() -> None:
    for members in (FULL, {"task": TASK}, {"task": TASK, "qosProfile": "QOS_E"}):
        intent = parse(members)
        assert parse(intent.model_dump(mode="json", by_alias=True, exclude_none=True)) == intent


@pytest.mark.parametrize("member", NUMBERS)
def test_numbers_end_where_they_should(member: str) -> None:
    least, most, step = NUMBERS[member]
    for value in (least, most):
        parse({"task": TASK, member: value})
    for value in (least - step, most + step):
        assert refused({"task": TASK, member: value})


@pytest.mark.parametrize(
    "members",
    [
        {"qosProfile": "QOS_E", "requiredRates": {"downlinkBps": 1}},
        {"requiredRates": {}},
        {"requiredRates": {"downlinkBps": None, "uplinkBps": None}},
        {"requiredRates": {"downlinkBps": 0}},
        {"requiredRates": {"downlinkBps": MAX_BPS + 1}},
        {"requiredRates": {"downlinkBps": 1, "sidelinkBps": 1}},
        {"qosProfile": "QE"},
        {"qosProfile": "QOS E"},
        {"qosProfile": "Q" * 257},
        {"description": "x" * 1001},
        {"description": "\ud800"},
        {"regions": ["north"] * 65},
        {"regions": "north"},
        {"regions": [""]},
        {"maxLatencyMs": 0},
        {"maxLatencyMs": float("nan")},
        {"maxLatencyMs": float("inf")},
        {"maxCost": 10**400},
        {"minRateRps": 0},
        {"minRateRps": "10"},
        {"minTrustTier": 1.5},
        {"minTrustTier": True},
        {"onPremises": 1},
        {"durationMs": "60000"},
        {"min_trust_tier": 1},
        {"server": "edge1"},
        {"task": "Text Generation"},
        {"task": "x" * 65},
        {"task": None},
    ],
    ids=lambda members: json.dumps(members)[:50],
)
def test_what_an_intent_cannot_say(members: dict[str, Any]) -> None:
    assert refused({"task": TASK, **members})


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["downlinkBps", "uplinkBps"]) | st.text(max_size=8), inner, max_size=4
        )
    ),
    max_leaves=8,
)


def mutated(member: str) -> st.SearchStrategy[dict[str, Any]]:
    return values.map(lambda value: {**FULL, member: value})


@given(
    values
    | st.sampled_from([*FULL, "qosProfile", "more"]).flatmap(mutated)
    | st.dictionaries(st.sampled_from([*FULL, "qosProfile"]), values)
)
def test_any_json_is_an_intent_or_a_validation_error(data: Any) -> None:
    for read in (Intent.model_validate, from_json):
        try:
            intent = read(data)
        except ValidationError:
            continue
        assert parse(intent.model_dump(mode="json", by_alias=True, exclude_none=True)) == intent


@given(st.binary(max_size=200) | st.text(max_size=200))
def test_what_is_no_json_is_a_validation_error(text: bytes | str) -> None:
    with pytest.raises(ValidationError):
        Intent.model_validate_json(text)
