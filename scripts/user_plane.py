"""The user plane of a Linux router: what a configuration says of it, and how it comes and goes.

`aipaging serve` brings it about in its own process, `aipaging upf` in another.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import click
from pydantic import Field

from controlplane.catalogue import Catalogue, Strategy
from controlplane.configfile import ConfigModel
from controlplane.enforcement import EnforcementError, Flow
from controlplane.five_qi import DSCPS
from controlplane.intent import Name
from controlplane.parties import Subscriber
from scripts.errors import EXIT_BAD_INPUT, UserError
from upf import ownership, qos, ran, routing
from upf.buffering import PacketBuffer
from upf.config import AnchorPort, Attachment, GateConfig, GnbPort, PacketQueue, QosPoint
from upf.features import probe
from upf.gate import Gate
from upf.gate import remove as remove_gate
from upf.local import LocalUserPlane
from upf.nfqueue import PacketQueueError
from upf.parking import ParkingLimits

THIS_NETNS = "/proc/self/ns/net"
# What may be wrong with the machine, said in one line.
FAILURES = (
    *(EnforcementError, ownership.OwnershipError, qos.QosError),
    *(routing.RoutingError, PacketQueueError),
)

log = logging.getLogger(__name__)

REMOVE_OPTION = click.option(  # of whatever brings a user plane about
    "--remove",
    "only_remove",
    is_flag=True,
    help="Take away what an earlier run left in the kernel (table, programs, rules, qdiscs), "
    "and end.",
)

Mbps = Annotated[float, Field(gt=0, le=1_000_000, allow_inf_nan=False)]


class GnbConfig(ConfigModel):
    """A gNB that is a Linux router, as in an emulated network: its QoS is ours to set.

    Both interfaces have an HTB tree a15: with their capacity as class a15:1, best effort as a15:9.
    """

    netns: str = THIS_NETNS  # its network namespace
    cell_interface: str  # towards UEs
    n3_interface: str  # towards the UPF


class CellConfig(ConfigModel):
    """A gNB's cell: what it can carry, and the N3 interface towards it."""

    n3_interface: str
    downlink_mbps: Mbps
    uplink_mbps: Mbps
    gnb: GnbConfig | None = None  # None: it keeps to QoS flows by itself

    @property
    def downlink_bps(self) -> int:
        """What it can carry to UEs."""
        return int(self.downlink_mbps * 1e6)

    @property
    def uplink_bps(self) -> int:
        """What it can carry from UEs."""
        return int(self.uplink_mbps * 1e6)


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
    packet_queue: PacketQueue | None = None  # where packets wait, if there is anything to wait for
    parking: ParkingLimits = ParkingLimits()
    replace_qdiscs: bool = False  # those that somebody else put on N3 interfaces

    def parks(self, catalogue: Catalogue) -> bool:
        """Return whether there is anything that packets may have to wait for."""
        buffering = any(s.relocation is Strategy.BUFFER for s in catalogue.services)
        return buffering or any(subscriber.subscriptions for subscriber in self.subscribers)

    def subscribed(self, catalogue: Catalogue) -> tuple[Flow, ...]:
        """Return the flows of all subscriptions. Raises UserError if one makes no sense."""
        flows: list[Flow] = []
        for subscriber in self.subscribers:
            for subscription in subscriber.subscriptions:
                aisi, task = subscription.aisi, subscription.intent.task
                if aisi not in {service.aisi for service in catalogue.services_for(task)}:
                    raise UserError(
                        f"subscriber {subscriber.ue}: the catalogue has no service {aisi} that "
                        f"does {task}, as its subscription says",
                        EXIT_BAD_INPUT,
                    )
                service = catalogue.service(aisi)
                flows += service.flows(subscriber.address4, subscriber.address6)
        return tuple(dict.fromkeys(flows))

    @property
    def points(self) -> tuple[QosPoint, ...]:
        """Where downlink packets wait in the user plane."""
        return tuple(
            QosPoint(
                netns=self.upf_netns,
                interface=cell.n3_interface,
                capacity_bps=cell.downlink_bps,
            )
            for cell in self.cells.values()
        )

    @property
    def gnbs(self) -> tuple[GnbPort, ...]:
        """The gNBs whose QoS is ours to set."""
        return tuple(
            GnbPort(
                netns=cell.gnb.netns,
                cell_interface=cell.gnb.cell_interface,
                downlink_bps=cell.downlink_bps,
                n3_interface=cell.gnb.n3_interface,
                uplink_bps=cell.uplink_bps,
            )
            for cell in self.cells.values()
            if cell.gnb is not None
        )

    def gate(self, catalogue: Catalogue, queue: PacketQueue | None = None) -> GateConfig:
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
            dscps=tuple(sorted(set(DSCPS.values()))),
            queue=queue,
            subscriptions=self.subscribed(catalogue) if queue is not None else (),
        )


@contextlib.contextmanager
def user_plane(config: UserPlaneConfig, catalogue: Catalogue) -> Iterator[LocalUserPlane]:
    """Bring the user plane about, or adopt what an earlier process left; leases outlive it."""
    config.subscribed(catalogue)
    parks, queue = config.parks(catalogue), config.packet_queue
    renewal, fast_path = config.in_place_renewal, config.fast_path
    if renewal is None or fast_path is None or (parks and queue is None):
        features = probe()
        renewal = features.in_place_renewal if renewal is None else renewal
        fast_path = features.tc_bpf if fast_path is None else fast_path
        queue = queue or features.packet_queue()
    if parks and queue is None:
        log.warning(
            "this kernel has no packet queue: first packets of subscriptions are dropped, and no "
            "service waits for a target that is not ready"
        )
    gate_config = config.gate(catalogue, queue if parks else None)
    ownership.claim_tables(config.upf_netns)
    n3 = [point.interface for point in config.points]
    ownership.claim_qdiscs(config.upf_netns, n3, replace=config.replace_qdiscs)
    routing.install(config.upf_netns, gate_config)
    qos.install(config.points, catalogue.shared_five_qis)
    for gnb in config.gnbs:
        qos.extend(gnb.points, catalogue.shared_five_qis)
    with contextlib.ExitStack() as undo:
        gate = Gate(
            config.upf_netns,
            gate_config,
            in_place_renewal=renewal,
            fast_path=fast_path,
            points=config.points,
            gnbs=config.gnbs,
        )
        undo.callback(gate.close)
        buffer = None
        if gate_config.queue is not None:
            number = gate_config.queue.number
            buffer = PacketBuffer(gate, config.upf_netns, number, config.parking)
            undo.callback(buffer.close)
        yield LocalUserPlane(gate, buffer)


def remove(config: UserPlaneConfig) -> None:
    """Take everything away that was left in the kernel: leases end at once."""
    ownership.claim_tables(config.upf_netns)
    remove_gate(config.upf_netns)
    routing.remove(config.upf_netns)
    qos.remove(config.points)
    for gnb in config.gnbs:
        qos.withdraw(gnb.points)
        ran.remove(gnb)
