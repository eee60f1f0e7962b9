"""Packed encoding of lease elements: the bytes pyroute2 would make, some fifty times sooner.

A lease is a handful of set and map elements; installing one is the hot path of the control plane.
Only these messages are packed by hand; tests hold them equal, byte for byte, to pyroute2's.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from pyroute2.netlink import (
    NLM_F_ACK,
    NLM_F_APPEND,
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REQUEST,
)
from pyroute2.netlink.nfnetlink import NFNL_SUBSYS_NFTABLES
from pyroute2.netlink.nfnetlink.nftsocket import (
    NFPROTO_INET,
    NFT_MSG_DELSETELEM,
    NFT_MSG_NEWSETELEM,
)

from upf.messages import NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END, TABLE

# linux/netfilter/nf_tables.h
_LIST_TABLE, _LIST_SET, _LIST_ELEMENTS = 1, 2, 3
_ELEM_KEY, _ELEM_DATA, _ELEM_TIMEOUT, _ELEM_USERDATA, _ELEM_EXPR = 1, 2, 4, 6, 7
_DATA_VALUE = 1
_EXPR_NAME, _EXPR_DATA, _COUNTER_BYTES, _COUNTER_PACKETS = 1, 2, 1, 2
_UDATA_COMMENT = 0
MAX_COMMENT_BYTES = 250

_NLMSG = struct.Struct("=IHHII")  # length, type, flags, sequence number, port id
_NFGEN = struct.Struct(">BBH")  # family, version, resource id
_NLA = struct.Struct("=HH")  # length, type
_TIMEOUT = struct.Struct(">Q")

ADD_TYPE = NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWSETELEM
DELETE_TYPE = NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_DELSETELEM
ADD_FLAGS = NLM_F_REQUEST | NLM_F_CREATE | NLM_F_APPEND
ADD_NEW_FLAGS = ADD_FLAGS | NLM_F_EXCL  # an element that exists is an error, not a renewal
DELETE_FLAGS = NLM_F_REQUEST

# Netlink attributes carry their length in 16 bits; an element takes at most 436 bytes.
MAX_ELEMENTS = 128


@dataclass(frozen=True, slots=True)
class Counters:
    """Packets and bytes an element starts from."""

    packets: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Add:
    """Add an element to a set or map of the gate."""

    set_name: str
    key: bytes
    timeout_ms: int
    data: bytes = b""
    comment: bytes = b""
    counters: Counters | None = None


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete an element."""

    set_name: str
    key: bytes


ElementChange = Add | Delete


def _attribute(kind: int, value: bytes) -> bytes:
    length = 4 + len(value)
    return _NLA.pack(length, kind) + value + b"\0" * (-length & 3)


@lru_cache(maxsize=64)
def _head(set_name: str) -> bytes:
    return (
        _NFGEN.pack(NFPROTO_INET, 0, 0)
        + _attribute(_LIST_TABLE, TABLE.encode() + b"\0")
        + _attribute(_LIST_SET, set_name.encode() + b"\0")
    )


def encode_elements(changes: Sequence[ElementChange]) -> bytes:
    """Encode elements as the attributes of a list, numbered from 1 as pyroute2 does."""
    parts: list[bytes] = []
    for number, change in enumerate(changes, start=1):
        if isinstance(change, Add):
            body = _added(change)
        else:
            layout = _Layout.of(len(change.key), 0, None)
            body = layout.before_key + change.key + layout.before_data
        parts += (_NLA.pack(4 + len(body), number), body)
    return b"".join(parts)


def _added(change: Add) -> bytes:
    layout = _Layout.of(len(change.key), len(change.data), len(change.comment))
    body = b"".join(
        (
            layout.before_key,
            change.key,
            layout.before_data,
            change.data,
            layout.before_timeout,
            _TIMEOUT.pack(change.timeout_ms),
            layout.before_comment,
            change.comment,
            layout.after_comment,
        )
    )
    return body if change.counters is None else body + _counter(change.counters)


