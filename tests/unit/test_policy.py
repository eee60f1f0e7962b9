"""What a policy forbids is refused with its cause; what it leaves out is free."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from controlplane.access_tokens import generate_secret
from controlplane.catalogue import Anchor
from controlplane.configfile import ConfigError
from controlplane.policy import (
    OPERATOR,
    Cause,
    Policy,
    RateLimiter,
    Tenant,
    Tenants,
    check_anchor,
    check_request,
    load_tenants,
)

S = 1_000_000_000


def anchor(region: str = "campus", trust_tier: int = 3) -> Anchor:
    return Anchor.model_validate(
        {
            "name": "edge1",
            "region": region,
            "trust_tier": trust_tier,
            "slots": 1,
            "cost": 1,
            "hosts": [{"aisi": "chat", "service_time_ms": 1}],
        }
    )


def request(policy: Policy, **changes: Any) -> tuple[str, str] | None:
    asked: dict[str, Any] = {"task": "ocr", "qos_profile": "QOS_E", "live_sessions": 5}
    return check_request(policy, **{**asked, **changes})


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Policy(), None),
        (Policy(regions=("campus", "city")), None),
        (Policy(regions=("city", "sea")), ("tenantRegion", "campus is not among .*: city, sea")),
        (Policy(regions=()), ("tenantRegion", "none")),
        (Policy(min_trust_tier=3, max_trust_tier=3), None),
        (Policy(min_trust_tier=4), ("tenantTrustTier", "tier 3, the tenant's are 4 to 10")),
        (Policy(max_trust_tier=2), ("tenantTrustTier", "tier 3, the tenant's are 0 to 2")),
    ],
)
def test_places(policy: Policy, expected: tuple[str, str] | None) -> None:
    explain(check_anchor(policy, anchor()), expected)


@pytest.mark.parametrize(
    ("policy", "changes", "expected"),
    [
        (Policy(), {"live_sessions": 10**9, "downlink_bps": 10**18}, None),
        (Policy(tasks=("ocr",), qos_profiles=("QOS_E",)), {}, None),
        (Policy(tasks=("chat", "ocr2")), {}, (Cause.TASK, "ocr is not among .*: chat, ocr2")),
        (Policy(tasks=()), {"task": None}, None),  # QoS alone is for no task
        (Policy(qos_profiles=()), {"task": None}, (Cause.QOS_PROFILE, "QOS_E .*: none")),
        (Policy(max_sessions=6), {}, None),
        (Policy(max_sessions=5), {}, (Cause.SESSIONS, "6 sessions; the tenant may have 5")),
        (Policy(max_sessions=0), {"live_sessions": 0}, (Cause.SESSIONS, "1 sessions")),
        (Policy(max_downlink_bps=10), {"downlink_bps": 10, "uplink_bps": 99}, None),
        (Policy(max_downlink_bps=10), {"downlink_bps": 11}, (Cause.BANDWIDTH, "11 .*downlink")),
        (Policy(max_uplink_bps=0), {"uplink_bps": 2000}, (Cause.BANDWIDTH, "2,000 bit/s uplink")),
    ],
)
def test_requests(
    policy: Policy, changes: dict[str, Any], expected: tuple[str, str] | None
) -> None:
    explain(request(policy, **changes), expected)


def explain(found: tuple[str, str] | None, expected: tuple[str, str] | None) -> None:
    if found is None or expected is None:
        assert found is expected
    else:
        assert found[0] == expected[0]
        assert re.search(expected[1], found[1]), found[1]


# Rate


def limited(rate_per_s: float, burst: int, name: str = "t") -> Tenant:
    return Tenant(name=name, policy=Policy(pages_per_s=rate_per_s, pages_burst=burst))


@given(
    rate_per_s=st.floats(min_value=0.001, max_value=1_000_000),
    burst=st.integers(min_value=1, max_value=20),
    pauses_ns=st.lists(
        st.integers(min_value=0, max_value=1000) | st.integers(min_value=0, max_value=30 * S),
        max_size=60,
    ),
)
@example(rate_per_s=3, burst=1, pauses_ns=[0] * 10)
def test_in_no_window_more_than_burst_and_rate(
    rate_per_s: float, burst: int, pauses_ns: list[int]
) -> None:
    limiter, tenant, now_ns, granted = RateLimiter(), limited(rate_per_s, burst), 0, []
    for pause_ns in pauses_ns:
        now_ns += pause_ns
        wait_s = limiter.admit(tenant, now_ns)
        if wait_s is not None:  # as early as can be
            now_ns += round(wait_s * S)
            assert limiter.admit(tenant, now_ns) is None
        granted.append(now_ns)
    numerator, denominator = rate_per_s.as_integer_ratio()
    for first, begin_ns in enumerate(granted):
        for count, end_ns in enumerate(granted[first:], start=1):
            assert (count - burst) * S * denominator <= (end_ns - begin_ns) * numerator


@given(
    rate_per_s=st.floats(min_value=0.01, max_value=100_000),
    burst=st.integers(min_value=1, max_value=20),
    asks=st.lists(st.integers(min_value=0, max_value=S), min_size=1, max_size=40),
)
def test_who_waits_as_told_is_admitted_and_no_sooner(
    rate_per_s: float, burst: int, asks: list[int]
) -> None:
    limiter, tenant, now_ns = RateLimiter(), limited(rate_per_s, burst), 0
    for pause_ns in asks:
        now_ns += pause_ns
        wait_s = limiter.admit(tenant, now_ns)
        if wait_s is None:
            continue
        assert 0 < wait_s <= 1 / rate_per_s + 1e-8
        wait_ns = round(wait_s * S)
        assert limiter.admit(tenant, now_ns + wait_ns - 1) is not None
        now_ns += wait_ns
        assert limiter.admit(tenant, now_ns) is None


def test_a_full_bucket_gives_its_burst_and_then_the_rate() -> None:
    limiter, tenant = RateLimiter(), limited(10, 5)
    assert [limiter.admit(tenant, 7 * S) for _ in range(6)] == [None] * 5 + [0.1]
    assert [limiter.admit(tenant, 7 * S + S // 10) for _ in range(2)] == [None, 0.1]
    assert [limiter.admit(tenant, 60 * S) for _ in range(6)] == [None] * 5 + [0.1]


def test_each_tenant_has_its_own_rate_and_the_operator_none() -> None:
    limiter = RateLimiter()
    one, other = limited(1, 1, "one"), limited(1, 1, "other")
    assert [limiter.admit(tenant, 0) for tenant in (one, other, one)] == [None, None, 1.0]
    assert {limiter.admit(OPERATOR, 0) for _ in range(1000)} == {None}


# The file

SECRET_HASH = generate_secret()[1]
FILE = f"""\
tenants:
  - name: clinic
    policy:
      tasks: [text-generation]
      regions: [campus]
      minTrustTier: 2
      maxSessions: 100
      pagesPerS: 20
      pages_burst: 40
      maxLeaseMs: 600000
      arp: {{priorityLevel: 3, preemptionCapability: true}}
    clients:
      - clientId: app
        secretHash: {SECRET_HASH}
        scopes: ["sessions:read"]
