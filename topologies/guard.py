"""Source address validation at a gNB: a radio may only send from its own UE's addresses.

One bridge-family nftables table per gNB, in front of the cell's bridge: a packet passes if its
port and source address are listed together, ARP passes, all else is dropped and counted. A radio
that is lost passes nothing, either way; the bridge and its neighbours are not told.
"""

import errno
import socket
import sys
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from pyroute2.netlink import NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REQUEST
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.nfnetlink import NFNL_SUBSYS_NFTABLES, nfgen_msg
from pyroute2.netlink.nfnetlink.nftsocket import (
    DATA_TYPE_IFINDEX,
    DATA_TYPE_IP6ADDR,
    DATA_TYPE_IPADDR,
    NFT_MSG_DELSETELEM,
    NFT_MSG_GETRULE,
    NFT_MSG_NEWCHAIN,
    NFT_MSG_NEWRULE,
    NFT_MSG_NEWSET,
    NFT_MSG_NEWSETELEM,
    NFT_MSG_NEWTABLE,
    nft_chain_msg,
    nft_rule_msg,
    nft_set_elem_list_msg,
    nft_set_msg,
    nft_table_msg,
)
from pyroute2.nftables.expressions import genex, verdict
from pyroute2.nftables.main import NFTables

from topologies.errors import TopologyError
from upf.netns import in_namespace

Address = IPv4Address | IPv6Address

_FAMILY_BRIDGE = 7
_TABLE, _CHAIN, _OUT_CHAIN, _LOST = "radio", "source", "out", "lost"
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_PREROUTING, _POSTROUTING, _BEFORE_ALL_ELSE = 0, 4, -300
_DROP, _ACCEPT = 0, 1
_META_PROTOCOL, _META_IIF, _META_OIF = 1, 4, 5
_NETWORK_HEADER = 1
_REGISTER_1 = 1
_PORT_REGISTER, _SOURCE_REGISTER = 8, 9  # 32-bit registers next to each other: one key
_ARP = b"\x08\x06"
# name, type of the key (port index . source), EtherType, offset and length of the source
_SETS = {
    4: ("source4", (DATA_TYPE_IFINDEX << 6) | DATA_TYPE_IPADDR, b"\x08\x00", 12, 4),
    6: ("source6", (DATA_TYPE_IFINDEX << 6) | DATA_TYPE_IP6ADDR, b"\x86\xdd", 8, 16),
}
_ELEMENTS_PER_MESSAGE = 500


class SpoofGuard:
    """The guard in front of one gNB's cell."""

    def __init__(self, netns: str, allowed: Mapping[str, Iterable[Address]]) -> None:
        """Install it at once; `allowed` maps port names to the sources they may use.

        Raises TopologyError if the kernel refuses it.
        """
        self._netns = netns
        try:
            in_namespace(netns, lambda: _install(allowed))
        except NetlinkError as error:
            raise TopologyError(
                f"the guard against spoofed radio sources: the kernel refused it ({error}): "
                "it needs CONFIG_NF_TABLES_BRIDGE"
            ) from error

    def set_radio(self, port: str, *, up: bool) -> None:
        """Have a radio, or lose it. Having what is there, or losing what is lost, is no error."""

        def change() -> None:
            kind = NFT_MSG_DELSETELEM if up else NFT_MSG_NEWSETELEM
            index = socket.if_nametoindex(port).to_bytes(4, sys.byteorder)
            messages = list(_elements(_LOST, [index], kind))
            with NFTables(nfgen_family=_FAMILY_BRIDGE) as nftables:
                nftables.nlm_request_batch([_edge(_BATCH_BEGIN), *messages, _edge(_BATCH_END)])

        try:
            in_namespace(self._netns, change)
        except NetlinkError as error:
            if error.code != errno.ENOENT:
                raise TopologyError(f"the radio {port}: the kernel refused it: {error}") from error

    def drops(self) -> int:
        """Packets dropped so far. Raises TopologyError if the guard is gone."""
        return in_namespace(self._netns, _read_drops)


