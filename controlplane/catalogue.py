"""The catalogue: which AI services, models and QoS profiles exist, and which anchors run them.

Read from a YAML file. Anchors may also register themselves later, with the same members in JSON;
`Catalogue.check_anchor` holds both to the same rules.
"""

import math
from collections import Counter
from collections.abc import Iterable
from enum import StrEnum
from functools import cached_property
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Annotated, Self

from pydantic import ConfigDict, Field, StringConstraints, model_validator
from pydantic.alias_generators import to_camel

from controlplane.configfile import ConfigModel, load_yaml
from controlplane.enforcement import Flow
from controlplane.five_qi import BEST_EFFORT, FIVE_QIS
from controlplane.intent import (
    MAX_BPS,
    MAX_DURATION_MS,
    Intent,
    Name,
    PipelineTag,
    QosProfileName,
    Rate,
)

SERVICE_PREFIX4 = IPv4Network("198.18.0.0/15")  # RFC 2544; here: service addresses
SERVICE_PREFIX6 = IPv6Network("fd00:a151::/64")
OPERATOR = "operator"  # the provider that is the operator itself, where no providers are listed
MAX_DURATION_S = MAX_DURATION_MS // 1000

ModelName = Annotated[str, StringConstraints(min_length=1, max_length=255, pattern=r"^[\w.:/@-]+$")]
Text = Annotated[  # of people for people: lines may break, other control characters are refused
    str, StringConstraints(max_length=1024, pattern=r"^[^\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]*$")
]
Names = Annotated[list[Name], Field(max_length=64)]
Milliseconds = Annotated[float, Field(ge=0, le=3_600_000)]
GuaranteedRate = Annotated[int, Field(ge=0, le=MAX_BPS)]
Megabytes = Annotated[int, Field(ge=0, le=10**9)]


class ProfileStatus(StrEnum):
    """Whether new sessions may use a QoS profile (CAMARA QosProfileStatusEnum)."""

    ACTIVE = "ACTIVE"
    INACTIVE = "INACTIVE"  # not now
    DEPRECATED = "DEPRECATED"  # no more; sessions that have it keep it


class QosProfile(ConfigModel):
    """What a lease gets of the network: TS 23.501 (5.7) QoS parameters behind a CAMARA name."""

    name: QosProfileName
    description: Text = ""
    status: ProfileStatus = ProfileStatus.ACTIVE
    five_qi: int = BEST_EFFORT  # a standardised one: TS 23.501, table 5.7.4-1
    # GFBR, for each lease: what admission reserves. Only with a 5QI of type (delay-critical) GBR.
    guaranteed_downlink_bps: GuaranteedRate = 0
    guaranteed_uplink_bps: GuaranteedRate = 0
    max_downlink_bps: Rate | None = None  # MFBR; None: no limit
    max_uplink_bps: Rate | None = None
    packet_delay_budget_ms: Annotated[int, Field(ge=1, le=3_600_000)] | None = None  # one way
    jitter_ms: Annotated[int, Field(ge=1, le=3_600_000)] | None = None
    packet_error_loss_rate: Annotated[int, Field(ge=1, le=10)] | None = None  # n means 10^-n
    min_duration_s: Annotated[int, Field(ge=1, le=MAX_DURATION_S)] = 1
    max_duration_s: Annotated[int, Field(ge=1, le=MAX_DURATION_S)] = MAX_DURATION_S
    # ARP: who yields to whom where capacity is short; 1 is the most important.
    priority_level: Annotated[int, Field(ge=1, le=15)] = 8
    preemption_capability: bool = False  # may take capacity from less important leases
    preemption_vulnerability: bool = True  # may lose it to more important ones

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        for least, most, what in (
            (self.guaranteed_downlink_bps, self.max_downlink_bps, "downlink_bps"),
            (self.guaranteed_uplink_bps, self.max_uplink_bps, "uplink_bps"),
        ):
            if most is not None and least > most:
                raise ValueError(f"guaranteed_{what} is above max_{what}")
        if self.min_duration_s > self.max_duration_s:
            raise ValueError("min_duration_s is above max_duration_s")
        return self

    @model_validator(mode="after")
    def _rates_fit_the_five_qi(self) -> Self:
        characteristics = FIVE_QIS.get(self.five_qi)
        if characteristics is None:
            known = ", ".join(map(str, sorted(FIVE_QIS)))
            raise ValueError(f"five_qi {self.five_qi} is not standardised; there are {known}")
        guaranteed = bool(self.guaranteed_downlink_bps or self.guaranteed_uplink_bps)
        kind = f"5QI {self.five_qi} is of type {characteristics.resource_type}"
        if characteristics.guaranteed and not guaranteed:
            raise ValueError(
                f"{kind}: give guaranteed_downlink_bps or guaranteed_uplink_bps (GFBR)"
            )
        if guaranteed and not characteristics.guaranteed:
            raise ValueError(
                f"{kind}: it guarantees no rate; take a GBR one, such as 4, or leave "
                "guaranteed_downlink_bps and guaranteed_uplink_bps (GFBR) out"
            )
        limited = self.max_downlink_bps is not None or self.max_uplink_bps is not None
        if limited and not characteristics.guaranteed:
            raise ValueError(
                f"{kind}: max_downlink_bps and max_uplink_bps (MFBR) are for GBR ones alone"
            )
        return self

    @property
    def delay_budget_ms(self) -> int:
        """One way between UE and UPF: the profile's own, or its 5QI's."""
        return self.packet_delay_budget_ms or FIVE_QIS[self.five_qi].packet_delay_budget_ms

    @property
    def error_loss_exponent(self) -> int:
        """Of the most packets that may be lost, n of 10^-n: the profile's own, or its 5QI's."""
        most = FIVE_QIS[self.five_qi].packet_error_rate
        return self.packet_error_loss_rate or round(-math.log10(most))

    def covers(self, downlink_bps: int, uplink_bps: int) -> bool:
        """Return whether it guarantees these rates."""
        return (
            self.guaranteed_downlink_bps >= downlink_bps
            and self.guaranteed_uplink_bps >= uplink_bps
        )


