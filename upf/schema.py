"""The gate's nftables table: sets, maps, chains and rules. None of it carries authority.

    prerouting, raw      gate: to a service --> uplink: source is that UE's own? else spoofed_source
                             |                    `--> steer map: mark, accept; else no_lease_uplink
                             |--> from a service --> downlink: return set? else no_lease_downlink
                             |--> from N3 to an anchor's own address --> direct_to_anchor
                             |--> from an anchor to a UE, as no service --> no_lease_downlink
                             `--> as a UE or an anchor that is elsewhere --> spoofed_source
    prerouting, mangle   gate_tcp: the same for TCP, after conntrack
    forward              what a route of its own led past the gate: as there, or source_routed
                         a source that is not that UE's own --> spoofed_source; QoS class, DSCP

With a packet queue, what a lease holds (`hold`), and first packets of subscriptions (`subscribed`),
go to `park` before they would be steered or dropped; user space gives them no route, it lets them
run through the same chain again (NF_REPEAT), marked so that they are not parked twice.

Each reason to drop is a chain that counts. TCP connections are pinned by conntrack mark to the
anchor on which they began (`drain` set); all other service traffic stays out of conntrack. Each
address family has its own chains and sets (suffix 4 or 6), in one `inet` table so that one batch
changes all of it.
"""

from collections.abc import Iterator
from ipaddress import IPv4Network, IPv6Network

from pyroute2.netlink.nfnetlink.nftsocket import NFPROTO_INET, NFPROTO_IPV4

from upf import expressions as nft
from upf.config import MARK_BASE, MARK_MASK, RELEASED_MARK, GateConfig, PacketQueue, QueueBy
from upf.expressions import Expression
from upf.marking import dscp_chains, mark, qos_map
from upf.messages import Message
from upf.tables import (
    FAMILIES,
    IFNAME_BYTES,
    TYPE_IFNAME,
    TYPE_MARK,
    Family,
    Table,
    ifname_key,
    within,
)

VERSION = 9
PAGING_REFUSED, PAGING_OVERFLOW = "paging_refused", "paging_overflow"
DROP_REASONS = (
    *("no_lease_uplink", "no_lease_downlink"),
    *("spoofed_source", "direct_to_anchor", "source_routed"),
    *(PAGING_REFUSED, PAGING_OVERFLOW),
)

PREROUTING, FORWARD = 0, 2
PRIORITY_RAW, PRIORITY_MANGLE = -300, -150
IPPROTO_TCP = 6
LOOSE_SOURCE_ROUTE, STRICT_SOURCE_ROUTE = 131, 137  # IPv4 options (RFC 791)
TCP_FLAGS_OFFSET, TCP_SYN, TCP_ACK = 13, 0x02, 0x10


def _key(family: Family, *fields: str) -> list[Expression]:
    """Load a concatenated key into the registers from 1 on."""
    loads, offset = [], 0
    for name in fields:
        reg = nft.register(offset)
        match name:
            case "saddr":
                load = nft.payload(
                    nft.NETWORK_HEADER, family.source_offset, family.address_bytes, reg
                )
                offset += family.address_bytes
            case "daddr":
                load = nft.payload(
                    nft.NETWORK_HEADER, family.destination_offset, family.address_bytes, reg
                )
                offset += family.address_bytes
            case "iifname":
                load = nft.meta_load(nft.META_IIFNAME, reg)
                offset += IFNAME_BYTES
            case "mark":
                load = nft.meta_load(nft.META_MARK, reg)
                offset += 4
            case "ct mark":
                load = nft.ct_load_mark(reg)
                offset += 4
            case _:
                raise ValueError(name)
        loads.append(load)
    return loads


