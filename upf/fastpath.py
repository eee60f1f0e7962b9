"""The fast path: what a lease lets through is forwarded where it comes in, past the IP stack.

A table of its own, family `netdev`, with chains at the ingress of the N3 and N6 interfaces:

    n3, ingress   whole datagram, its source in access --> up map: out to the anchor
    n6, ingress   whole datagram --> path map: where is its UE? down map: QoS class, out to the UE

It only ever forwards what the gate (`upf.schema`) would let through: `up` and `down` elements are
installed in one batch with their lease's other elements and have the same timeout. Whatever else
comes, or looks in any way unusual (not UDP, fragments, IP options, extension headers, a time to
live that ends here, VLAN tags, more than the least MTU), goes to the gate as if this were not
there, and the gate decides, drops and counts. Others' rules in the router's forward hook do not see
what goes this way.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyroute2.netlink.nfnetlink.nftsocket import NFPROTO_NETDEV

from upf import expressions as nft
from upf.config import GateConfig
from upf.expressions import Expression
from upf.marking import dscp_chains, marking_map
from upf.messages import FAST_PREFIX, Message
from upf.netns import route_socket
from upf.tables import FAMILIES, TYPE_CLASSID, TYPE_IFINDEX, Family, Table

INGRESS, PRIORITY = 0, 0
INDEX_BYTES = 4
PACKET_HOST = 0
IPPROTO_UDP = 17
ETHER_TYPE_OFFSET, ETHER_TYPES = 12, {4: b"\x08\x00", 6: b"\x86\xdd"}
IPV6_HEADER_BYTES = 40
UP, DOWN, MARKED, PATH, ACCESS = "fast_up", "fast_down", "fast_marked", "fast_path", "fast_access"


class FastPathError(Exception):
    """The interfaces are not as a fast path needs them."""


@dataclass(frozen=True, slots=True)
class Ports:
    """The user plane's interfaces as the kernel knows them, by name."""

    index: Mapping[str, int]
    mtu_bytes: Mapping[str, int]


def ports(netns_path: str, config: GateConfig) -> Ports:
    """Look the interfaces of N3 and N6 up. Raises FastPathError if one is missing."""
    wanted = dict.fromkeys((*config.n3_interfaces, *n6_interfaces(config)))
    with route_socket(netns_path) as routes:
        found = {link.get_attr("IFLA_IFNAME"): link for link in routes.get_links()}
    missing = [name for name in wanted if name not in found]
    if missing:
        raise FastPathError(f"there is no interface {', '.join(missing)}")
    return Ports(
        index={name: int(found[name]["index"]) for name in wanted},
        mtu_bytes={name: int(found[name].get_attr("IFLA_MTU")) for name in wanted},
    )


def n6_interfaces(config: GateConfig) -> tuple[str, ...]:
    """Return the interfaces towards anchors, each once."""
    return tuple(dict.fromkeys(anchor.interface for anchor in config.anchors))