def _install(allowed: Mapping[str, Iterable[Address]]) -> None:
    messages = [
        _message(nft_table_msg, NFT_MSG_NEWTABLE, name=_TABLE),
        _base_chain(_CHAIN, _PREROUTING),
        _base_chain(_OUT_CHAIN, _POSTROUTING),
        _message(
            nft_set_msg,
            NFT_MSG_NEWSET,
            table=_TABLE,
            name=_LOST,
            id=len(_SETS) + 1,
            key_type=DATA_TYPE_IFINDEX,
            key_len=4,
        ),
        _rule(*_port_is_lost(_META_IIF), *verdict(_DROP)),
        _rule(*_port_is_lost(_META_OIF), *verdict(_DROP), chain=_OUT_CHAIN),
    ]
    keys: dict[int, list[bytes]] = {4: [], 6: []}
    for port, addresses in allowed.items():
        index = socket.if_nametoindex(port).to_bytes(4, sys.byteorder)
        for address in addresses:
            keys[address.version].append(index + address.packed)
    for number, version in enumerate(_SETS, 1):
        name, key_type, protocol, offset, length = _SETS[version]
        messages.append(
            _message(
                nft_set_msg,
                NFT_MSG_NEWSET,
                table=_TABLE,
                name=name,
                id=number,
                key_type=key_type,
                key_len=4 + length,
            )
        )
        messages += _elements(name, keys[version])
        messages.append(
            _rule(
                *_protocol_is(protocol),
                genex("meta", {"key": _META_IIF, "dreg": _PORT_REGISTER}),
                genex(
                    "payload",
                    {
                        "dreg": _SOURCE_REGISTER,
                        "base": _NETWORK_HEADER,
                        "offset": offset,
                        "len": length,
                    },
                ),
                genex("lookup", {"set": name, "sreg": _PORT_REGISTER}),
                *verdict(_ACCEPT),
            )
        )
    messages.append(_rule(*_protocol_is(_ARP), *verdict(_ACCEPT)))
    messages.append(_rule(genex("counter", {"bytes": 0, "packets": 0}), *verdict(_DROP)))
    with NFTables(nfgen_family=_FAMILY_BRIDGE) as nftables:
        nftables.nlm_request_batch([_edge(_BATCH_BEGIN), *messages, _edge(_BATCH_END)])


def _read_drops() -> int:
    with NFTables(nfgen_family=_FAMILY_BRIDGE) as nftables:
        rules = nftables.request_get(nft_rule_msg(), NFT_MSG_GETRULE)
    for rule in rules:
        if rule.get_attr("NFTA_RULE_TABLE") != _TABLE:
            continue
        for expression in rule.get_attr("NFTA_RULE_EXPRESSIONS"):
            if expression.get_attr("NFTA_EXPR_NAME") == "counter":
                data = expression.get_attr("NFTA_EXPR_DATA")
                return int(data.get_attr("NFTA_COUNTER_PACKETS"))
    raise TopologyError("the guard against spoofed radio sources is gone")


def _port_is_lost(port: int) -> tuple[Any, Any]:
    return (
        genex("meta", {"key": port, "dreg": _PORT_REGISTER}),
        genex("lookup", {"set": _LOST, "sreg": _PORT_REGISTER}),
    )


def _elements(name: str, keys: list[bytes], kind: int = NFT_MSG_NEWSETELEM) -> Iterable[Any]:
    for start in range(0, len(keys), _ELEMENTS_PER_MESSAGE):
        yield _message(
            nft_set_elem_list_msg,
            kind,
            table=_TABLE,
            set=name,
            elements=[
                _attributes(NFTA_SET_ELEM_KEY=_attributes(NFTA_DATA_VALUE=key))
                for key in keys[start : start + _ELEMENTS_PER_MESSAGE]
            ],
        )


def _protocol_is(ether_type: bytes) -> tuple[Any, Any]:
    data = _attributes(NFTA_DATA_VALUE=ether_type)
    return (
        genex("meta", {"key": _META_PROTOCOL, "dreg": _REGISTER_1}),
        genex("cmp", {"sreg": _REGISTER_1, "op": 0, "data": data}),
    )


def _base_chain(name: str, hook: int) -> Any:
    return _message(
        nft_chain_msg,
        NFT_MSG_NEWCHAIN,
        table=_TABLE,
        name=name,
        type="filter",
        hook=_attributes(NFTA_HOOK_HOOKNUM=hook, NFTA_HOOK_PRIORITY=_BEFORE_ALL_ELSE),
        policy=_ACCEPT,
    )


def _rule(*expressions: Any, chain: str = _CHAIN) -> Any:
    return _message(
        nft_rule_msg, NFT_MSG_NEWRULE, table=_TABLE, chain=chain, expressions=list(expressions)
    )


def _attributes(**values: Any) -> dict[str, Any]:
    return {"attrs": list(values.items())}


def _message(kind: Any, number: int, **values: Any) -> Any:
    message = kind()
    message["attrs"] = [(kind.name2nla(name), value) for name, value in values.items()]
    message["header"]["type"] = (NFNL_SUBSYS_NFTABLES << 8) | number
    message["header"]["flags"] = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE
    if number == NFT_MSG_NEWRULE:
        message["header"]["flags"] |= NLM_F_APPEND
    message["nfgen_family"] = _FAMILY_BRIDGE
    return message


def _edge(number: int) -> Any:
    """The message that begins or ends an atomic batch."""
    message = nfgen_msg()
    message["res_id"] = NFNL_SUBSYS_NFTABLES
    message["header"]["type"] = number
    message["header"]["flags"] = NLM_F_REQUEST
    return message
