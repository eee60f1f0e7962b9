"""What is journalled besides the lives of leases and anchors: small facts, one dataclass each."""

from dataclasses import dataclass

from controlplane.policy import Policy


@dataclass(frozen=True, slots=True)
class Started:
    """A controller took over this log. What ended while none ran has no closing counts."""

    instance: str


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """The kernel has acknowledged what these leases authorise; written after the fact."""

    lease_ids: tuple[str, ...]
    acknowledged_ns: int  # CLOCK_MONOTONIC


@dataclass(frozen=True, slots=True)
class UplinkHeld:
    """A lease's uplink waits at the user plane while a target gets ready; at most until then."""

    lease_id: str
    until_ns: int  # CLOCK_MONOTONIC


@dataclass(frozen=True, slots=True)
class UplinkResumed:
    """What a lease held goes on to where it was going: no target got ready."""

    lease_id: str


@dataclass(frozen=True, slots=True)
class UeMoved:
    """A mobility report: a UE is in another cell (gNB) now."""

    ue: str
    cell: str


@dataclass(frozen=True, slots=True)
class PolicySet:
    """A tenant has another policy now."""

    tenant: str
    policy: Policy


Fact = Started | Acknowledged | UplinkHeld | UplinkResumed | UeMoved | PolicySet
