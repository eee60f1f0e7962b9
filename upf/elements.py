"""Packed encoding of lease elements: the bytes pyroute2 would make, some fifty times sooner.

A lease is a handful of set and map elements; installing one is the hot path of the control plane.
Only these messages are packed by hand; tests hold them equal, byte for byte, to pyroute2's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, cast

from pyroute2.netlink import (
    NLM_F_ACK,
    NLM_F_APPEND,
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_EXCL,
    NLM_F_REQUEST,
)
from pyroute2.netlink.nfnetlink import NFNL_SUBSYS_NFTABLES
from pyroute2.netlink.nfnetlink.nftsocket import (
    NFT_MSG_DELSETELEM,
    NFT_MSG_GETSETELEM,
    NFT_MSG_NEWSETELEM,
)

from upf.attributes import (
    COUNTER,
    COUNTER_BYTES,
    COUNTER_PACKETS,
    ELEM_DATA,
    ELEM_EXPR,
    ELEM_KEY,
    ELEM_TIMEOUT,
    ELEM_USERDATA,
    EXPR_DATA,
    EXPR_NAME,
    LIST_ELEMENT,
    LIST_ELEMENTS,
    NFGEN,
    NLA,
    NLMSG,
    U64,
    UDATA_COMMENT,
    attribute,
    list_head,
    padding,
    value_head,
)
from upf.messages import NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END

ADD_TYPE = NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWSETELEM
DELETE_TYPE = NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_DELSETELEM
GET_TYPE = NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETSETELEM
ADD_FLAGS = NLM_F_REQUEST | NLM_F_CREATE | NLM_F_APPEND
ADD_NEW_FLAGS = ADD_FLAGS | NLM_F_EXCL  # an element that exists is an error, not a renewal
DELETE_FLAGS = NLM_F_REQUEST

# Netlink attributes carry their length in 16 bits; an element takes at most 436 bytes.
MAX_ELEMENTS = 128


class Counters(NamedTuple):
    """Packets and bytes an element starts from."""

    packets: int
    bytes: int


class Add(NamedTuple):
    """Add an element to a set or map of the gate."""

    set_name: str
    key: bytes
    timeout_ms: int
    data: bytes = b""
    comment: bytes = b""
    counters: Counters | None = None


class Delete(NamedTuple):
    """Delete an element."""

    set_name: str
    key: bytes


# Bare tuples of the same fields do as well: to name the fields costs as much as to encode them.
Addition = tuple[str, bytes, int, bytes, bytes, Counters | None]
Deletion = tuple[str, bytes]
ElementChange = Addition | Deletion


def is_deletion(change: ElementChange) -> bool:
    """Return whether a change takes an element away."""
    return len(change) == 2


def encode_additions(changes: Sequence[Addition]) -> bytes:
    """Encode elements to add as the attributes of a list."""
    parts: list[bytes] = []
    lengths: tuple[int, ...] = ()
    pack = U64.pack
    for _, key, timeout_ms, data, comment, counters in changes:
        if lengths != (found := (len(key), len(data), len(comment), counters is not None)):
            lengths = found
            head, before_data, before_timeout, before_comment, after_comment = _layout(*lengths)
        parts += (
            *(head, key, before_data, data, before_timeout, pack(timeout_ms)),
            *(before_comment, comment, after_comment),
        )
        if counters is not None:
            parts.append(_counter(counters))
    return b"".join(parts)


def encode_deletions(changes: Sequence[Deletion]) -> bytes:
    """Encode elements to delete, or to look up, as the attributes of a list."""
    parts: list[bytes] = []
    for _, key in changes:
        parts += (_key_head(len(key)), key, padding(len(key)))
    return b"".join(parts)


@lru_cache(maxsize=64)
def _key_head(key_bytes: int) -> bytes:
    """Return what precedes the key in an element that is named by its key alone."""
    head = value_head(ELEM_KEY, key_bytes)
    return NLA.pack(4 + len(head) + key_bytes + len(padding(key_bytes)), LIST_ELEMENT) + head


@lru_cache(maxsize=1024)
def _layout(key: int, data: int, comment: int, counted: bool) -> tuple[bytes, ...]:
    """Return the constant bytes between the parts of an element with parts of these lengths."""
    before_data = padding(key) + (value_head(ELEM_DATA, data) if data else b"")
    before_timeout = padding(data) + NLA.pack(12, ELEM_TIMEOUT)
    before_comment = after_comment = b""
    if comment:
        text = comment + 1  # and a NUL
        before_comment = NLA.pack(6 + text, ELEM_USERDATA) + bytes((UDATA_COMMENT, text))
        after_comment = b"\0" + padding(2 + text)
    before_key = value_head(ELEM_KEY, key)
    constant = before_key + before_data + before_timeout + before_comment + after_comment
    length = 4 + len(constant) + key + data + U64.size + comment
    if counted:
        length += len(_counter(Counters(0, 0)))
    head = NLA.pack(length, LIST_ELEMENT) + before_key
    return head, before_data, before_timeout, before_comment, after_comment


@lru_cache(maxsize=64)
def _counter(counters: Counters) -> bytes:
    values = attribute(COUNTER_BYTES, U64.pack(counters.bytes)) + attribute(
        COUNTER_PACKETS, U64.pack(counters.packets)
    )
    return attribute(ELEM_EXPR, attribute(EXPR_NAME, COUNTER) + attribute(EXPR_DATA, values))


def encode_message(
    kind: int, flags: int, set_name: str, elements: bytes, sequence_number: int
) -> bytes:
    """Encode one request over elements already encoded."""
    head = list_head(set_name)
    length = NLMSG.size + len(head) + 4 + len(elements)
    return (
        NLMSG.pack(length, kind, flags, sequence_number, 0)
        + head
        + NLA.pack(4 + len(elements), LIST_ELEMENTS)
        + elements
    )


def encode_look_up(names: Sequence[tuple[str, bytes]], sequence_number: int) -> bytes:
    """Encode a request for each element (set, key), all with the same number."""
    heads: dict[str, bytes] = {}
    parts: list[bytes] = []
    for set_name, key in names:
        head = heads.get(set_name)
        if head is None:  # keys of one set are of one length
            request = encode_message(
                GET_TYPE,
                NLM_F_REQUEST,
                set_name,
                encode_deletions([(set_name, key)]),
                sequence_number,
            )
            head = heads[set_name] = request[: -len(key) - len(padding(len(key)))]
        parts += (head, key, padding(len(key)))
    return b"".join(parts)


def encode_dump(set_name: str, sequence_number: int) -> bytes:
    """Encode a request for all elements of a set."""
    head = list_head(set_name)
    flags = NLM_F_REQUEST | NLM_F_DUMP
    return NLMSG.pack(NLMSG.size + len(head), GET_TYPE, flags, sequence_number, 0) + head


def _end(kind: int) -> bytes:
    return NLMSG.pack(NLMSG.size + 4, kind, NLM_F_REQUEST, 0, 0) + NFGEN.pack(
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
    groups: list[list[ElementChange]]


def encode_batch(
    changes: Sequence[ElementChange],
    first_number: int,
    add_flags: int = ADD_FLAGS,
    *,
    deletions_alone: bool = False,
) -> EncodedBatch:
    """Encode changes as one atomic batch, in order.

    Neighbouring additions to one set, or deletions from it, share a request. With
    `deletions_alone` each deletion has one of its own, so that an error names the element.
    """
    groups = _groups(changes, most_deletions=1 if deletions_alone else MAX_ELEMENTS)
    requests = [_BEGIN]
    last = len(groups) - 1
    for number, group in enumerate(groups):
        if is_deletion(group[0]):
            elements = encode_deletions(cast(list[Deletion], group))
            kind, flags = DELETE_TYPE, DELETE_FLAGS
        else:
            elements = encode_additions(cast(list[Addition], group))
            kind, flags = ADD_TYPE, add_flags
        if number == last:
            flags |= NLM_F_ACK
        requests.append(encode_message(kind, flags, group[0][0], elements, first_number + number))
    requests.append(_END)
    return EncodedBatch(b"".join(requests), first_number, groups)


def _groups(changes: Sequence[ElementChange], most_deletions: int) -> list[list[ElementChange]]:
    groups: list[list[ElementChange]] = []
    group: list[ElementChange] = []
    set_name, fields, room = "", 0, 0
    for change in changes:
        if not room or change[0] != set_name or len(change) != fields:
            set_name, fields = change[0], len(change)
            room = most_deletions if is_deletion(change) else MAX_ELEMENTS
            group = []
            groups.append(group)
        group.append(change)
        room -= 1
    return groups
