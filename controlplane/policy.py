"""What a tenant may do: tasks, places, QoS, quotas, priority (ARP). Pure checks, no state but rate.

A limit on places excludes an anchor, as a constraint of an intent does; the others refuse a request
with a cause. Both say why. A file of tenants (`load_tenants`); what is left out is unlimited:

    tenants:
      - name: clinic
        policy:
          tasks: [text-generation]
          regions: [campus]
          minTrustTier: 2
          maxSessions: 100
          pagesPerS: 20
          pagesBurst: 40
          maxLeaseMs: 600000
          arp: {priorityLevel: 3, preemptionCapability: true}
        clients:
          - {clientId: clinic-app, secretHash: "sha256$...", scopes: ["sessions:write"]}
"""

from collections import Counter
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Annotated, NamedTuple, Self

from pydantic import ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel

from controlplane.access_tokens import Client, Clients
from controlplane.catalogue import Anchor, QosProfile
from controlplane.clock import NS_PER_S
from controlplane.configfile import ConfigModel, load_yaml
from controlplane.intent import MAX_DURATION_MS, MIN_DURATION_MS, Name, PipelineTag

TrustTier = Annotated[int, Field(ge=0, le=10)]
BitsPerS = Annotated[int, Field(ge=0, le=10**15)]


class _Model(ConfigModel):
    """In files in snake_case or, as in the API, in camelCase."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
        allow_inf_nan=False,
    )


class Arp(_Model):
    """Allocation and retention priority (TS 23.501, 5.7.2.2)."""

    priority_level: Annotated[int, Field(ge=1, le=15)]  # 1 is the most important
    preemption_capability: bool = False  # may take capacity from less important sessions
    preemption_vulnerability: bool = True  # may lose it to more important ones


class Policy(_Model):
    """What a tenant may have. Of a list, None allows everything and an empty one nothing.

    Of a quota, None is as much as there is.
    """

    tasks: tuple[PipelineTag, ...] | None = None
    regions: tuple[Name, ...] | None = None
    min_trust_tier: TrustTier = 0
    max_trust_tier: TrustTier = 10
    qos_profiles: tuple[Name, ...] | None = None
    arp: Arp | None = None  # in place of the QoS profile's
    max_sessions: Annotated[int, Field(ge=0)] | None = None  # live at a time
    pages_per_s: Annotated[float, Field(ge=0.001, le=1_000_000)] | None = None  # in the long run
    pages_burst: Annotated[int, Field(ge=1, le=1_000_000)] = 1  # at once, after a pause
    max_lease_ms: Annotated[int, Field(ge=MIN_DURATION_MS, le=MAX_DURATION_MS)] | None = None
    max_downlink_bps: BitsPerS | None = None  # guaranteed to all live sessions together
    max_uplink_bps: BitsPerS | None = None

    @model_validator(mode="after")
    def _some_tier(self) -> Self:
        if self.min_trust_tier > self.max_trust_tier:
            raise ValueError("min_trust_tier is above max_trust_tier: no anchor is allowed")
        return self


class Tenant(_Model):
    """Whose sessions they are, and who may act for it."""

    name: Name
    policy: Policy = Policy()
    clients: tuple[Client, ...] = ()


OPERATOR = Tenant(name="operator")
# Of UEs that page by themselves, if their subscription names no other. The quotas are for all of
# them together: they keep a fault from filling the machine, and no sound network from working.
DEFAULT = Tenant(
    name="default",
    policy=Policy(max_sessions=200_000, pages_per_s=20_000, pages_burst=20_000),
)


class Tenants(_Model):
    """All tenants: those of the file, `operator` and, if the file has none, `default`."""

    tenants: tuple[Tenant, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = Counter(tenant.name for tenant in self.tenants)
        names[OPERATOR.name] += 1
        if twice := [name for name, count in names.items() if count > 1]:
            raise ValueError(f"tenant {twice[0]} is given twice or is built in")
        self.clients()
        return self

    def by_name(self) -> dict[str, Tenant]:
        """Return all tenants by name."""
        return {tenant.name: tenant for tenant in (OPERATOR, DEFAULT, *self.tenants)}

    def clients(self) -> Clients:
        """Return the clients of all tenants."""
        return Clients(
            (tenant.name, client) for tenant in self.tenants for client in tenant.clients
        )


def load_tenants(path: Path) -> Tenants:
    """Read a file of tenants. ConfigError names file and line of whatever is wrong."""
    return load_yaml(path, Tenants)


def effective_arp(profile: QosProfile, tenant: Tenant) -> Arp:
    """Return the ARP of a tenant's lease: its own if its policy gives one, else the profile's."""
    return tenant.policy.arp or _arp(
        profile.priority_level, profile.preemption_capability, profile.preemption_vulnerability
    )


@lru_cache(maxsize=256)
def _arp(priority_level: int, capability: bool, vulnerability: bool) -> Arp:
    return Arp(
        priority_level=priority_level,
        preemption_capability=capability,
        preemption_vulnerability=vulnerability,
    )


class Cause(StrEnum):
    """Why a tenant's policy refuses a request."""

    TASK = "TASK_NOT_ALLOWED"
    QOS_PROFILE = "QOS_PROFILE_NOT_ALLOWED"
    SESSIONS = "SESSION_QUOTA_EXCEEDED"
    BANDWIDTH = "BANDWIDTH_QUOTA_EXCEEDED"


