"""All that a request may need, in one place: the control plane as the HTTP API sees it."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address

from starlette.types import Scope

from controlplane.access_tokens import TokenService
from controlplane.answers import Refusal
from controlplane.checkpoint import Signer
from controlplane.controller import Controller
from controlplane.enforcement import Address, FirstPackets, Parked
from controlplane.event_stream import Broadcaster
from controlplane.evidence import EvidenceLog
from controlplane.keys import KeyRing
from controlplane.metrics import Metrics
from controlplane.paging import Pager
from controlplane.relocation import Relocator
from controlplane.revocations import Revocations
from controlplane.upkeep import Keeper

OPERATOR_LISTENER = "operator"  # connections to it are the operator's


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlPlane:
    """A running control plane."""

    controller: Controller
    pager: Pager
    relocator: Relocator
    keeper: Keeper
    log: EvidenceLog
    signer: Signer  # of checkpoints
    keys: KeyRing
    tokens: TokenService
    revocations: Revocations
    stream: Broadcaster
    metrics: Metrics
    anchor_by_address: Mapping[Address, str]
    allow_http_sinks: bool = False
    ue_by_address: dict[Address, str] = field(init=False)
    first_packets: FirstPackets | None = None  # of the user plane
    parked: Parked = field(default_factory=Parked)  # when it was read last
    drops: dict[str, int] = field(default_factory=dict)  # by reason, when they were read last

    def __post_init__(self) -> None:
        object.__setattr__(self, "ue_by_address", self.controller.ue_by_address())

    def is_operator(self, scope: Scope) -> bool:
        """Whether a connection came through the operator's listener."""
        state = scope.get("state") or {}
        return bool(state.get("listener") == OPERATOR_LISTENER)

    def provider_of(self, anchor: str) -> str:
        """Return whose anchor it is, or would be if it registered by itself."""
        return self.controller.ledger.fleet.provider(anchor) or "operator"

    def ue_at(self, address: str) -> str:
        """Return the UE that an address was given to. Raises Refusal."""
        try:
            ue = self.ue_by_address.get(ip_address(address))
        except ValueError:
            ue = None
        if ue is None:
            raise Refusal("UE_UNKNOWN", "no UE of this network has this address")
        return ue

    async def read_parked(self) -> Parked:
        """Return what became of packets that waited at the user plane."""
        if self.first_packets is not None:
            object.__setattr__(self, "parked", await self.first_packets.parked())
        return self.parked

    def unix_s(self) -> float:
        """Return the present, Unix seconds."""
        return time.time()
