"""The user plane of a Linux router: what a configuration says of it, and how it comes and goes.

`aipaging serve` brings it about in its own process, `aipaging upf` in another.
"""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from controlplane.catalogue import Catalogue
from controlplane.configfile import ConfigModel
from controlplane.enforcement import EnforcementError
from controlplane.intent import Name
from controlplane.parties import Subscriber
from upf import ownership, qos, routing
from upf.config import AnchorPort, Attachment, GateConfig
from upf.features import probe
from upf.gate import Gate
from upf.gate import remove as remove_gate

THIS_NETNS = "/proc/self/ns/net"
# What may be wrong with the machine, said in one line.
FAILURES = (EnforcementError, ownership.OwnershipError, qos.QosError, routing.RoutingError)

Mbps = Annotated[float, Field(gt=0, le=1_000_000, allow_inf_nan=False)]


class CellConfig(ConfigModel):
    """A gNB's cell: what it can carry, and the N3 interface towards it."""

    n3_interface: str
    downlink_mbps: Mbps
    uplink_mbps: Mbps


class UserPlaneConfig(ConfigModel):
    """N3 and N6 interfaces, anchors, UEs; and the catalogue, for its QoS profiles."""

    catalogue: Path
    cells: dict[Name, CellConfig]
    anchors: tuple[AnchorPort, ...]  # where anchors are attached, on N6
    subscribers: tuple[Subscriber, ...]
    upf_netns: str = THIS_NETNS  # the network namespace of the user plane
    # What the kernel can do (upf.features); by default it is probed.
    in_place_renewal: bool | None = None
    fast_path: bool | None = None  # forwarding at ingress; `false`: let all pass the forward hook
    replace_qdiscs: bool = False  # those that somebody else put on N3 interfaces

    def gate(self, catalogue: Catalogue) -> GateConfig:
        """Describe the user plane to the gate: every UE may come through every N3 interface."""
        n3 = tuple(cell.n3_interface for cell in self.cells.values())
        return GateConfig(
            n3_interfaces=n3,
            anchors=self.anchors,
            attachments=tuple(
                Attachment(interface, address)
                for interface in n3
                for subscriber in self.subscribers
                for address in (subscriber.address4, subscriber.address6)
            ),
            qos_classes=qos.class_ids(catalogue.qos_shares()),
        )


def install(config: UserPlaneConfig, catalogue: Catalogue) -> Gate:
    """Bring the user plane about, or adopt what an earlier process left."""
    gate_config = config.gate(catalogue)
    renewal, fast_path = config.in_place_renewal, config.fast_path
    if renewal is None or fast_path is None:
        features = probe()
        renewal = features.in_place_renewal if renewal is None else renewal
        fast_path = features.netdev_forward if fast_path is None else fast_path
    capacities = {
        cell.n3_interface: int(cell.downlink_mbps * 1e6) for cell in config.cells.values()
    }
    ownership.claim_tables(config.upf_netns)
    ownership.claim_qdiscs(config.upf_netns, capacities, replace=config.replace_qdiscs)
    routing.install(config.upf_netns, gate_config)
    qos.install(config.upf_netns, capacities, catalogue.qos_shares())
    return Gate(config.upf_netns, gate_config, in_place_renewal=renewal, fast_path=fast_path)


def remove(config: UserPlaneConfig) -> None:
    """Take everything away that was left in the kernel: leases end at once."""
    ownership.claim_tables(config.upf_netns)
    remove_gate(config.upf_netns)
    routing.remove(config.upf_netns)
    qos.remove(config.upf_netns, [cell.n3_interface for cell in config.cells.values()])