"""


def load(folder: Path, text: str) -> Tenants:
    (folder / "tenants.yaml").write_text(text)
    return load_tenants(folder / "tenants.yaml")


def test_file(tmp_path: Path) -> None:
    loaded = load(tmp_path, FILE)
    tenants = loaded.by_name()
    assert list(tenants) == ["operator", "default", "clinic"]
    policy = tenants["clinic"].policy
    assert (policy.tasks, policy.min_trust_tier) == (("text-generation",), 2)
    assert (policy.pages_per_s, policy.pages_burst, policy.max_lease_ms) == (20, 40, 600_000)
    assert policy.arp is not None
    assert (policy.arp.priority_level, policy.arp.preemption_capability) == (3, True)
    principal = loaded.clients().principal("app", frozenset({"sessions:read"}))
    assert principal is not None
    assert principal.tenant == "clinic"
    # In the log and over the API, in either spelling
    assert Policy.model_validate(policy.model_dump(mode="json")) == policy
    assert Policy.model_validate_json(policy.model_dump_json(by_alias=True)) == policy


def test_operator_and_default_are_always_there() -> None:
    tenants = Tenants().by_name()
    assert tenants["operator"].policy == Policy()
    for tenant in tenants.values():
        assert request(tenant.policy) is None
        assert check_anchor(tenant.policy, anchor()) is None
    strict = Tenant(name="default", policy=Policy(tasks=()))
    assert Tenants(tenants=(strict,)).by_name()["default"] == strict


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("maxSessions", "maxSesions", ":7: unknown key tenants.0.policy.maxSesions"),
        ("name: clinic", "name: operator", "operator is given twice or is built in"),
        ("minTrustTier: 2", "minTrustTier: 11", ":6: tenants.0.policy.minTrustTier"),
        ("minTrustTier: 2", "minTrustTier: 2\n      max_trust_tier: 1", "no anchor is allowed"),
        ("pagesPerS: 20", "pagesPerS: 0", ":8: tenants.0.policy.pagesPerS"),
        ("pagesPerS: 20", "pagesPerS: .nan", ":8: tenants.0.policy.pagesPerS"),
        ("priorityLevel: 3", "priorityLevel: 0", "priorityLevel"),
        ("[text-generation]", "[Text]", "tenants.0.policy.tasks.0"),
        ("sessions:read", "sessions:all", ":13: tenants.0.clients.0: no such scope: sessions:all"),
    ],
)
def test_mistakes_in_the_file(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    assert old in FILE
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, FILE.replace(old, new))
    assert complaint in str(caught.value)


def test_a_secret_in_the_file_is_not_repeated(tmp_path: Path) -> None:
    secret, _ = generate_secret()
    with pytest.raises(ConfigError, match="store the hash") as caught:
        load(tmp_path, FILE.replace(SECRET_HASH, secret))
    assert secret not in str(caught.value)


def test_a_client_belongs_to_one_tenant() -> None:
    client = {"clientId": "app", "secretHash": SECRET_HASH, "scopes": []}
    with pytest.raises(ValueError, match="app is given twice"):
        Tenants.model_validate(
            {"tenants": [{"name": name, "clients": [client]} for name in ("a", "b")]}
        )