class Breach(NamedTuple):
    """What a policy does not allow: a cause or, of an anchor, a constraint; and the detail."""

    what: str
    detail: str


def check_anchor(policy: Policy, anchor: Anchor) -> Breach | None:
    """Return why a tenant may not use an anchor; None if it may."""
    if policy.regions is not None and anchor.region not in policy.regions:
        detail = f"{anchor.region} is not among the tenant's: {_listed(policy.regions)}"
        return Breach("tenantRegion", detail)
    if not policy.min_trust_tier <= anchor.trust_tier <= policy.max_trust_tier:
        allowed = f"{policy.min_trust_tier} to {policy.max_trust_tier}"
        return Breach("tenantTrustTier", f"tier {anchor.trust_tier}, the tenant's are {allowed}")
    return None


def check_request(
    policy: Policy,
    *,
    task: str | None,
    qos_profile: str,
    live_sessions: int,
    downlink_bps: int = 0,
    uplink_bps: int = 0,
) -> Breach | None:
    """Return why a tenant may not have one more session; None if it may.

    `task`: None for QoS alone. `live_sessions`: the tenant's, without this one. `downlink_bps` and
    `uplink_bps`: what is guaranteed to those and this one together.
    """
    for cause, name, allowed in (
        (Cause.TASK, task, policy.tasks),
        (Cause.QOS_PROFILE, qos_profile, policy.qos_profiles),
    ):
        if name is not None and allowed is not None and name not in allowed:
            return Breach(cause, f"{name} is not among the tenant's: {_listed(allowed)}")
    for cause, asked, most, unit in (
        (Cause.SESSIONS, live_sessions + 1, policy.max_sessions, "sessions"),
        (Cause.BANDWIDTH, downlink_bps, policy.max_downlink_bps, "bit/s downlink"),
        (Cause.BANDWIDTH, uplink_bps, policy.max_uplink_bps, "bit/s uplink"),
    ):
        if most is not None and asked > most:
            detail = f"this would make {asked:,} {unit}; the tenant may have {most:,}"
            return Breach(cause, detail)
    return None


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names) or "none"


class RateLimiter:
    """A token bucket per tenant: `pages_burst` at once, and `pages_per_s` in the long run.

    As a virtual schedule (GCRA, ITU-T I.371): per tenant one instant, at which its bucket is full
    again. In whole ns, so that no rounding ever lets one page too many through.
    """

    def __init__(self) -> None:
        self._full_ns: dict[str, int] = {}

    def admit(self, tenant: Tenant, now_ns: int) -> float | None:
        """Count a page and return None; or count nothing and return when to try again, in s.

        `now_ns`: monotonic.
        """
        policy = tenant.policy
        if policy.pages_per_s is None:
            return None
        interval_ns = _interval_ns(policy.pages_per_s)
        full_ns = max(self._full_ns.get(tenant.name, now_ns), now_ns)
        early_ns = full_ns - (policy.pages_burst - 1) * interval_ns - now_ns
        if early_ns > 0:
            return early_ns / NS_PER_S
        self._full_ns[tenant.name] = full_ns + interval_ns
        return None


def _interval_ns(rate_per_s: float) -> int:
    """Return the time for one page at a rate, rounded up."""
    numerator, denominator = rate_per_s.as_integer_ratio()
    return -(-NS_PER_S * denominator // numerator)
