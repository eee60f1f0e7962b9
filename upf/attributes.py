"""Netlink attributes of nf_tables set elements: what the packed encoder and decoder share.

Numbers and names are those of linux/netfilter/nf_tables.h. An attribute is its length (16 bits,
with this head, without padding), its type, its value, and padding to 4 bytes.
"""

import struct
from functools import lru_cache

from pyroute2.netlink.nfnetlink.nftsocket import NFPROTO_INET

from upf.messages import table_of

LIST_TABLE, LIST_SET, LIST_ELEMENTS = 1, 2, 3
LIST_ELEMENT = 1
ELEM_KEY, ELEM_DATA, ELEM_TIMEOUT, ELEM_EXPIRATION, ELEM_USERDATA, ELEM_EXPR = 1, 2, 4, 5, 6, 7
DATA_VALUE = 1
EXPR_NAME, EXPR_DATA, COUNTER_BYTES, COUNTER_PACKETS = 1, 2, 1, 2
UDATA_COMMENT = 0

NLMSG = struct.Struct("=IHHII")  # length, type, flags, sequence number, port id
NFGEN = struct.Struct(">BBH")  # family, version, resource id
NLA = struct.Struct("=HH")  # length, type
U64 = struct.Struct(">Q")  # as nf_tables has timeouts (ms) and counters

COUNTER = b"counter\0"


def padding(length: int) -> bytes:
    """Return what fills up a value of this length."""
    return b"\0" * (-length & 3)


def attribute(kind: int, value: bytes) -> bytes:
    """Return a whole attribute."""
    return NLA.pack(4 + len(value), kind) + value + padding(len(value))


def value_head(kind: int, value_bytes: int) -> bytes:
    """Return the head of an attribute that holds one data value."""
    whole = 8 + value_bytes + len(padding(value_bytes))
    return NLA.pack(whole, kind) + NLA.pack(4 + value_bytes, DATA_VALUE)


@lru_cache(maxsize=64)
def list_head(set_name: str) -> bytes:
    """Return what precedes the elements in a message about one of our sets."""
    return (
        NFGEN.pack(NFPROTO_INET, 0, 0)
        + attribute(LIST_TABLE, table_of(set_name).encode() + b"\0")
        + attribute(LIST_SET, set_name.encode() + b"\0")
    )