class _Layout(NamedTuple):
    """The constant bytes between the parts of an element, which depend on their lengths alone."""

    before_key: bytes
    before_data: bytes
    before_timeout: bytes
    before_comment: bytes
    after_comment: bytes

    @staticmethod
    @lru_cache(maxsize=1024)
    def of(key: int, data: int, comment: int | None) -> "_Layout":
        """Lengths in bytes; `comment`: None for an element that is deleted, by its key alone."""
        before_key = _nested(_ELEM_KEY, key)
        after_key = _padding(key)
        if comment is None:
            return _Layout(before_key, after_key, b"", b"", b"")
        before_data = after_key + (_nested(_ELEM_DATA, data) if data else b"")
        before_timeout = _padding(data) + _NLA.pack(12, _ELEM_TIMEOUT)
        if not comment:
            return _Layout(before_key, before_data, before_timeout, b"", b"")
        text = comment + 1  # and a NUL
        before_comment = _NLA.pack(6 + text, _ELEM_USERDATA) + bytes((_UDATA_COMMENT, text))
        after_comment = b"\0" + _padding(2 + text)
        return _Layout(before_key, before_data, before_timeout, before_comment, after_comment)


def _nested(kind: int, value_bytes: int) -> bytes:
    """The head of an attribute that holds one data value."""
    whole = 8 + value_bytes + len(_padding(value_bytes))
    return _NLA.pack(whole, kind) + _NLA.pack(4 + value_bytes, _DATA_VALUE)


def _padding(length: int) -> bytes:
    return b"\0" * (-length & 3)


def _counter(counters: Counters) -> bytes:
    values = _attribute(_COUNTER_BYTES, _TIMEOUT.pack(counters.bytes)) + _attribute(
        _COUNTER_PACKETS, _TIMEOUT.pack(counters.packets)
    )
    return _attribute(
        _ELEM_EXPR, _attribute(_EXPR_NAME, b"counter\0") + _attribute(_EXPR_DATA, values)
    )


def encode_message(
    kind: int, flags: int, set_name: str, elements: bytes, sequence_number: int
) -> bytes:
    """Encode one request over elements already encoded."""
    head = _head(set_name)
    length = _NLMSG.size + len(head) + 4 + len(elements)
    return (
        _NLMSG.pack(length, kind, flags, sequence_number, 0)
        + head
        + _NLA.pack(4 + len(elements), _LIST_ELEMENTS)
        + elements
    )


def _end(kind: int) -> bytes:
    return _NLMSG.pack(_NLMSG.size + 4, kind, NLM_F_REQUEST, 0, 0) + _NFGEN.pack(
        0, 0, NFNL_SUBSYS_NFTABLES
    )


_BEGIN, _END = _end(NFNL_MSG_BATCH_BEGIN), _end(NFNL_MSG_BATCH_END)


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """Bytes ready to send; request `first_number + n` carries `groups[n]`.

    The kernel reports every request that failed; only the last one asks for an answer in any case.
    """

    data: bytes
    first_number: int
    groups: tuple[tuple[ElementChange, ...], ...]


def encode_batch(
    changes: Sequence[ElementChange], first_number: int, add_flags: int = ADD_FLAGS
) -> EncodedBatch:
    """Encode changes as one atomic batch, in order.

    Neighbouring additions to one set share a request. A deletion has a request of its own, so
    that an error names the element that was not there.
    """
    groups = _groups(changes)
    requests = []
    for number, group in enumerate(groups):
        adding = isinstance(group[0], Add)
        flags = add_flags if adding else DELETE_FLAGS
        if number == len(groups) - 1:
            flags |= NLM_F_ACK
        requests.append(
            encode_message(
                ADD_TYPE if adding else DELETE_TYPE,
                flags,
                group[0].set_name,
                encode_elements(group),
                first_number + number,
            )
        )
    return EncodedBatch(_BEGIN + b"".join(requests) + _END, first_number, groups)


def _groups(changes: Sequence[ElementChange]) -> tuple[tuple[ElementChange, ...], ...]:
    groups: list[list[ElementChange]] = []
    for change in changes:
        if (
            groups
            and isinstance(change, Add)
            and isinstance(groups[-1][0], Add)
            and groups[-1][0].set_name == change.set_name
            and len(groups[-1]) < MAX_ELEMENTS
        ):
            groups[-1].append(change)
        else:
            groups.append([change])
    return tuple(map(tuple, groups))