class Schema:
    """Builds the requests that make the gate's table for one configuration."""

    def __init__(self, config: GateConfig) -> None:
        self.config = config

    def messages(self, comment: str) -> Iterator[Message]:
        """Make the whole table."""
        table = Table(NFPROTO_INET)
        yield table.make(comment)
        yield from _sets(table)
        yield from _chains(table)
        for family in FAMILIES:
            yield from dscp_chains(table, family, self.config.dscps)
        for chain, expressions in self._rules():
            yield table.rule(chain, expressions)
        yield from table.elements(self._elements())

    def _elements(self) -> dict[str, dict[bytes, bytes]]:
        config = self.config
        marks = {anchor.name: nft.u32(config.mark(anchor.name)) for anchor in config.anchors}
        n3 = {ifname_key(name) for name in config.n3_interfaces}
        anchor_ports = {ifname_key(anchor.interface) for anchor in config.anchors}
        static: dict[str, list[bytes]] = {
            "n3": sorted(n3),
            "anchor_ports": sorted(anchor_ports),
            "edges": sorted(n3 | anchor_ports),
            "same": [mark + mark for mark in marks.values()],
            "home": [
                ifname_key(anchor.interface) + marks[anchor.name] for anchor in config.anchors
            ],
            "anchors4": [anchor.address4.packed for anchor in config.anchors],
            "anchors6": [anchor.address6.packed for anchor in config.anchors],
            "access4": [],
            "access6": [],
            "subscribed4": [],
            "subscribed6": [],
        }
        for flow in config.subscriptions:
            static[f"subscribed{flow.ue.version}"].append(flow.ue.packed + flow.service.packed)
        places = [(place.interface, place.address) for place in config.attachments]
        for anchor in config.anchors:
            places += [(anchor.interface, anchor.address4), (anchor.interface, anchor.address6)]
        for interface, address in places:
            static[f"access{address.version}"].append(ifname_key(interface) + address.packed)
        return {name: dict.fromkeys(keys, b"") for name, keys in static.items()}

    # Chains and rules

    def _rules(self) -> Iterator[tuple[str, list[Expression]]]:
        queue = self.config.queue
        for reason in DROP_REASONS:
            rejected = reason == PAGING_REFUSED and queue is not None and queue.reject
            end = nft.reject() if rejected else nft.verdict(nft.DROP)
            yield reason, [nft.counter(), end]
        yield "gate_tcp", [*_NOT_TCP, nft.verdict(nft.ACCEPT)]
        ours = [
            nft.meta_load(nft.META_MARK),
            nft.mask(nft.u32(MARK_MASK)),
            nft.compare(nft.u32(MARK_BASE)),
        ]
        yield "forward", [*ours, nft.verdict(nft.ACCEPT)]  # steered: its source was checked
        for option in (LOOSE_SOURCE_ROUTE, STRICT_SOURCE_ROUTE):
            # Its header shows where it goes on to only after this hook.
            has_option = [nft.ip_option_is_there(option), nft.compare(b"\1")]
            is_ipv4 = [nft.meta_load(nft.META_NFPROTO), nft.compare(bytes([NFPROTO_IPV4]))]
            source_routed = [*is_ipv4, *has_option, *_iif_in("edges")]
            yield "forward", [*source_routed, nft.goto("source_routed")]
        for family in FAMILIES:
            proto = [nft.meta_load(nft.META_NFPROTO), nft.compare(bytes([family.nfproto]))]
            index = FAMILIES.index(family)
            services = self.config.service_prefixes[index]
            ues = self.config.ue_prefixes[index]
            to_service = [*proto, *within(family, "daddr", services)]
            from_service = [*proto, *within(family, "saddr", services)]
            for chain, suffix in (("gate", ""), ("gate_tcp", "_tcp")):
                yield chain, [*to_service, nft.goto(family.name(f"uplink{suffix}"))]
                yield chain, [*from_service, nft.goto(family.name(f"downlink{suffix}"))]
            yield "forward", [*to_service, nft.goto("no_lease_uplink")]  # and not steered
            to_anchor = [*proto, *_key(family, "daddr"), nft.in_set(family.name("anchors"))]
            to_ue = [*proto, *within(family, "daddr", ues)]
            as_no_service = within(family, "saddr", services, absent=True)
            for chain in ("gate", "forward"):
                yield chain, [*to_anchor, *_iif_in("n3"), nft.goto("direct_to_anchor")]
                past_lease = [*to_ue, *_iif_in("anchor_ports"), *as_no_service]
                yield chain, [*past_lease, nft.goto("no_lease_downlink")]
            # Whom the control plane knows by address is who it is, also to this machine itself.
            known_as_anchor = [*_key(family, "saddr"), nft.in_set(family.name("anchors"))]
            for known in (within(family, "saddr", ues), known_as_anchor):
                spoofed = [*proto, *known, *_iif_in("edges"), *_not_its_own(family)]
                yield "gate", [*spoofed, nft.goto("spoofed_source")]
            yield "forward", [*proto, nft.goto(family.name("forward"))]
            yield from self._gate_rules(family)
            yield from self._tcp_rules(family)
            if queue is not None:
                yield from _park_rules(family, queue)
            yield from self._forward_rules(family, ues)

    def _gate_rules(self, family: Family) -> Iterator[tuple[str, list[Expression]]]:
        """What is not TCP is decided here, by the lease alone, and stays out of conntrack."""
        uplink, downlink = family.name("uplink"), family.name("downlink")
        yield uplink, [*_not_its_own(family), nft.goto("spoofed_source")]
        pass_on = [nft.notrack(), nft.verdict(nft.ACCEPT)]
        parked = self.config.queue is not None
        if parked:
            yield uplink, [*_NOT_TCP, *_fresh_in(family, "hold"), nft.goto(family.name("park"))]
        yield uplink, [*_NOT_TCP, *_steer(family), nft.meta_set(nft.META_MARK), *pass_on]
        if parked:
            yield uplink, [*_NOT_TCP, *_pair_in(family, "refused"), nft.goto(PAGING_REFUSED)]
            first = [*_NOT_TCP, *_fresh_in(family, "subscribed")]
            yield uplink, [*first, nft.goto(family.name("park"))]
        yield uplink, [*_NOT_TCP, nft.goto("no_lease_uplink")]
        yield downlink, [*_NOT_TCP, *_leased(family), *pass_on]
        yield downlink, [*_NOT_TCP, nft.goto("no_lease_downlink")]

    def _tcp_rules(self, family: Family) -> Iterator[tuple[str, list[Expression]]]:
        """A connection belongs to the anchor on which it began: conntrack's mark says which."""
        uplink, downlink = family.name("uplink_tcp"), family.name("downlink_tcp")
        # Where it began is draining: it goes on there, and does not count for the new lease.
        draining = [*_key(family, "saddr", "daddr", "ct mark"), nft.in_set(family.name("drain"))]
        to_pinned = [nft.ct_load_mark(), nft.meta_set(nft.META_MARK)]
        yield uplink, [*draining, *to_pinned, nft.verdict(nft.ACCEPT)]
        syn = [
            nft.payload(nft.TRANSPORT_HEADER, TCP_FLAGS_OFFSET, 1, nft.REG_1),
            nft.mask(bytes([TCP_SYN | TCP_ACK])),
            nft.compare(bytes([TCP_SYN])),
        ]
        parked = self.config.queue is not None
        if parked:  # connections that there are go on where they are
            yield uplink, [*syn, *_fresh_in(family, "hold"), nft.goto(family.name("park"))]
        # Else it must live where the lease steers. A SYN makes it live there: whatever conntrack
        # remembers under these ports was cut, and its client has gone on to another connection.
        yield uplink, [*_FRESH, nft.immediate(nft.u32(0)), nft.meta_set(nft.META_MARK)]
        yield uplink, [*_steer(family), nft.meta_set(nft.META_MARK)]
        yield uplink, [*syn, nft.meta_load(nft.META_MARK), nft.ct_set_mark()]
        same = [*_key(family, "mark", "ct mark"), nft.in_set("same")]
        yield uplink, [*same, nft.verdict(nft.ACCEPT)]
        if parked:
            unsteered = [nft.meta_load(nft.META_MARK), nft.compare(nft.u32(0))]
            first = [*syn, *unsteered, *_pair_in(family, "subscribed")]
            yield uplink, [*syn, *_pair_in(family, "refused"), nft.goto(PAGING_REFUSED)]
            yield uplink, [*first, nft.goto(family.name("park"))]
        yield uplink, [nft.goto("no_lease_uplink")]

        # What belongs to no connection (conntrack finds it invalid) is at home nowhere.
        at_home = [*_key(family, "iifname", "ct mark"), nft.in_set("home")]
        yield downlink, [*at_home, *_leased(family), nft.verdict(nft.ACCEPT)]
        yield downlink, [nft.goto("no_lease_downlink")]

    def _forward_rules(
        self, family: Family, ues: IPv4Network | IPv6Network
    ) -> Iterator[tuple[str, list[Expression]]]:
        """Nothing with a foreign source leaves N3; what a lease is about gets its QoS class.

        Whoever sends to a UE may be the server of a lease of QoS alone.
        """
        forward = family.name("forward")
        yield forward, [*_iif_in("n3"), *_not_its_own(family), nft.goto("spoofed_source")]
        marked = mark(family, _key(family, "daddr", "saddr"), dscp=True)
        yield forward, [*within(family, "daddr", ues), *marked]


