"""Reads the gate's table back from the kernel."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pyroute2.netlink import NLM_F_REQUEST
from pyroute2.netlink.nfnetlink.nftsocket import (
    NFT_MSG_GETRULE,
    NFT_MSG_GETSETELEM,
    NFT_MSG_GETTABLE,
    nft_rule_msg,
    nft_set_elem_list_msg,
    nft_table_msg,
)

from upf.messages import TABLE, element_message, key_attribute, message
from upf.nft_socket import NftSocket
from upf.schema import DROP_REASONS


@dataclass(frozen=True, slots=True, kw_only=True)
class Element:
    """One element of a set or map, with what the kernel counted on it."""

    key: bytes
    mark: int
    comment: bytes
    remaining_ms: int
    counted: bool
    packets: int
    bytes: int


def table_comment(socket: NftSocket) -> str | None:
    """Return the comment of the gate's table; None if there is no such table."""
    for table in _query(socket, nft_table_msg, NFT_MSG_GETTABLE, dump=True):
        if table.get_attr("NFTA_TABLE_NAME") == TABLE:
            comment = table.get_attr("NFTA_TABLE_USERDATA")
            return comment if isinstance(comment, str) else ""
    return None


def read_elements(socket: NftSocket, set_name: str) -> Iterator[Element]:
    """Dump a set."""
    answers = _query(
        socket,
        nft_set_elem_list_msg,
        NFT_MSG_GETSETELEM,
        dump=True,
        NFTA_SET_ELEM_LIST_TABLE=TABLE,
        NFTA_SET_ELEM_LIST_SET=set_name,
    )
    yield from _decoded(answers)


def read_element(socket: NftSocket, set_name: str, key: bytes) -> Element | None:
    """Read one element; None if it is not there (any more)."""
    query = element_message(NFT_MSG_GETSETELEM, set_name, [{"attrs": [key_attribute(key)]}])
    return next(_decoded(socket.get(query, dump=False)), None)


def drop_counters(socket: NftSocket) -> dict[str, int]:
    """Return packets dropped, by reason: each reason is a chain of one counting rule."""
    drops = {}
    for reason in DROP_REASONS:
        for rule in _query(
            socket,
            nft_rule_msg,
            NFT_MSG_GETRULE,
            dump=True,
            NFTA_RULE_TABLE=TABLE,
            NFTA_RULE_CHAIN=reason,
        ):
            for expression in rule.get_attr("NFTA_RULE_EXPRESSIONS"):
                if expression.get_attr("NFTA_EXPR_NAME") == "counter":
                    data = expression.get_attr("NFTA_EXPR_DATA")
                    drops[reason] = data.get_attr("NFTA_COUNTER_PACKETS")
    return drops


def _query(
    socket: NftSocket, kind: type, number: int, *, dump: bool, **attributes: Any
) -> list[Any]:
    return socket.get(message(kind, number, flags=NLM_F_REQUEST, **attributes), dump=dump)


def _decoded(answers: list[Any]) -> Iterator[Element]:
    for answer in answers:
        for item in answer.get_attr("NFTA_SET_ELEM_LIST_ELEMENTS") or ():
            data = item.get_attr("NFTA_SET_ELEM_DATA")
            value = data.get_attr("NFTA_DATA_VALUE") if data else b""
            packets = octets = 0
            counted = False
            expression = item.get_attr("NFTA_SET_ELEM_EXPR")
            if expression is not None and expression.get_attr("NFTA_EXPR_NAME") == "counter":
                counts = expression.get_attr("NFTA_EXPR_DATA")
                packets = counts.get_attr("NFTA_COUNTER_PACKETS")
                octets = counts.get_attr("NFTA_COUNTER_BYTES")
                counted = True
            comment = b""
            for name, text in item.get_attr("NFTA_SET_ELEM_USERDATA") or ():
                if name == "NFTNL_UDATA_SET_ELEM_COMMENT":
                    comment = bytes(text)
            yield Element(
                key=bytes(item.get_attr("NFTA_SET_ELEM_KEY").get_attr("NFTA_DATA_VALUE")),
                mark=int.from_bytes(value, "little") if value else 0,
                comment=comment,
                remaining_ms=item.get_attr("NFTA_SET_ELEM_EXPIRATION") or 0,
                counted=counted,
                packets=packets,
                bytes=octets,
            )