class Strategy(StrEnum):
    """How a service's sessions relocate."""

    DRAIN = "drain"  # connections finish where they began, until a deadline; the rest moves
    FLIP = "flip"  # everything moves; what the old anchor has sent still passes for an instant
    BUFFER = "buffer"  # as drain; the uplink waits, in order, for a target that is not ready yet


class Requirements(ConfigModel):
    """What an anchor must have to run a model."""

    memory_mb: Megabytes = 0
    accelerators: Names = []  # all of them


class Model(ConfigModel):
    """A model: what services run."""

    name: ModelName
    task: PipelineTag
    description: Text = ""  # intents in free text are compared with it
    accuracy: Annotated[float, Field(ge=0, le=1)] | None = None  # on the task's usual benchmark
    parameters_millions: Annotated[float, Field(gt=0)] | None = None
    size_bytes: Annotated[int, Field(gt=0)] | None = None
    requires: Requirements = Requirements()


class Service(ConfigModel):
    """An AI service: its identity (AISI) and the stable addresses it is reached at anywhere."""

    aisi: Name
    task: PipelineTag
    model: ModelName
    description: Text = ""
    address4: IPv4Address
    address6: IPv6Address
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    relocation: Strategy = Strategy.DRAIN

    @model_validator(mode="after")
    def _addresses_are_service_addresses(self) -> Self:
        if self.address4 not in SERVICE_PREFIX4:
            raise ValueError(f"address4 {self.address4} is not in {SERVICE_PREFIX4}")
        if self.address6 not in SERVICE_PREFIX6:
            raise ValueError(f"address6 {self.address6} is not in {SERVICE_PREFIX6}")
        return self

    def flows(self, ue4: IPv4Address, ue6: IPv6Address) -> tuple[Flow, ...]:
        """Return the flows between a UE and this service, one an address family."""
        return (Flow(ue4, self.address4), Flow(ue6, self.address6))


class Provider(ConfigModel):
    """Who runs anchors."""

    name: Name
    operator: bool = False  # the operator itself: what runs there stays on its premises