_NOT_TCP = [
    nft.meta_load(nft.META_L4PROTO),
    nft.compare(bytes([IPPROTO_TCP]), operator=nft.CMP_NEQ),
]
_FRESH = [  # not parked before
    nft.meta_load(nft.META_MARK),
    nft.compare(nft.u32(RELEASED_MARK), operator=nft.CMP_NEQ),
]


def _park_rules(family: Family, queue: PacketQueue) -> Iterator[tuple[str, list[Expression]]]:
    """To user space, which is not woken by what is beyond the bounds of a UE."""
    park = family.name("park")
    yield park, [*_pair_in(family, "overflow"), nft.goto(PAGING_OVERFLOW)]
    by = nft.queue if queue.by is QueueBy.EXPRESSION else nft.queue_target
    yield park, [nft.counter(), by(queue.number)]


def _pair_in(family: Family, stem: str) -> list[Expression]:
    return [*_key(family, "saddr", "daddr"), nft.in_set(family.name(stem))]


def _fresh_in(family: Family, stem: str) -> list[Expression]:
    return [*_FRESH, *_pair_in(family, stem)]


def _iif_in(name: str) -> list[Expression]:
    return [nft.meta_load(nft.META_IIFNAME), nft.in_set(name)]


def _not_its_own(family: Family) -> list[Expression]:
    """Go on if the source may not come from this interface."""
    access = nft.in_set(family.name("access"), absent=True)
    return [*_key(family, "iifname", "saddr"), access]


