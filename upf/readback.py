"""Reads the gate's table back from the kernel."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from pyroute2.netlink import NLM_F_REQUEST
from pyroute2.netlink.nfnetlink.nftsocket import (
    NFPROTO_INET,
    NFPROTO_NETDEV,
    NFT_MSG_GETRULE,
    NFT_MSG_GETTABLE,
    nft_rule_msg,
    nft_set_elem_list_msg,
    nft_table_msg,
)

from upf.answers import Element, ElementDecoder
from upf.messages import TABLE, message
from upf.nft_socket import NftSocket
from upf.schema import DROP_REASONS

TABLE_FAMILIES = (NFPROTO_INET, NFPROTO_NETDEV)  # the latter of versions before 9 alone
ElementName = tuple[str, bytes]  # set, key
_decoder = lru_cache(maxsize=64)(ElementDecoder)


def table_comments(socket: NftSocket, name: str = TABLE) -> dict[int, str]:
    """Return the comments of the tables of a name of ours, by nftables family."""
    found = {}
    for family in TABLE_FAMILIES:
        query = message(nft_table_msg, NFT_MSG_GETTABLE, flags=NLM_F_REQUEST, family=family)
        for table in socket.dump(query):
            if table.get_attr("NFTA_TABLE_NAME") == name and table["nfgen_family"] == family:
                comment = table.get_attr("NFTA_TABLE_USERDATA")
                found[family] = comment if isinstance(comment, str) else ""
    return found


def read_elements(socket: NftSocket, set_name: str) -> list[Element]:
    """Dump a set."""
    decoder = _decoder(set_name)
    answers = socket.dump_elements(set_name)
    return [element for answer in answers for element in _decoded(answer, decoder)]


def look_up(socket: NftSocket, names: Sequence[ElementName]) -> list[Element | None]:
    """Read single elements; None for each that is not there (any more)."""
    return [
        _decoded(answer, _decoder(set_name))[0] if answer else None
        for (set_name, _), answer in zip(names, socket.look_up(names), strict=True)
    ]


def read_element(socket: NftSocket, set_name: str, key: bytes) -> Element | None:
    """Read one element; None if it is not there (any more)."""
    return look_up(socket, [(set_name, key)])[0]


def drop_counters(socket: NftSocket) -> dict[str, int]:
    """Return packets dropped, by reason: each reason is a chain of one counting rule."""
    drops = {}
    for reason in DROP_REASONS:
        for rule in socket.dump(
            message(
                nft_rule_msg,
                NFT_MSG_GETRULE,
                flags=NLM_F_REQUEST,
                NFTA_RULE_TABLE=TABLE,
                NFTA_RULE_CHAIN=reason,
            )
        ):
            for expression in rule.get_attr("NFTA_RULE_EXPRESSIONS"):
                if expression.get_attr("NFTA_EXPR_NAME") == "counter":
                    data = expression.get_attr("NFTA_EXPR_DATA")
                    drops[reason] = data.get_attr("NFTA_COUNTER_PACKETS")
    return drops


def _decoded(answer: bytes, decoder: ElementDecoder) -> list[Element]:
    elements = decoder.decode(answer)
    return decode_with_pyroute2(answer) if elements is None else elements


def decode_with_pyroute2(answer: bytes) -> list[Element]:
    """Decode one message about elements of any shape."""
    decoded: Any = nft_set_elem_list_msg(answer)
    decoded.decode()
    elements = []
    for item in decoded.get_attr("NFTA_SET_ELEM_LIST_ELEMENTS") or ():
        data = item.get_attr("NFTA_SET_ELEM_DATA")
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
        elements.append(
            Element(
                key=bytes(item.get_attr("NFTA_SET_ELEM_KEY").get_attr("NFTA_DATA_VALUE")),
                data=bytes(data.get_attr("NFTA_DATA_VALUE")) if data else b"",
                comment=comment,
                remaining_ms=item.get_attr("NFTA_SET_ELEM_EXPIRATION") or 0,
                counted=counted,
                packets=packets,
                bytes=octets,
            )
        )
    return elements
