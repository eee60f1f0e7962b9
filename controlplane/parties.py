"""Who takes part, besides the tenants: UEs, anchors, and the signer of AISTs."""

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Protocol

from controlplane.intent import Intent
from controlplane.lease import Lease


@dataclass(frozen=True, slots=True)
class Subscription:
    """A service that a UE may just send to: its first packets page for it, with this intent."""

    aisi: str
    intent: Intent


@dataclass(frozen=True, slots=True)
class Subscriber:
    """A UE the network knows: its identity, the addresses it was given, where it is at first."""

    ue: str
    address4: IPv4Address
    address6: IPv6Address
    cell: str | None = None  # a gNB; mobility reports move it
    tenant: str = "default"  # whose policy holds when it pages by itself
    subscriptions: tuple[Subscription, ...] = ()


class AnchorRefusedError(Exception):
    """Nobody serves at an anchor: the connection was refused."""


class AnchorGateway(Protocol):
    """How the control plane talks to anchors."""

    async def ready(self, anchor: str, aisi: str) -> bool:
        """Ask an anchor whether it can take a session with a service now.

        Raises AnchorRefusedError.
        """


class TokenIssuer(Protocol):
    """Who signs AISTs."""

    def issue(self, held: Lease) -> str:
        """Return the token of a committed lease."""
