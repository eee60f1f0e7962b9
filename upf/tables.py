"""Requests that make an nftables table: its sets, chains, rules and static elements."""

from collections.abc import Iterator, Mapping
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
from upf.expressions import Expression
from upf.messages import TABLE, Message, element_message, key_attribute, message

IFNAME_BYTES = 16
NFT_DATA_VERDICT = 0xFFFFFF00  # data type of verdict maps
MOST_ELEMENTS = 256  # in one request

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


def within(
    family: Family, field: str, prefix: IPv4Network | IPv6Network, *, absent: bool = False
) -> list[Expression]:
    """Go on only if this address field (`saddr`, `daddr`) is (or is not) within a prefix."""
    offset = family.source_offset if field == "saddr" else family.destination_offset
    return [
        nft.payload(nft.NETWORK_HEADER, offset, family.address_bytes, nft.register(0)),
        nft.mask(prefix.netmask.packed),
        nft.compare(prefix.network_address.packed, operator=nft.CMP_NEQ if absent else nft.CMP_EQ),
    ]


@dataclass(slots=True)
class Table:
    """Builds requests about a table of ours in one nftables family."""

    family: int  # NFPROTO_INET, or what an older version had
    name: str = TABLE
    _sets: int = 0

    def make(self, comment: str) -> Message:
        """Make the table."""
        return message(
            nft_table_msg,
            NFT_MSG_NEWTABLE,
            family=self.family,
            NFTA_TABLE_NAME=self.name,
            NFTA_TABLE_USERDATA=comment,
        )

    def remove(self) -> Message:
        """Delete the table with all that is in it."""
        return message(
            nft_table_msg, NFT_MSG_DELTABLE, family=self.family, NFTA_TABLE_NAME=self.name
        )

    def set(self, name: str, types: tuple[int, ...], length: int, **extra: Any) -> Message:
        """Make a set or map; `types` and `length` (bytes) are those of its key."""
        self._sets += 1
        key_type = 0
        for kind in types:
            key_type = key_type << 6 | kind
        host_order = nft.u32(1)  # how nft prints marks, class ids and interface names
        order = []
        if types == (TYPE_IFNAME,):
            order.append(("NFTNL_UDATA_SET_KEYBYTEORDER", host_order))
        if extra.get("NFTA_SET_DATA_TYPE", NFT_DATA_VERDICT) != NFT_DATA_VERDICT:
            order.append(("NFTNL_UDATA_SET_DATABYTEORDER", host_order))
        return message(
            nft_set_msg,
            NFT_MSG_NEWSET,
            family=self.family,
            NFTA_SET_TABLE=self.name,
            NFTA_SET_NAME=name,
            NFTA_SET_ID=self._sets,
            NFTA_SET_FLAGS=extra.pop("flags", set()),
            NFTA_SET_KEY_TYPE=key_type,
            NFTA_SET_KEY_LEN=length,
            NFTA_SET_USERDATA=order,
            **extra,
        )

    def chain(self, name: str, hook: tuple[int, int] | None = None) -> Message:
        """Make a chain; a base chain has a hook (number, priority)."""
        base: dict[str, Any] = {}
        if hook is not None:
            number, priority = hook
            attributes = [("NFTA_HOOK_HOOKNUM", number), ("NFTA_HOOK_PRIORITY", priority)]
            base = {
                "NFTA_CHAIN_HOOK": {"attrs": attributes},
                "NFTA_CHAIN_POLICY": nft.ACCEPT,
                "NFTA_CHAIN_TYPE": "filter",
            }
        return message(
            nft_chain_msg,
            NFT_MSG_NEWCHAIN,
            family=self.family,
            NFTA_CHAIN_TABLE=self.name,
            NFTA_CHAIN_NAME=name,
            **base,
        )

    def rule(self, chain: str, expressions: list[Expression]) -> Message:
        """Append a rule to a chain."""
        return message(
            nft_rule_msg,
            NFT_MSG_NEWRULE,
            family=self.family,
            NFTA_RULE_TABLE=self.name,
            NFTA_RULE_CHAIN=chain,
            NFTA_RULE_EXPRESSIONS=expressions,
        )

    def elements(self, sets: Mapping[str, Mapping[bytes, bytes]]) -> Iterator[Message]:
        """Fill sets and maps with elements that have no timeout: set -> key -> data."""
        for name, elements in sets.items():
            encoded = [
                {"attrs": [key_attribute(key), *data_attribute(data)]}
                for key, data in elements.items()
            ]
            for start in range(0, len(encoded), MOST_ELEMENTS):
                yield element_message(
                    NFT_MSG_NEWSETELEM, name, encoded[start : start + MOST_ELEMENTS]
                )


def data_attribute(data: bytes) -> list[tuple[str, Any]]:
    """Return the data of a map element as attributes: none without data."""
    return [("NFTA_SET_ELEM_DATA", {"attrs": [("NFTA_DATA_VALUE", data)]})] if data else []
