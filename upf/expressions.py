"""nftables expressions, as pyroute2 encodes them: the few that the gate's rules are made of.

Registers are numbered as in linux/netfilter/nf_tables.h: 1 to 4 are the 16-byte registers, 8 to 23
the 4-byte ones that overlay them. Concatenated keys fill consecutive 4-byte registers.
"""

import struct
from typing import Any

Expression = dict[str, Any]

REG_VERDICT = 0
REG_1 = 1
NETWORK_HEADER = 1
TRANSPORT_HEADER = 2

META_PRIORITY = 2
META_MARK = 3
META_IIFNAME = 6
META_NFPROTO = 15
META_L4PROTO = 16
CT_MARK = 3
EXTHDR_IPV4 = 2

REJECT_ICMPX = 2  # NFT_REJECT_ICMPX_UNREACH
ADMIN_PROHIBITED = 3  # NFT_REJECT_ICMPX_ADMIN_PROHIBITED
CSUM_INET = 1

CMP_EQ = 0
CMP_NEQ = 1

DROP = 0
ACCEPT = 1
GOTO = -4


def register(offset_bytes: int) -> int:
    """Return the 4-byte register that lies `offset_bytes` into a concatenated key."""
    return 8 + offset_bytes // 4


def u32(value: int) -> bytes:
    """Return a mark or class id as the kernel holds it in a register: host byte order."""
    return struct.pack("=I", value)


def _expression(name: str, *attributes: tuple[str, Any]) -> Expression:
    return {
        "attrs": [
            ("NFTA_EXPR_NAME", name),
            ("NFTA_EXPR_DATA", {"attrs": list(attributes)}),
        ]
    }


def payload(base: int, offset: int, length: int, reg: int) -> Expression:
    """Load `length` bytes of a header into a register."""
    return _expression(
        "payload",
        ("NFTA_PAYLOAD_DREG", reg),
        ("NFTA_PAYLOAD_BASE", base),
        ("NFTA_PAYLOAD_OFFSET", offset),
        ("NFTA_PAYLOAD_LEN", length),
    )


def payload_write(
    base: int, offset: int, length: int, reg: int, *, checksum_offset: int | None
) -> Expression:
    """Write `length` bytes of a register over a header; its Internet checksum is kept right."""
    checksum = (
        []
        if checksum_offset is None
        else [
            ("NFTA_PAYLOAD_CSUM_TYPE", CSUM_INET),
            ("NFTA_PAYLOAD_CSUM_OFFSET", checksum_offset),
        ]
    )
    return _expression(
        "payload",
        ("NFTA_PAYLOAD_SREG", reg),
        ("NFTA_PAYLOAD_BASE", base),
        ("NFTA_PAYLOAD_OFFSET", offset),
        ("NFTA_PAYLOAD_LEN", length),
        *checksum,
    )


def meta_load(key: int, reg: int = REG_1) -> Expression:
    """Load packet metadata into a register."""
    return _expression("meta", ("NFTA_META_DREG", reg), ("NFTA_META_KEY", key))


def meta_set(key: int, reg: int = REG_1) -> Expression:
    """Set packet metadata from a register."""
    return _expression("meta", ("NFTA_META_KEY", key), ("NFTA_META_SREG", reg))


def ip_option_is_there(kind: int, reg: int = REG_1) -> Expression:
    """Load whether an IPv4 header has an option: one byte, 1 or 0."""
    return _expression(
        "exthdr",
        ("NFTA_EXTHDR_DREG", reg),
        ("NFTA_EXTHDR_TYPE", kind),
        ("NFTA_EXTHDR_OFFSET", 0),
        ("NFTA_EXTHDR_LEN", 1),
        ("NFTA_EXTHDR_FLAGS", {"NFT_EXTHDR_F_PRESENT"}),
        ("NFTA_EXTHDR_OP", EXTHDR_IPV4),
    )


def ct_load_mark(reg: int = REG_1) -> Expression:
    """Load the connection's mark into a register."""
    return _expression("ct", ("NFTA_CT_DREG", reg), ("NFTA_CT_KEY", CT_MARK))


def ct_set_mark(reg: int = REG_1) -> Expression:
    """Set the connection's mark from a register."""
    return _expression("ct", ("NFTA_CT_KEY", CT_MARK), ("NFTA_CT_SREG", reg))


