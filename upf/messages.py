"""nf_tables requests in pyroute2's message classes: one request, and the batch around many."""

from typing import Any

from pyroute2.netlink import NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REQUEST
from pyroute2.netlink.nfnetlink import NFNL_SUBSYS_NFTABLES, nfgen_msg
from pyroute2.netlink.nfnetlink.nftsocket import (
    NFPROTO_INET,
    nft_set_elem_list_msg,
)

SIGNATURE = "ai-paging gate"  # what the comment of a table of ours begins with
TABLE = "aipaging"  # the gate, in the family inet
RAN_TABLE = "aipaging_ran"  # of a gNB
RAN_PREFIX = "ran_"  # of the names of sets in it
NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END = 0x10, 0x11

Message = Any  # pyroute2's message classes are untyped


def table_of(set_name: str) -> str:
    """Return the name of the table that has this set."""
    return RAN_TABLE if set_name.startswith(RAN_PREFIX) else TABLE


def message(
    kind: type, number: int, *, flags: int = 0, family: int = NFPROTO_INET, **attributes: Any
) -> Message:
    """Build one nf_tables request; `attributes` are named as in linux/netfilter/nf_tables.h."""
    request = kind()
    request["nfgen_family"] = family
    request["header"]["type"] = NFNL_SUBSYS_NFTABLES << 8 | number
    request["header"]["flags"] = flags or NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_APPEND
    request["attrs"] = list(attributes.items())
    return request


def key_attribute(key: bytes) -> tuple[str, Any]:
    """Return the key of a set element as an attribute."""
    return ("NFTA_SET_ELEM_KEY", {"attrs": [("NFTA_DATA_VALUE", key)]})


def element_message(number: int, set_name: str, elements: list[dict[str, Any]]) -> Message:
    """Build a request that adds, deletes or gets elements of a set."""
    return message(
        nft_set_elem_list_msg,
        number,
        NFTA_SET_ELEM_LIST_TABLE=table_of(set_name),
        NFTA_SET_ELEM_LIST_SET=set_name,
        NFTA_SET_ELEM_LIST_ELEMENTS=elements,
    )


def batch(messages: list[Message]) -> list[Message]:
    """Enclose messages so that the kernel applies all of them or none."""
    ends = []
    for number in (NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END):
        end = nfgen_msg()
        end["res_id"] = NFNL_SUBSYS_NFTABLES
        end["header"]["type"] = number
        end["header"]["flags"] = NLM_F_REQUEST
        ends.append(end)
    return [ends[0], *messages, ends[1]]
