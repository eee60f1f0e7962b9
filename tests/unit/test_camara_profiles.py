"""CAMARA QoS Profiles: what is offered. All answers are checked by the definition."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from camara import DEVICE, ask, error
from hypothesis import given
from hypothesis import strategies as st
from served import Api

from controlplane.catalogue import QosProfile
from controlplane.northbound.camara_profiles import document, rate

UNITS = {"bps": 1, "kbps": 10**3, "Mbps": 10**6, "Gbps": 10**9, "Tbps": 10**12}


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with Api(tmp_path) as api:
        yield api


def names(api: Api, by: str = "clinic", **asked: Any) -> list[str]:
    answer = ask(api, "retrieveQosProfiles", asked, by=by)
    assert answer.status_code == 200, answer.text
    return [profile["name"] for profile in answer.json()]


def test_profiles_are_found_by_name_status_and_device(api: Api) -> None:
    assert names(api) == ["QOS_E", "QOS_P", "QOS_OLD"]
    assert names(api, status="DEPRECATED") == ["QOS_OLD"]
    assert names(api, name="QOS_P", status="ACTIVE", device=DEVICE) == ["QOS_P"]
    assert names(api, name="QOS_P", status="INACTIVE") == []
    assert names(api, name="NO_SUCH") == []
    assert names(api, by="ue1") == ["QOS_E", "QOS_P", "QOS_OLD"]


def test_one_is_read_by_name(api: Api) -> None:
    assert ask(api, "getQosProfile", of="QOS_E").json() == {
        "name": "QOS_E",
        "status": "ACTIVE",
        "minDuration": {"value": 1, "unit": "Seconds"},
        "maxDuration": {"value": 3600, "unit": "Seconds"},
        "priority": 8,
        "targetMinDownstreamRate": {"value": 1000, "unit": "kbps"},
        "packetDelayBudget": {"value": 300, "unit": "Milliseconds"},  # of 5QI 4
        "packetErrorLossRate": 6,
    }


def test_what_a_tenant_may_not_use_is_not_offered_to_it(api: Api) -> None:
    assert api.call("PUT", "/tenants/clinic/policy", {"qosProfiles": ["QOS_P"]}).is_success
    assert names(api) == ["QOS_P"]
    assert error(ask(api, "getQosProfile", of="QOS_E")) == (404, "NOT_FOUND")
    assert names(api, by="garage") == ["QOS_E", "QOS_P", "QOS_OLD"]


def test_every_attribute_has_its_place() -> None:
    shown = document(
        QosProfile(
            name="QOS_X",
            description="for tests",
            five_qi=4,
            guaranteed_downlink_bps=1_000,
            guaranteed_uplink_bps=2_000_000,
            max_downlink_bps=3_000_000_000,
            max_uplink_bps=4_000_000_000_000,
            packet_delay_budget_ms=20,
            jitter_ms=3,
            packet_error_loss_rate=6,
            min_duration_s=2,
            max_duration_s=3,
            priority_level=1,
        )
    )
    assert shown == {
        "name": "QOS_X",
        "status": "ACTIVE",
        "description": "for tests",
        "targetMinDownstreamRate": {"value": 1000, "unit": "bps"},
        "targetMinUpstreamRate": {"value": 2, "unit": "Mbps"},
        "maxDownstreamRate": {"value": 3, "unit": "Gbps"},
        "maxUpstreamRate": {"value": 4, "unit": "Tbps"},
        "packetDelayBudget": {"value": 20, "unit": "Milliseconds"},
        "jitter": {"value": 3, "unit": "Milliseconds"},
        "packetErrorLossRate": 6,
        "minDuration": {"value": 2, "unit": "Seconds"},
        "maxDuration": {"value": 3, "unit": "Seconds"},
        "priority": 1,
    }


@given(st.integers(0, 10**15))
def test_a_rate_is_never_told_too_high_nor_less_than_half(rate_bps: int) -> None:
    told = rate(rate_bps)
    assert 0 <= told["value"] <= 1024
    assert rate_bps / 2 <= told["value"] * UNITS[told["unit"]] <= rate_bps
