"""Packed decoding of lease elements as the kernel tells them: what pyroute2 would find, far sooner.

It knows the shapes of the elements that the gate installs, and says so when it meets another.
Tests hold it equal to pyroute2's decoder.
"""

import struct
from dataclasses import dataclass
from typing import NamedTuple

from upf.attributes import (
    COUNTER,
    COUNTER_BYTES,
    COUNTER_PACKETS,
    ELEM_DATA,
    ELEM_EXPIRATION,
    ELEM_EXPR,
    ELEM_KEY,
    ELEM_TIMEOUT,
    ELEM_USERDATA,
    EXPR_DATA,
    EXPR_NAME,
    NLA,
    NLMSG,
    U64,
    UDATA_COMMENT,
    attribute,
    list_head,
    padding,
    value_head,
)

DATA_BYTES = (4, 8, 0)  # marks, markings, none


@dataclass(slots=True)  # not frozen: that would double what it costs to make one
class Element:
    """One element of a set or map, with what the kernel counted on it."""

    key: bytes
    data: bytes
    comment: bytes
    remaining_ms: int
    counted: bool
    packets: int
    bytes: int


class _Shape(NamedTuple):
    """How an element is laid out up to its comment: constant bytes and values in turn.

    The values are key, data, bytes and packets if it counts, timeout, time left, and the length of
    the comment.
    """

    fields: struct.Struct
    constants: tuple[bytes, ...]
    counted: bool


class ElementDecoder:
    """Decodes messages about elements of one set or map of the gate."""

    def __init__(self, set_name: str) -> None:
        self._first = NLMSG.size + len(list_head(set_name)) + NLA.size  # where elements begin
        self._shapes: list[_Shape] = []

    def decode(self, message: bytes) -> list[Element] | None:
        """Return the elements in a message; None if one has a shape unknown here."""
        elements: list[Element] = []
        offset, end = self._first, len(message)
        if offset < end and not self._shapes:
            self._shapes = _shapes(message, offset)
        while offset < end:
            for shape in self._shapes:
                if offset + shape.fields.size <= end:
                    found = shape.fields.unpack_from(message, offset)
                    if found[::2] == shape.constants:
                        break
            else:
                return None
            if shape is not self._shapes[0]:  # the next one is probably the same
                self._shapes.remove(shape)
                self._shapes.insert(0, shape)
            if shape.counted:
                _, key, _, data, _, octets, _, packets, _, _, _, left_ms, _, text_bytes = found
            else:
                _, key, _, data, _, _, _, left_ms, _, text_bytes = found
                packets = octets = 0
            text = offset + shape.fields.size
            comment = message[text : text + text_bytes - 1]
            elements.append(Element(key, data, comment, left_ms, shape.counted, packets, octets))
            offset = (text + text_bytes + 3) & ~3
        return elements if offset == end or not elements else None


def _shapes(message: bytes, offset: int) -> list[_Shape]:
    """Return the shapes that elements of a set may have, given one: all have as long a key."""
    if offset + 3 * NLA.size > len(message):
        return []
    key_bytes = NLA.unpack_from(message, offset + 2 * NLA.size)[0] - NLA.size
    return [
        _shape(key_bytes, data_bytes, counted)
        for counted in (True, False)
        for data_bytes in DATA_BYTES
    ]


def _shape(key_bytes: int, data_bytes: int, counted: bool) -> _Shape:
    zero = bytes(U64.size)
    counter_values = attribute(COUNTER_BYTES, zero) + attribute(COUNTER_PACKETS, zero)
    counter = attribute(EXPR_NAME, COUNTER) + attribute(EXPR_DATA, counter_values)
    before_octets = (
        NLA.pack(4 + len(counter), ELEM_EXPR) + counter[: NLA.size - len(counter_values)]
    )
    before_data = padding(key_bytes) + (value_head(ELEM_DATA, data_bytes) if data_bytes else b"")
    parts = [(value_head(ELEM_KEY, key_bytes), f"{key_bytes}s"), (before_data, f"{data_bytes}s")]
    if counted:
        parts += [(before_octets, "Q"), (NLA.pack(4 + U64.size, COUNTER_PACKETS), "Q")]
    parts += [
        (NLA.pack(4 + U64.size, ELEM_TIMEOUT), "Q"),
        (NLA.pack(4 + U64.size, ELEM_EXPIRATION), "Q"),
        (NLA.pack(0, ELEM_USERDATA)[2:] + bytes([UDATA_COMMENT]), "B"),
    ]
    formats = [f"{len(constant)}s{value}" for constant, value in parts]
    # The element's own head is skipped, and so is the length that depends on the comment's.
    fields = struct.Struct(f">{NLA.size}x{''.join(formats[:-1])}2x{formats[-1]}")
    return _Shape(fields, tuple(constant for constant, _ in parts), counted)
