"""What a user plane function is told about the network it stands in."""

from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from controlplane.enforcement import Flow

UE_PREFIXES = (IPv4Network("10.45.0.0/16"), IPv6Network("fd00:45::/64"))
SERVICE_PREFIXES = (IPv4Network("198.18.0.0/15"), IPv6Network("fd00:a151::/64"))

# The marks that select an anchor's route table: the upper half says "ours", the lower which anchor.
MARK_BASE = 0x0A150000
MARK_MASK = 0xFFFF0000
MAX_ANCHORS = 0xFFFF
# Of a packet that was parked and runs through the gate again: no anchor's, so it steers nothing.
RELEASED_MARK = 0x0A160001


class QueueBy(StrEnum):
    """How this kernel hands packets to a queue of user space."""

    EXPRESSION = "queue"  # nf_tables' own
    TARGET = "NFQUEUE"  # the xtables target, through nft_compat


@dataclass(frozen=True, slots=True, kw_only=True)
class PacketQueue:
    """Where packets wait that no lease steers yet."""

    number: int = 45
    by: QueueBy = QueueBy.EXPRESSION
    reject: bool = True  # whether the kernel can answer what is refused (nft_reject)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnchorPort:
    """Where an anchor (AEXF) is attached: the N6-side interface and the anchor's own addresses."""

    name: str
    interface: str
    address4: IPv4Address
    address6: IPv6Address


@dataclass(frozen=True, slots=True)
class Attachment:
    """A UE address and the N3-side interface on which it may be a source."""

    interface: str
    address: IPv4Address | IPv6Address


@dataclass(frozen=True, slots=True, kw_only=True)
class QosPoint:
    """An interface where packets wait for capacity, and an HTB tree says whose go first."""

    netns: str  # path
    interface: str
    capacity_bps: int
    uplink: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GnbPort:
    """A gNB whose QoS is ours to set, as in an emulated network; a real one does it itself.

    On both interfaces there must be an HTB tree a15: of its own, with its capacity as class a15:1.
    """

    netns: str  # path
    cell_interface: str
    downlink_bps: int
    n3_interface: str
    uplink_bps: int

    @property
    def points(self) -> tuple[QosPoint, QosPoint]:
        """Where its packets queue."""
        return (
            QosPoint(
                netns=self.netns, interface=self.cell_interface, capacity_bps=self.downlink_bps
            ),
            QosPoint(
                netns=self.netns,
                interface=self.n3_interface,
                capacity_bps=self.uplink_bps,
                uplink=True,
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GateConfig:
    """Interfaces, anchors and UEs of one user plane function."""

    n3_interfaces: tuple[str, ...]
    anchors: tuple[AnchorPort, ...]
    attachments: tuple[Attachment, ...]
    dscps: tuple[int, ...] = ()  # with which packets of QoS flows may be marked
    queue: PacketQueue | None = None  # None: nothing is parked, what has no lease is dropped
    subscriptions: tuple[Flow, ...] = ()  # whose first packets are parked and paged for
    ue_prefixes: tuple[IPv4Network, IPv6Network] = UE_PREFIXES
    service_prefixes: tuple[IPv4Network, IPv6Network] = SERVICE_PREFIXES

    def __post_init__(self) -> None:
        names = [anchor.name for anchor in self.anchors]
        if len(set(names)) != len(names):
            raise ValueError("two anchors have the same name")
        if len(names) > MAX_ANCHORS:
            raise ValueError(f"more than {MAX_ANCHORS} anchors")
        for interface in (*self.n3_interfaces, *(anchor.interface for anchor in self.anchors)):
            if not 0 < len(interface.encode()) < 16:
                raise ValueError(f"{interface!r} is no interface name")

    @property
    def anywhere(self) -> bool:
        """Whether every UE may come through every N3 interface."""
        addresses = {attachment.address for attachment in self.attachments}
        return len(set(self.attachments)) == len(addresses) * len(self.n3_interfaces)

    def mark(self, anchor: str) -> int:
        """Return the packet mark that steers to `anchor`. KeyError if there is no such anchor."""
        for number, port in enumerate(self.anchors, start=1):
            if port.name == anchor:
                return MARK_BASE | number
        raise KeyError(anchor)

    def anchor(self, mark: int) -> str:
        """Return the anchor that a mark steers to."""
        return self.anchors[(mark & ~MARK_MASK) - 1].name