def _steer(family: Family) -> list[Expression]:
    """Load the mark that the lease of this UE and service steers by; without one, go no further."""
    return [*_key(family, "saddr", "daddr"), nft.from_map(family.name("steer"))]


def _leased(family: Family) -> list[Expression]:
    """Go on if a lease lets this anchor answer this UE as this service."""
    return [*_key(family, "daddr", "saddr", "iifname"), nft.in_set(family.name("return"))]


def _sets(table: Table) -> Iterator[Message]:
    counter = {"NFTA_SET_EXPR": nft.counter()}
    yield table.set("n3", (TYPE_IFNAME,), IFNAME_BYTES)
    yield table.set("anchor_ports", (TYPE_IFNAME,), IFNAME_BYTES)
    yield table.set("edges", (TYPE_IFNAME,), IFNAME_BYTES)  # both
    yield table.set("same", (TYPE_MARK, TYPE_MARK), 8)
    yield table.set("home", (TYPE_IFNAME, TYPE_MARK), IFNAME_BYTES + 4)
    for family in FAMILIES:
        address, size = family.address_type, family.address_bytes
        yield table.set(family.name("access"), (TYPE_IFNAME, address), IFNAME_BYTES + size)
        yield table.set(family.name("anchors"), (address,), size)
        yield table.set(
            family.name("steer"),
            (address, address),
            2 * size,
            flags={"NFT_SET_MAP", "NFT_SET_TIMEOUT"},
            NFTA_SET_DATA_TYPE=TYPE_MARK,
            NFTA_SET_DATA_LEN=4,
            **counter,
        )
        yield qos_map(table, family, family.name("qos"))
        timed = {"NFT_SET_TIMEOUT"}
        yield table.set(
            family.name("return"),
            (address, address, TYPE_IFNAME),
            2 * size + IFNAME_BYTES,
            flags=timed,
            **counter,
        )
        yield table.set(
            family.name("drain"), (address, address, TYPE_MARK), 2 * size + 4, flags=timed
        )
        for stem in ("hold", "overflow", "refused"):
            yield table.set(family.name(stem), (address, address), 2 * size, flags=timed)
        yield table.set(family.name("subscribed"), (address, address), 2 * size)


def _chains(table: Table) -> Iterator[Message]:
    for reason in DROP_REASONS:
        yield table.chain(reason)
    for family in FAMILIES:
        for stem in ("uplink", "downlink", "uplink_tcp", "downlink_tcp", "forward", "park"):
            yield table.chain(family.name(stem))
    yield table.chain("gate", (PREROUTING, PRIORITY_RAW))
    yield table.chain("gate_tcp", (PREROUTING, PRIORITY_MANGLE))
    yield table.chain("forward", (FORWARD, PRIORITY_MANGLE))
