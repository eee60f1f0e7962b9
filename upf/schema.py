"""The gate's nftables table: sets, maps, chains and rules. None of it carries authority.

    prerouting, raw      gate: to a service --> uplink: source is that UE's own? else spoofed_source
                             |                    `--> steer map: mark, accept; else no_lease_uplink
                             |--> from a service --> downlink: return set? else no_lease_downlink
                             |--> from N3 to an anchor's own address --> direct_to_anchor
                             `--> from an anchor to a UE, as no service --> no_lease_downlink
    prerouting, mangle   gate_tcp: the same for TCP, after conntrack
    forward              a source that is not that UE's own --> spoofed_source; QoS class

Each reason to drop is a chain that counts. TCP connections are pinned by conntrack mark to the
anchor on which they began (`drain` set); all other service traffic stays out of conntrack. Each
address family has its own chains and sets (suffix 4 or 6), in one `inet` table so that one batch
changes all of it.
"""

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from typing import Any

from pyroute2.netlink.nfnetlink.nftsocket import (
    NFPROTO_IPV4,
    NFPROTO_IPV6,
    NFT_MSG_DELTABLE,
    NFT_MSG_NEWCHAIN,
    NFT_MSG_NEWRULE,
    NFT_MSG_NEWSET,
    NFT_MSG_NEWSETELEM,
    NFT_MSG_NEWTABLE,
    nft_chain_msg,
    nft_rule_msg,
    nft_set_msg,
    nft_table_msg,
)

from upf import expressions as nft
from upf.config import MARK_BASE, MARK_MASK, GateConfig
from upf.expressions import Expression
from upf.messages import TABLE, Message, batch, element_message, key_attribute, message

VERSION = 4
DROP_REASONS = ("no_lease_uplink", "no_lease_downlink", "spoofed_source", "direct_to_anchor")

PREROUTING, FORWARD = 0, 2
PRIORITY_RAW, PRIORITY_MANGLE = -300, -150
IFNAME_BYTES = 16
IPPROTO_TCP = 6
TCP_FLAGS_OFFSET, TCP_SYN, TCP_ACK = 13, 0x02, 0x10

# nftables' own numbers for data types, so that `nft list table` prints the sets readably.
TYPE_MARK, TYPE_CLASSID, TYPE_IFNAME = 19, 23, 41


@dataclass(frozen=True, slots=True)
class Family:
    """Where one IP version keeps its addresses, and the suffix of its chains and sets."""

    version: int
    nfproto: int
    address_type: int
    address_bytes: int
    source_offset: int
    destination_offset: int

    def name(self, stem: str) -> str:
        """Return the name of this family's chain or set."""
        return f"{stem}{self.version}"


IPV4 = Family(4, NFPROTO_IPV4, 7, 4, 12, 16)
IPV6 = Family(6, NFPROTO_IPV6, 8, 16, 8, 24)
FAMILIES = (IPV4, IPV6)


def ifname_key(name: str) -> bytes:
    """Return an interface name as the kernel compares it: 16 bytes, zero-padded."""
    return name.encode().ljust(IFNAME_BYTES, b"\0")


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


def _within(family: Family, field: str, prefix: IPv4Network | IPv6Network) -> list[Expression]:
    return [
        *_key(family, field),
        nft.mask(prefix.netmask.packed),
        nft.compare(prefix.network_address.packed),
    ]


def removal() -> list[Message]:
    """Return the batch that deletes the table with all that is in it."""
    return batch([_removal()])


def _removal() -> Message:
    return message(nft_table_msg, NFT_MSG_DELTABLE, NFTA_TABLE_NAME=TABLE)


