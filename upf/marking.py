"""How a lease's packets are marked inside a kernel: with their class in HTB, and their DSCP.

A map from UE and server to both, whose elements end with their leases: `qos4` and `qos6` in the
gate, `ran_qos4` and `ran_qos6` at a gNB. The class becomes the packet's priority, which HTB reads.
For the DSCP a static map names the chain that writes it: before Linux 6.13 nftables cannot write
one from a register without writing the ECN bits beside it.
"""

import struct
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from pyroute2.netlink.nfnetlink.nftsocket import NFT_MSG_NEWSETELEM

from upf import expressions as nft
from upf.expressions import Expression
from upf.messages import Message, element_message, key_attribute
from upf.tables import NFT_DATA_VERDICT, TYPE_CLASSID, Family, Table

TYPE_DSCP = 36
_DATA = struct.Struct("=IB3x")
_IPV4_CHECKSUM_OFFSET = 10


class Marking(NamedTuple):
    """A tc class (0: best effort) and a DSCP (0: as the sender marked it)."""

    class_id: int
    dscp: int

    @classmethod
    def decode(cls, data: bytes) -> "Marking":
        """Return what an element's data says."""
        return cls(*_DATA.unpack(data))


@lru_cache(maxsize=4_096)
def encode_marking(class_id: int, dscp: int) -> bytes:
    """Return the data of an element."""
    return _DATA.pack(class_id, dscp)


def qos_map(table: Table, family: Family, name: str) -> Message:
    """Make the map from UE and server to their marking."""
    return table.set(
        name,
        (family.address_type,) * 2,
        2 * family.address_bytes,
        flags={"NFT_SET_MAP", "NFT_SET_TIMEOUT"},
        NFTA_SET_DATA_TYPE=TYPE_CLASSID << 6 | TYPE_DSCP,
        NFTA_SET_DATA_LEN=_DATA.size,
    )


def dscp_chains(
    table: Table, family: Family, dscps: Sequence[int], prefix: str = ""
) -> Iterator[Message]:
    """Make a chain that writes each of these code points, and the map that names it.

    `prefix`: of the map's name.
    """
    name = f"{prefix}{family.name('dscp')}"
    yield table.set(
        name, (TYPE_DSCP,), 1, flags={"NFT_SET_MAP"}, NFTA_SET_DATA_TYPE=NFT_DATA_VERDICT
    )
    elements = []
    for dscp in dscps:
        chain = f"{family.name('dscp')}_{dscp}"
        yield table.chain(chain)
        yield table.rule(chain, _write_dscp(family, dscp))
        verdict = [("NFTA_VERDICT_CODE", nft.GOTO), ("NFTA_VERDICT_CHAIN", chain)]
        data = {"attrs": [("NFTA_DATA_VERDICT", {"attrs": verdict})]}
        elements.append({"attrs": [key_attribute(bytes([dscp])), ("NFTA_SET_ELEM_DATA", data)]})
    if elements:
        yield element_message(NFT_MSG_NEWSETELEM, name, elements)


def mark(
    family: Family, key: list[Expression], prefix: str = "", *, dscp: bool
) -> list[Expression]:
    """End a rule: a packet whose key (loaded by `key`) has an element gets its class and DSCP."""
    class_id, code_point = nft.register(0), nft.register(4)
    expressions = [
        *key,
        nft.from_map(f"{prefix}{family.name('qos')}", reg=class_id),
        nft.meta_set(nft.META_PRIORITY, class_id),
    ]
    if dscp:
        to_chain = f"{prefix}{family.name('dscp')}"
        expressions.append(nft.from_map(to_chain, key=code_point, reg=nft.REG_VERDICT))
    return expressions


def _write_dscp(family: Family, dscp: int) -> list[Expression]:
    """Write it over the header's first two bytes, whose other bits stay: version, length, ECN."""
    keep, bits, checksum_offset = (
        (b"\xf0\x3f", dscp << 6, None)
        if family.version == 6
        else (b"\xff\x03", dscp << 2, _IPV4_CHECKSUM_OFFSET)
    )
    return [
        nft.payload(nft.NETWORK_HEADER, 0, 2, nft.REG_1),
        nft.mask(keep, set_bits=bits.to_bytes(2)),
        nft.payload_write(nft.NETWORK_HEADER, 0, 2, nft.REG_1, checksum_offset=checksum_offset),
    ]