class FastPath:
    """Builds the requests that make the fast path's table for one configuration."""

    def __init__(self, config: GateConfig, ports: Ports) -> None:
        self.config = config
        self.ports = ports
        self._access: dict[str, dict[bytes, bytes]] = {each.name(ACCESS): {} for each in FAMILIES}
        for place in config.attachments:
            key = nft.u32(ports.index[place.interface]) + place.address.packed
            self._access[f"{ACCESS}{place.address.version}"][key] = b""

    def messages(self, comment: str) -> Iterator[Message]:
        """Make the whole table."""
        config, table = self.config, Table(NFPROTO_NETDEV)
        n3, n6 = config.n3_interfaces, n6_interfaces(config)
        yield table.make(comment)
        for family in FAMILIES:
            yield from self._sets(table, family)
        yield table.chain("n3", (INGRESS, PRIORITY), n3)
        yield table.chain("n6", (INGRESS, PRIORITY), n6)
        for family in FAMILIES:
            out = family.name("out")
            yield table.chain(out)
            yield table.rule(out, _out(family))
            goto_out = [nft.goto(out)]
            yield from dscp_chains(table, family, config.dscps, FAST_PREFIX, goto_out)
        for family in FAMILIES:
            uplink = [*_datagram(family), *self._fits(family, n3, n6), *self._uplink(family)]
            yield table.rule("n3", uplink)
            answer = family.name("answer")
            yield table.chain(answer)
            yield table.rule(answer, _downlink(family))
            yield table.rule(answer, _marked(family))
            datagram = [*_datagram(family), *self._fits(family, n6, n3)]
            yield table.rule("n6", [*datagram, nft.goto(answer)])
        yield from table.elements(self._access)

    def _sets(self, table: Table, family: Family) -> Iterator[Message]:
        address, size = family.address_type, family.address_bytes
        hop = {  # where to: an interface and a neighbour on it
            "NFTA_SET_DATA_TYPE": TYPE_IFINDEX << 6 | address,
            "NFTA_SET_DATA_LEN": INDEX_BYTES + size,
        }
        counted = {"NFTA_SET_EXPR": nft.counter(), "flags": {"NFT_SET_MAP", "NFT_SET_TIMEOUT"}}
        # With a known size the kernel takes a hash table that it looks up sooner.
        most = max(1, len(self._access[family.name(ACCESS)]))
        sized: dict[str, Any] = {"NFTA_SET_DESC": {"attrs": [("NFTA_SET_DESC_SIZE", most)]}}
        source = (TYPE_IFINDEX, address)
        yield table.set(family.name(ACCESS), source, INDEX_BYTES + size, **sized)
        yield table.set(family.name(PATH), (address,), size, flags={"NFT_SET_MAP"}, **hop, **sized)
        yield table.set(family.name(UP), (address, address), 2 * size, **counted, **hop)
        yield table.set(
            family.name(DOWN),
            (address, address, TYPE_IFINDEX),
            2 * size + INDEX_BYTES,
            **counted,
            NFTA_SET_DATA_TYPE=TYPE_CLASSID,
            NFTA_SET_DATA_LEN=4,
        )
        answers = (address, address, TYPE_IFINDEX)
        yield marking_map(table, family.name(MARKED), answers, 2 * size + INDEX_BYTES, **counted)

    def _uplink(self, family: Family) -> list[Expression]:
        """Incoming interface . UE may be a source; UE . service is leased: on to its anchor.

        Where every UE may come through every N3 interface, a lease says as much about its UE.
        """
        index, ue = nft.register(0), nft.register(INDEX_BYTES)
        service = nft.register(INDEX_BYTES + family.address_bytes)
        allowed: list[Expression] = []
        if not self.config.anywhere:
            allowed = [
                nft.meta_load(nft.META_IIF, index),
                nft.in_set(family.name(ACCESS), reg=index),
            ]
        return [
            _address(family, family.source_offset, ue),
            *allowed,
            _address(family, family.destination_offset, service),
            nft.from_map(family.name(UP), key=ue, reg=index),
            nft.forward(family.nfproto, device=index, neighbour=ue),
        ]

    def _fits(
        self, family: Family, comes: Sequence[str], leaves: Sequence[str]
    ) -> list[Expression]:
        """Go on with what is no longer than the least MTU ahead, if more may come."""
        mtu = self.ports.mtu_bytes
        least = min(mtu[name] for name in leaves)
        if least >= max(mtu[name] for name in comes):
            return []
        offset, limit = (2, least) if family.version == 4 else (4, least - IPV6_HEADER_BYTES)
        length = nft.payload(nft.NETWORK_HEADER, offset, 2, nft.REG_1)
        return [length, nft.compare(limit.to_bytes(2), operator=nft.CMP_LTE)]


# What follows is written so that the kernel has a short way for each expression: aligned loads of
# 1, 2 or 4 bytes, masks of 4 bytes, comparisons for equality. It takes 8 ns then, instead of 20.


def _load(offset: int, length: int) -> Expression:
    return nft.payload(nft.NETWORK_HEADER, offset, length, nft.register(0))