def immediate(value: bytes, reg: int = REG_1) -> Expression:
    """Load a constant into a register."""
    return _expression(
        "immediate",
        ("NFTA_IMMEDIATE_DREG", reg),
        ("NFTA_IMMEDIATE_DATA", {"attrs": [("NFTA_DATA_VALUE", value)]}),
    )


def compare(value: bytes, reg: int = REG_1, operator: int = CMP_EQ) -> Expression:
    """Go on only if the register compares to `value`."""
    return _expression(
        "cmp",
        ("NFTA_CMP_SREG", reg),
        ("NFTA_CMP_OP", operator),
        ("NFTA_CMP_DATA", {"attrs": [("NFTA_DATA_VALUE", value)]}),
    )


def mask(bits: bytes, reg: int = REG_1, *, set_bits: bytes = b"") -> Expression:
    """Keep only these bits of a register, and set others."""
    return _expression(
        "bitwise",
        ("NFTA_BITWISE_SREG", reg),
        ("NFTA_BITWISE_DREG", reg),
        ("NFTA_BITWISE_LEN", len(bits)),
        ("NFTA_BITWISE_MASK", {"attrs": [("NFTA_DATA_VALUE", bits)]}),
        ("NFTA_BITWISE_XOR", {"attrs": [("NFTA_DATA_VALUE", set_bits or bytes(len(bits)))]}),
    )


def in_set(name: str, *, absent: bool = False, reg: int = REG_1) -> Expression:
    """Go on only if the key that starts in a register is (or is not) in the set."""
    flags = {"NFT_LOOKUP_F_INV"} if absent else set()
    return _expression(
        "lookup",
        ("NFTA_LOOKUP_SET", name),
        ("NFTA_LOOKUP_SREG", reg),
        ("NFTA_LOOKUP_FLAGS", flags),
    )


def from_map(name: str, *, key: int = REG_1, reg: int = REG_1) -> Expression:
    """Load what the map holds for the key that starts in a register, or stop the rule."""
    return _expression(
        "lookup",
        ("NFTA_LOOKUP_SET", name),
        ("NFTA_LOOKUP_SREG", key),
        ("NFTA_LOOKUP_DREG", reg),
    )


def counter() -> Expression:
    """Count packets and bytes that get this far."""
    return _expression("counter")


def notrack() -> Expression:
    """Leave the packet out of connection tracking."""
    return {"attrs": [("NFTA_EXPR_NAME", "notrack")]}


def queue(number: int) -> Expression:
    """Hand the packet to user space; where nobody listens it is dropped."""
    return _expression("queue", ("NFTA_QUEUE_NUM", number), ("NFTA_QUEUE_TOTAL", 1))


def queue_target(number: int) -> Expression:
    """Do the same by the xtables target NFQUEUE, revision 3 (struct xt_NFQ_info_v3, padded)."""
    info = struct.pack("=HHHxx", number, 1, 0)
    return _expression(
        "target",
        ("NFTA_TARGET_NAME", "NFQUEUE"),
        ("NFTA_TARGET_REV", 3),
        ("NFTA_TARGET_INFO", info),
    )


def reject() -> Expression:
    """Drop the packet and tell its sender: administratively prohibited (ICMP 3/13, ICMPv6 1/1)."""
    return _expression(
        "reject",
        ("NFTA_REJECT_TYPE", REJECT_ICMPX),
        ("NFTA_REJECT_ICMP_CODE", ADMIN_PROHIBITED),
    )


def verdict(code: int, chain: str | None = None) -> Expression:
    """End the rule with a verdict; `chain` for GOTO."""
    attributes: list[tuple[str, Any]] = [("NFTA_VERDICT_CODE", code)]
    if chain is not None:
        attributes.append(("NFTA_VERDICT_CHAIN", chain))
    return _expression(
        "immediate",
        ("NFTA_IMMEDIATE_DREG", REG_VERDICT),
        ("NFTA_IMMEDIATE_DATA", {"attrs": [("NFTA_DATA_VERDICT", {"attrs": attributes})]}),
    )


def goto(chain: str) -> Expression:
    """Leave for another chain and do not come back."""
    return verdict(GOTO, chain)
