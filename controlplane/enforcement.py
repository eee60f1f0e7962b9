"""What the control plane asks of a user plane: value types and the Enforcer protocol.

These are the only types that `upf` shares with `controlplane`. They carry no logic.
"""

from collections.abc import Callable, Iterable, Sequence
from ipaddress import IPv4Address, IPv6Address
from typing import Protocol

from controlplane.values import value

Address = IPv4Address | IPv6Address


@value(frozen=True, slots=True)
class Flow:
    """One address family's share of a lease: this UE to this service, and back."""

    ue: Address
    service: Address

    def __post_init__(self) -> None:
        if self.ue.version != self.service.version:
            raise ValueError(f"{self.ue} and {self.service} are of different address families")


@value(frozen=True, slots=True, kw_only=True)
class QosFlow:
    """How a lease's packets are forwarded (TS 23.501, 5.7): what an SMF tells the UPF and the gNB.

    A flow whose 5QI is of a guaranteed resource type has a class of its own in the kernel; others
    share one by 5QI.
    """

    five_qi: int
    priority_level: int  # of the 5QI (5.7.3.3): 1 to 127, 1 is served first
    guaranteed: bool  # resource type GBR or delay-critical GBR (5.7.3.2)
    delay_critical: bool
    dscp: int  # of packets on the way (5.8.2.7), 6 bits; 0: as their sender marked them
    guaranteed_downlink_bps: int = 0  # GFBR (5.7.2.5)
    guaranteed_uplink_bps: int = 0
    max_downlink_bps: int | None = None  # MFBR; None: no limit
    max_uplink_bps: int | None = None


@value(frozen=True, slots=True, kw_only=True)
class Binding:
    """What one COMMIT authorises: its flows, to one anchor, under one QoS, until a deadline.

    Without an anchor it authorises QoS alone: nothing is steered, the flows' packets take the
    ordinary route, and their priority ends with the lease (CAMARA Quality-on-Demand).
    """

    lease_id: str
    epoch: int  # of the session; only grows (fencing)
    flows: tuple[Flow, ...]
    anchor: str | None
    qos: QosFlow
    expires_ns: int  # CLOCK_MONOTONIC


@value(frozen=True, slots=True)
class Install:
    """Open the user plane for a new lease."""

    binding: Binding


@value(frozen=True, slots=True)
class Move:
    """Make-before-break: steer to `new`; `old`'s anchor may still answer until the drain ends."""

    new: Binding
    old: Binding
    drain_until_ns: int  # CLOCK_MONOTONIC


@value(frozen=True, slots=True)
class Renew:
    """Extend a live lease in place; `binding.expires_ns` is the new deadline."""

    binding: Binding


@value(frozen=True, slots=True)
class Revoke:
    """Close the user plane of a lease's flows now, whichever lease of the session holds them.

    Closing what is already closed is no error.
    """

    binding: Binding


@value(frozen=True, slots=True)
class EndDrain:
    """Stop the old anchor's answers before the drain deadline."""

    old: Binding


@value(frozen=True, slots=True)
class Hold:
    """Keep a lease's uplink at the user plane, in order: apply-action BUFF (TS 29.244, 8.2.26).

    It ends with `Move` or `Resume`, at `until_ns` by itself, and never later than the lease. What
    is held goes on then to where the lease steers. TCP connections that there are go on meanwhile.
    """

    binding: Binding
    until_ns: int  # CLOCK_MONOTONIC


@value(frozen=True, slots=True)
class Resume:
    """Let go what is held, in order, to where the lease steers: apply-action FORW."""

    binding: Binding


Operation = Install | Move | Renew | Revoke | EndDrain | Hold | Resume


@value(frozen=True, slots=True, kw_only=True)
class Usage:
    """Packets and bytes the kernel counted on one lease's elements."""

    uplink_packets: int
    uplink_bytes: int
    downlink_packets: int
    downlink_bytes: int


@value(frozen=True, slots=True, kw_only=True)
class Enforced:
    """One flow of a lease as read back from the kernel."""

    lease_id: str
    epoch: int
    flow: Flow
    anchor: str | None
    remaining_ms: int
    usage: Usage


@value(frozen=True, slots=True, kw_only=True)
class Reconciliation:
    """What it took to make the kernel agree with the journal (lease ids)."""

    adopted: tuple[str, ...]
    installed: tuple[str, ...]
    removed: tuple[str, ...]


class EnforcementError(Exception):
    """The user plane refused an operation; nothing of the batch took effect."""


class StaleEpochError(EnforcementError):
    """An operation carried an epoch older than one already enforced."""


@value(frozen=True, slots=True, kw_only=True)
class Parked:
    """Packets that waited at the user plane since it began, by what became of them.

    stored = released + dropped + expired + held. What had no room was never stored.
    """

    stored: int = 0
    released: int = 0  # ran through the gate again, which passes only what a lease steers
    dropped: int = 0  # refused
    expired: int = 0  # no answer in time
    held: int = 0  # now
    no_room: int = 0
    lost_by_kernel: int = 0  # between the kernel's queue and us


class FirstPackets(Protocol):
    """The part of a user plane that parks what subscriptions send without a lease."""

    def on_first_packet(self, report: Callable[[Flow], None]) -> None:
        """Call `report` once for each flow that packets begin to wait for.

        They go on when a lease of the flow is installed. Without any they expire.
        """

    async def refuse(self, flows: Sequence[Flow], backoff_ms: int) -> None:
        """Drop what waits for these flows, and all that comes for a while; tell the senders."""

    async def parked(self) -> Parked:
        """Return what became of packets that waited."""


class Enforcer(Protocol):
    """A user plane function as the control plane sees it."""

    async def apply(self, operations: Sequence[Operation]) -> None:
        """Apply all operations in one atomic step, or raise EnforcementError and change nothing.

        When it returns, the kernel has acknowledged.
        """

    async def enforced(self) -> list[Enforced]:
        """Read every live steering element back from the kernel."""

    async def usage(self, bindings: Sequence[Binding]) -> dict[str, Usage]:
        """Return what the kernel has counted so far, by lease id.

        A lease whose elements are gone (expired, revoked, superseded and drained) is missing.
        """

    async def reconcile(self, live: Iterable[Binding]) -> Reconciliation:
        """Make the kernel hold exactly these bindings, with the time each has left."""

    async def drops(self) -> dict[str, int]:
        """Packets dropped so far, by reason."""