def _equal(value: bytes) -> Expression:
    return nft.compare(value, nft.register(0))


def _masked(bits: bytes, value: bytes, operator: int = nft.CMP_EQ) -> list[Expression]:
    first = nft.register(0)
    return [nft.mask(bits, first), nft.compare(value, first, operator)]


def _datagram(family: Family) -> list[Expression]:
    """Go on with a whole UDP datagram for this router, without options, that may travel on."""
    for_this_router = [nft.meta_load(nft.META_PKTTYPE), nft.compare(bytes([PACKET_HOST]))]
    # Not by meta protocol, which does not tell of a VLAN tag.
    untagged = [
        nft.payload(nft.LINK_HEADER, ETHER_TYPE_OFFSET, 2, nft.register(0)),
        _equal(ETHER_TYPES[family.version]),
    ]
    udp = bytes([IPPROTO_UDP])
    if family.version == 4:
        header = [
            *(_load(0, 1), _equal(b"\x45")),  # version, length of the header
            *(_load(4, 4), *_masked(b"\0\0\x3f\xff", bytes(4))),  # no fragment
            *(_load(9, 1), _equal(udp)),
            *(_load(8, 4), *_masked(b"\xfe\0\0\0", bytes(4), nft.CMP_NEQ)),  # time to live: 2 +
        ]
    else:
        header = [
            *(_load(0, 4), *_masked(b"\xf0\0\0\0", b"\x60\0\0\0")),  # version
            *(_load(6, 1), _equal(udp)),  # and no extension header before it
            *(_load(4, 4), *_masked(b"\0\0\0\xfe", bytes(4), nft.CMP_NEQ)),  # hop limit: 2 +
        ]
    return [*for_this_router, *untagged, *header]


def _address(family: Family, offset: int, reg: int) -> Expression:
    return nft.payload(nft.NETWORK_HEADER, offset, family.address_bytes, reg)


def _downlink(family: Family) -> list[Expression]:
    """The UE has a path; service . UE . incoming interface is leased: its class, and out.

    The lease comes last, for to be found there is to be counted.
    """
    first, ue = nft.register(0), nft.register(family.address_bytes)
    device, neighbour = _hop(family)
    return [
        *_answer_key(family),
        nft.from_map(family.name(PATH), key=ue, reg=device),
        nft.from_map(family.name(DOWN), key=first, reg=first),
        nft.meta_set(nft.META_PRIORITY, first),
        nft.forward(family.nfproto, device=device, neighbour=neighbour),
    ]


def _marked(family: Family) -> list[Expression]:
    """As `_downlink`, for leases whose packets get a DSCP: to the chain that writes it."""
    class_id, dscp = nft.register(0), nft.register(4)
    return [
        *_answer_key(family),
        nft.from_map(family.name(MARKED), key=class_id, reg=class_id),
        nft.meta_set(nft.META_PRIORITY, class_id),
        nft.from_map(f"{FAST_PREFIX}{family.name('dscp')}", key=dscp, reg=nft.REG_VERDICT),
    ]


def _out(family: Family) -> list[Expression]:
    """To where the UE is."""
    device, neighbour = _hop(family)
    ue = nft.register(0)
    return [
        _address(family, family.destination_offset, ue),
        nft.from_map(family.name(PATH), key=ue, reg=device),
        nft.forward(family.nfproto, device=device, neighbour=neighbour),
    ]


def _hop(family: Family) -> tuple[int, int]:
    """Return the registers of an interface and of a neighbour on it."""
    first = 2 * family.address_bytes + INDEX_BYTES
    return nft.register(first), nft.register(first + INDEX_BYTES)


def _answer_key(family: Family) -> list[Expression]:
    """Load service . UE . incoming interface."""
    size = family.address_bytes
    service, ue, index = (nft.register(offset) for offset in (0, size, 2 * size))
    return [
        _address(family, family.source_offset, service),
        _address(family, family.destination_offset, ue),
        nft.meta_load(nft.META_IIF, index),
    ]