class _Registered(ConfigModel):
    """In files in snake_case, in the API in camelCase; types are not coerced in either."""

    model_config = ConfigDict(
        strict=True,
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
        allow_inf_nan=False,
    )


class Hosting(_Registered):
    """A service that an anchor can run, and how well."""

    aisi: Name
    service_time_ms: Annotated[float, Field(gt=0, le=3_600_000)]  # of one request, expected
    rate_rps: Annotated[float, Field(gt=0, le=1e9)] | None = None  # of one session; None: unknown


class Anchor(_Registered):
    """An AI execution anchor (AEXF)."""

    name: Name
    provider: Name = OPERATOR
    region: Name
    on_premises: bool = True  # counts only if the provider is the operator
    trust_tier: Annotated[int, Field(ge=0, le=10)]  # higher is more trusted
    slots: Annotated[int, Field(ge=1, le=1_000_000)]  # sessions at a time
    cost: Annotated[float, Field(ge=0, le=1e9)]  # per 1,000 requests, in the operator's unit
    path_rtt_ms: Milliseconds = 0.0  # UPF to anchor and back, expected
    # From UEs in these cells (gNBs) it is another.
    path_rtt_ms_from: Annotated[dict[Name, Milliseconds], Field(max_length=1024)] = {}
    n6_downlink_bps: Rate | None = None  # of its path to the UPF, for guaranteed rates;
    n6_uplink_bps: Rate | None = None  # None: as much as anyone asks for
    memory_mb: Megabytes | None = None  # None: as much as its models need
    accelerators: Names = []
    hosts: Annotated[list[Hosting], Field(min_length=1, max_length=256)]

    @model_validator(mode="after")
    def _each_service_once(self) -> Self:
        _once("AISI", (hosting.aisi for hosting in self.hosts))
        return self

    def hosting(self, aisi: str) -> Hosting | None:
        """Return how this anchor runs a service; None if it does not."""
        return self._hosting.get(aisi)

    @cached_property
    def _hosting(self) -> dict[str, Hosting]:
        return {hosting.aisi: hosting for hosting in self.hosts}