class Schema:
    """Builds the batch that makes the gate for one configuration."""

    def __init__(self, config: GateConfig) -> None:
        self.config = config

    def fingerprint(self) -> str:
        """Return what tells this table from one of another version or configuration."""
        digest = hashlib.sha256(repr((VERSION, self.config)).encode()).hexdigest()[:16]
        return f"ai-paging gate {VERSION} {digest}"

    def batch(self, *, replace: bool) -> list[Message]:
        """Return the whole table as one batch; `replace` deletes a table of that name first."""
        messages: list[Message] = []
        if replace:
            messages.append(_removal())
        messages.append(
            message(
                nft_table_msg,
                NFT_MSG_NEWTABLE,
                NFTA_TABLE_NAME=TABLE,
                NFTA_TABLE_USERDATA=self.fingerprint(),
            )
        )
        messages += self._sets()
        messages += self._chains()
        for chain, expressions in self._rules():
            messages.append(
                message(
                    nft_rule_msg,
                    NFT_MSG_NEWRULE,
                    NFTA_RULE_TABLE=TABLE,
                    NFTA_RULE_CHAIN=chain,
                    NFTA_RULE_EXPRESSIONS=expressions,
                )
            )
        messages += self._elements()
        return batch(messages)

    # Sets and maps

    def _sets(self) -> Iterator[Message]:
        number = 0
        host_order = struct.pack("=I", 1)  # how nft prints marks, class ids and interface names

        def make(name: str, types: tuple[int, ...], length: int, **extra: Any) -> Message:
            nonlocal number
            number += 1
            key_type = 0
            for kind in types:
                key_type = key_type << 6 | kind
            flags = extra.pop("flags", set())
            order = []
            if types == (TYPE_IFNAME,):
                order.append(("NFTNL_UDATA_SET_KEYBYTEORDER", host_order))
            if "NFTA_SET_DATA_TYPE" in extra:
                order.append(("NFTNL_UDATA_SET_DATABYTEORDER", host_order))
            return message(
                nft_set_msg,
                NFT_MSG_NEWSET,
                NFTA_SET_TABLE=TABLE,
                NFTA_SET_NAME=name,
                NFTA_SET_ID=number,
                NFTA_SET_FLAGS=flags,
                NFTA_SET_KEY_TYPE=key_type,
                NFTA_SET_KEY_LEN=length,
                NFTA_SET_USERDATA=order,
                **extra,
            )

        counter = {"NFTA_SET_EXPR": nft.counter()}
        yield make("n3", (TYPE_IFNAME,), IFNAME_BYTES)
        yield make("anchor_ports", (TYPE_IFNAME,), IFNAME_BYTES)
        yield make("same", (TYPE_MARK, TYPE_MARK), 8)
        yield make("home", (TYPE_IFNAME, TYPE_MARK), IFNAME_BYTES + 4)
        for family in FAMILIES:
            address, size = family.address_type, family.address_bytes
            yield make(family.name("access"), (TYPE_IFNAME, address), IFNAME_BYTES + size)
            yield make(family.name("anchors"), (address,), size)
            for stem, data_type, extra in (
                ("steer", TYPE_MARK, counter),
                ("qos", TYPE_CLASSID, {}),
            ):
                yield make(
                    family.name(stem),
                    (address, address),
                    2 * size,
                    flags={"NFT_SET_MAP", "NFT_SET_TIMEOUT"},
                    NFTA_SET_DATA_TYPE=data_type,
                    NFTA_SET_DATA_LEN=4,
                    **extra,
                )
            timed = {"NFT_SET_TIMEOUT"}
            yield make(
                family.name("return"),
                (address, address, TYPE_IFNAME),
                2 * size + IFNAME_BYTES,
                flags=timed,
                **counter,
            )
            yield make(
                family.name("drain"), (address, address, TYPE_MARK), 2 * size + 4, flags=timed
            )

    def _elements(self) -> Iterator[Message]:
        config = self.config
        marks = {anchor.name: nft.u32(config.mark(anchor.name)) for anchor in config.anchors}
        static: dict[str, list[bytes]] = {
            "n3": [ifname_key(name) for name in config.n3_interfaces],
            "anchor_ports": sorted({ifname_key(anchor.interface) for anchor in config.anchors}),
            "same": [mark + mark for mark in marks.values()],
            "home": [
                ifname_key(anchor.interface) + marks[anchor.name] for anchor in config.anchors
            ],
            "anchors4": [anchor.address4.packed for anchor in config.anchors],
            "anchors6": [anchor.address6.packed for anchor in config.anchors],
            "access4": [],
            "access6": [],
        }
        for attachment in config.attachments:
            static[f"access{attachment.address.version}"].append(
                ifname_key(attachment.interface) + attachment.address.packed
            )
        for name, keys in static.items():
            for start in range(0, len(keys), 256):
                yield element_message(
                    NFT_MSG_NEWSETELEM,
                    name,
                    [{"attrs": [key_attribute(key)]} for key in keys[start : start + 256]],
                )

    # Chains and rules

    def _chains(self) -> Iterator[Message]:
        def make(name: str, hook: tuple[int, int] | None = None) -> Message:
            base: dict[str, Any] = {}
            if hook is not None:
                number, priority = hook
                base = {
                    "NFTA_CHAIN_HOOK": {
                        "attrs": [
                            ("NFTA_HOOK_HOOKNUM", number),
                            ("NFTA_HOOK_PRIORITY", priority),
                        ]
                    },
                    "NFTA_CHAIN_POLICY": nft.ACCEPT,
                    "NFTA_CHAIN_TYPE": "filter",
                }
            return message(
                nft_chain_msg,
                NFT_MSG_NEWCHAIN,
                NFTA_CHAIN_TABLE=TABLE,
                NFTA_CHAIN_NAME=name,
                **base,
            )

        for reason in DROP_REASONS:
            yield make(reason)
        for family in FAMILIES:
            for stem in ("uplink", "downlink", "uplink_tcp", "downlink_tcp", "forward"):
                yield make(family.name(stem))
        yield make("gate", (PREROUTING, PRIORITY_RAW))
        yield make("gate_tcp", (PREROUTING, PRIORITY_MANGLE))
        yield make("forward", (FORWARD, PRIORITY_MANGLE))

    def _rules(self) -> Iterator[tuple[str, list[Expression]]]:
        for reason in DROP_REASONS:
            yield reason, [nft.counter(), nft.verdict(nft.DROP)]
        yield "gate_tcp", [*_NOT_TCP, nft.verdict(nft.ACCEPT)]
        ours = [
            nft.meta_load(nft.META_MARK),
            nft.mask(nft.u32(MARK_MASK)),
            nft.compare(nft.u32(MARK_BASE)),
        ]
        yield "forward", [*ours, nft.verdict(nft.ACCEPT)]  # steered: its source was checked
        for family in FAMILIES:
            proto = [nft.meta_load(nft.META_NFPROTO), nft.compare(bytes([family.nfproto]))]
            index = FAMILIES.index(family)
            services = self.config.service_prefixes[index]
            ues = self.config.ue_prefixes[index]
            to_service = [*proto, *_within(family, "daddr", services)]
            from_service = [*proto, *_within(family, "saddr", services)]
            for chain, suffix in (("gate", ""), ("gate_tcp", "_tcp")):
                yield chain, [*to_service, nft.goto(family.name(f"uplink{suffix}"))]
                yield chain, [*from_service, nft.goto(family.name(f"downlink{suffix}"))]
            to_anchor = [*proto, *_key(family, "daddr"), nft.in_set(family.name("anchors"))]
            yield "gate", [*to_anchor, *_iif_in("n3"), nft.goto("direct_to_anchor")]
            to_ue = [*proto, *_within(family, "daddr", ues)]
            yield "gate", [*to_ue, *_iif_in("anchor_ports"), nft.goto("no_lease_downlink")]
            yield "forward", [*proto, nft.goto(family.name("forward"))]
            yield from self._gate_rules(family)
            yield from self._tcp_rules(family)
            yield from self._forward_rules(family, ues)

    def _gate_rules(self, family: Family) -> Iterator[tuple[str, list[Expression]]]:
        """What is not TCP is decided here, by the lease alone, and stays out of conntrack."""
        uplink, downlink = family.name("uplink"), family.name("downlink")
        not_its_own = nft.in_set(family.name("access"), absent=True)
        yield uplink, [*_key(family, "iifname", "saddr"), not_its_own, nft.goto("spoofed_source")]
        pass_on = [nft.notrack(), nft.verdict(nft.ACCEPT)]
        yield uplink, [*_NOT_TCP, *_steer(family), nft.meta_set(nft.META_MARK), *pass_on]
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
        # Else it must live where the lease steers; the SYN of an unknown one makes it live there.
        yield uplink, [nft.immediate(nft.u32(0)), nft.meta_set(nft.META_MARK)]
        yield uplink, [*_steer(family), nft.meta_set(nft.META_MARK)]
        syn = [
            nft.payload(nft.TRANSPORT_HEADER, TCP_FLAGS_OFFSET, 1, nft.REG_1),
            nft.mask(bytes([TCP_SYN | TCP_ACK])),
            nft.compare(bytes([TCP_SYN])),
        ]
        unpinned = [nft.ct_load_mark(), nft.compare(nft.u32(0))]
        yield uplink, [*syn, *unpinned, nft.meta_load(nft.META_MARK), nft.ct_set_mark()]
        same = [*_key(family, "mark", "ct mark"), nft.in_set("same")]
        yield uplink, [*same, nft.verdict(nft.ACCEPT)]
        yield uplink, [nft.goto("no_lease_uplink")]

        not_home = [*_key(family, "iifname", "ct mark"), nft.in_set("home", absent=True)]
        yield downlink, [*not_home, nft.goto("no_lease_downlink")]
        yield downlink, [*_leased(family), nft.verdict(nft.ACCEPT)]
        yield downlink, [nft.goto("no_lease_downlink")]

    def _forward_rules(
        self, family: Family, ues: IPv4Network | IPv6Network
    ) -> Iterator[tuple[str, list[Expression]]]:
        """Nothing with a foreign source leaves N3; what a lease is about gets its QoS class.

        Whoever sends to a UE may be the server of a lease of QoS alone.
        """
        forward = family.name("forward")
        not_its_own = nft.in_set(family.name("access"), absent=True)
        spoofed = [*_iif_in("n3"), *_key(family, "iifname", "saddr"), not_its_own]
        yield forward, [*spoofed, nft.goto("spoofed_source")]
        qos = [*_key(family, "daddr", "saddr"), nft.from_map(family.name("qos"))]
        yield forward, [*_within(family, "daddr", ues), *qos, nft.meta_set(nft.META_PRIORITY)]


_NOT_TCP = [
    nft.meta_load(nft.META_L4PROTO),
    nft.compare(bytes([IPPROTO_TCP]), operator=nft.CMP_NEQ),
]


def _iif_in(name: str) -> list[Expression]:
    return [nft.meta_load(nft.META_IIFNAME), nft.in_set(name)]


def _steer(family: Family) -> list[Expression]:
    """Load the mark that the lease of this UE and service steers by; without one, go no further."""
    return [*_key(family, "saddr", "daddr"), nft.from_map(family.name("steer"))]


def _leased(family: Family) -> list[Expression]:
    """Go on if a lease lets this anchor answer this UE as this service."""
    return [*_key(family, "daddr", "saddr", "iifname"), nft.in_set(family.name("return"))]