class Catalogue(ConfigModel):
    """QoS profiles, providers, models, services, and the anchors known beforehand."""

    qos_profiles: Annotated[list[QosProfile], Field(min_length=1, max_length=64)]
    default_qos_profile: QosProfileName | None = None  # None: the first
    providers: Annotated[list[Provider], Field(max_length=256)] = []  # empty: only OPERATOR
    models: Annotated[list[Model], Field(max_length=10_000)] = []  # empty: services say enough
    services: Annotated[list[Service], Field(min_length=1)]
    anchors: list[Anchor] = []

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for what, names in (
            ("QoS profile", [profile.name for profile in self.qos_profiles]),
            ("provider", [provider.name for provider in self.providers]),
            ("model", [model.name for model in self.models]),
            ("AISI", [service.aisi for service in self.services]),
            ("anchor", [anchor.name for anchor in self.anchors]),
            ("service address", [str(service.address4) for service in self.services]),
            ("service address", [str(service.address6) for service in self.services]),
        ):
            _once(what, names)
        if self.default_qos_profile not in (None, *self._profiles):
            raise ValueError(f"default_qos_profile {self.default_qos_profile} is no QoS profile")
        if self.default_profile.status is not ProfileStatus.ACTIVE:
            raise ValueError(f"the default QoS profile {self.default_profile.name} is not ACTIVE")
        for service in self.services if self.models else ():
            model = self._models.get(service.model)
            if model is None:
                raise ValueError(f"service {service.aisi} runs {service.model}, which is no model")
            if model.task != service.task:
                raise ValueError(
                    f"service {service.aisi} does {service.task}, its model {model.task}"
                )
        for anchor in self.anchors:
            self.check_anchor(anchor)
        return self

    def check_anchor(self, anchor: Anchor) -> None:
        """Raise ValueError, naming the anchor, if it cannot be what it says it is."""
        if self.providers and anchor.provider not in self._providers:
            raise ValueError(f"anchor {anchor.name} is of {anchor.provider}, which is no provider")
        for hosting in anchor.hosts:
            service = self._services.get(hosting.aisi)
            if service is None:
                raise ValueError(f"anchor {anchor.name} hosts {hosting.aisi}, which is no service")
            model = self._models.get(service.model)
            lacking = model and _lacking(anchor, model.requires)
            if model and lacking:
                raise ValueError(
                    f"anchor {anchor.name} hosts {service.aisi}, whose model {model.name} {lacking}"
                )

    def service(self, aisi: str) -> Service:
        """Return a service by its AISI. KeyError if there is none."""
        return self._services[aisi]

    def services_for(self, task: str) -> tuple[Service, ...]:
        """Return the services that do a task, in the file's order."""
        return self._services_for.get(task, ())

    def model(self, name: str) -> Model:
        """Return a model by name. KeyError if there is none."""
        return self._models[name]

    def model_of(self, service: Service) -> Model | None:
        """Return what is known of a service's model; None where the file has no models."""
        return self._models.get(service.model)

    def anchor(self, name: str) -> Anchor:
        """Return an anchor of the file by name. KeyError if there is none."""
        return self._anchors[name]

    def is_operator(self, provider: str) -> bool:
        """Return whether a provider is the operator itself; a provider unknown is not."""
        return self._providers.get(provider, provider == OPERATOR and not self.providers)

    def profile(self, name: str) -> QosProfile:
        """Return a QoS profile by name. KeyError if there is none."""
        return self._profiles[name]

    @property
    def default_profile(self) -> QosProfile:
        """The QoS profile of intents that ask for none."""
        return self._profiles[self.default_qos_profile or self.qos_profiles[0].name]

    @property
    def shared_five_qis(self) -> dict[int, int]:
        """The non-GBR 5QIs in use, whose leases share a class each -> their priority level."""
        return {
            profile.five_qi: FIVE_QIS[profile.five_qi].priority_level
            for profile in self.qos_profiles
            if not FIVE_QIS[profile.five_qi].guaranteed
        }

    @cached_property
    def _profiles(self) -> dict[str, QosProfile]:
        return {profile.name: profile for profile in self.qos_profiles}

    @cached_property
    def _providers(self) -> dict[str, bool]:
        return {provider.name: provider.operator for provider in self.providers}

    @cached_property
    def _models(self) -> dict[str, Model]:
        return {model.name: model for model in self.models}

    @cached_property
    def _services(self) -> dict[str, Service]:
        return {service.aisi: service for service in self.services}

    @cached_property
    def _services_for(self) -> dict[str, tuple[Service, ...]]:
        tasks = {service.task for service in self.services}
        return {task: tuple(s for s in self.services if s.task == task) for task in tasks}

    @cached_property
    def _anchors(self) -> dict[str, Anchor]:
        return {anchor.name: anchor for anchor in self.anchors}


def profile_for(catalogue: Catalogue, intent: Intent) -> QosProfile | None:
    """Return the QoS profile that an intent gets; None if there is none.

    The one it names, whatever its status; or the active one that guarantees the required rates
    with the least to spare; or the default.
    """
    if intent.qos_profile is not None:
        return catalogue._profiles.get(intent.qos_profile)
    wanted = intent.required_rates
    if wanted is None:
        return catalogue.default_profile
    return min(
        (
            profile
            for profile in catalogue.qos_profiles
            if profile.status is ProfileStatus.ACTIVE
            and profile.covers(wanted.downlink_bps or 0, wanted.uplink_bps or 0)
        ),
        key=lambda profile: profile.guaranteed_downlink_bps + profile.guaranteed_uplink_bps,
        default=None,
    )


def load_catalogue(path: Path) -> Catalogue:
    """Read a catalogue file. ConfigError names file and line of whatever is wrong."""
    return load_yaml(path, Catalogue)


def _once(what: str, names: Iterable[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{what} {twice[0]} is given twice")


def _lacking(anchor: Anchor, required: Requirements) -> str | None:
    if anchor.memory_mb is not None and anchor.memory_mb < required.memory_mb:
        return f"needs {required.memory_mb} MB of memory; it has {anchor.memory_mb}"
    missing = [name for name in required.accelerators if name not in anchor.accelerators]
    return f"needs {', '.join(missing)}, which it has not" if missing else None
