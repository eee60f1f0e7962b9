"""The probes behind `upf.features`: each tries one thing in a throwaway network namespace.

Run as a program (`python -m upf.feature_probes`): it enters a namespace, tries, prints JSON and
exits, and the kernel takes the namespace and all in it away.
"""

import asyncio
import ctypes
import errno
import json
import os
import socket
from collections.abc import Callable
from contextlib import closing
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink import NLM_F_ACK, NLM_F_REQUEST
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.nfnetlink import nftsocket
from pyroute2.nftables.main import AsyncNFTables

from upf import expressions as nft
from upf import fastpath, libbpf
from upf.messages import batch, message

CLONE_NEWNS, CLONE_NEWNET, CLONE_NEWPID = 0x00020000, 0x40000000, 0x20000000
NFPROTO_INET, NFPROTO_BRIDGE = 1, 7
SO_RXQ_OVFL, PACKET_VNET_HDR, SOL_PACKET = 40, 15, 263
SO_TIMESTAMPNS, SO_RCVBUFFORCE = 35, 33
CT_STATE = 0
TABLE = "probe"


# --- namespaces and links ---------------------------------------------------------------------


def _unshare(flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _netns() -> None:
    _unshare(CLONE_NEWNET)


def _mount_pid_ns() -> None:
    _unshare(CLONE_NEWNS | CLONE_NEWPID)


def _net_admin() -> None:
    with IPRoute() as route:
        route.link("set", index=1, state="up")


def _add_link(name: str, kind: str, **options: Any) -> int:
    with IPRoute() as route:
        route.link("add", ifname=name, kind=kind, **options)
        return int(route.link_lookup(ifname=name)[0])


def _veth() -> None:
    index = _add_link("veth0", "veth", peer="veth1")
    with IPRoute() as route:
        route.link("set", index=index, state="up")


def _bridge() -> None:
    _add_link("bridge0", "bridge")


def _ipv6() -> None:
    with IPRoute() as route:
        route.addr("add", index=1, address="fd00:a151::1", prefixlen=128)


def _rule_by_mark(family: socket.AddressFamily) -> None:
    with IPRoute() as route:
        route.rule("add", family=family, fwmark=0xA1, table=161, priority=100)
        route.route("add", family=family, dst="default", oif=1, table=161)


def _policy_routing() -> None:
    _rule_by_mark(socket.AF_INET)


def _policy_routing6() -> None:
    _rule_by_mark(socket.AF_INET6)


def _htb() -> None:
    index = _add_link("htb0", "veth", peer="htb1")
    with IPRoute() as route:
        route.tc("add", "htb", index, 0x10000, default=0x10)
        route.tc("add-class", "htb", index, 0x10010, parent=0x10000, rate="1mbit", ceil="1mbit")


def _netem() -> None:
    index = _add_link("netem0", "veth", peer="netem1")
    with IPRoute() as route:
        route.tc("add", "netem", index, 0x10000, delay=1000)


# --- nf_tables --------------------------------------------------------------------------------


def _commit(*messages: Any, family: int = NFPROTO_INET) -> None:
    """Apply messages in one transaction, or raise NetlinkError and change nothing."""
    for each in messages:
        each["nfgen_family"] = family

    async def send() -> None:
        async with AsyncNFTables() as tables:
            async for _ in tables.nlm_request_batch(batch(list(messages))):
                pass

    asyncio.run(send())


def _table() -> Any:
    return message(nftsocket.nft_table_msg, nftsocket.NFT_MSG_NEWTABLE, NFTA_TABLE_NAME=TABLE)


def _element(kind: int, *, timeout_ms: int | None = None) -> Any:
    attributes: list[tuple[str, Any]] = [
        ("NFTA_SET_ELEM_KEY", {"attrs": [("NFTA_DATA_VALUE", bytes([10, 45, 0, 1]))]})
    ]
    if timeout_ms is not None:
        attributes += [
            ("NFTA_SET_ELEM_DATA", {"attrs": [("NFTA_DATA_VALUE", nft.u32(1))]}),
            ("NFTA_SET_ELEM_TIMEOUT", timeout_ms),
        ]
    return message(
        nftsocket.nft_set_elem_list_msg,
        kind,
        NFTA_SET_ELEM_LIST_TABLE=TABLE,
        NFTA_SET_ELEM_LIST_SET="map",
        NFTA_SET_ELEM_LIST_ELEMENTS=[{"attrs": attributes}],
    )


def _add_element(timeout_ms: int) -> Any:
    return _element(nftsocket.NFT_MSG_NEWSETELEM, timeout_ms=timeout_ms)


def _try_rule(*expressions: nft.Expression) -> None:
    _commit(
        _table(),
        message(
            nftsocket.nft_chain_msg,
            nftsocket.NFT_MSG_NEWCHAIN,
            NFTA_CHAIN_TABLE=TABLE,
            NFTA_CHAIN_NAME="chain",
        ),
        message(
            nftsocket.nft_rule_msg,
            nftsocket.NFT_MSG_NEWRULE,
            NFTA_RULE_TABLE=TABLE,
            NFTA_RULE_CHAIN="chain",
            NFTA_RULE_EXPRESSIONS=list(expressions),
        ),
    )


def _nft_inet() -> None:
    _commit(_table())


def _nft_bridge() -> None:
    _commit(_table(), family=NFPROTO_BRIDGE)


def _timeout_map() -> None:
    new_map = message(
        nftsocket.nft_set_msg,
        nftsocket.NFT_MSG_NEWSET,
        NFTA_SET_TABLE=TABLE,
        NFTA_SET_NAME="map",
        NFTA_SET_ID=1,
        NFTA_SET_FLAGS={"NFT_SET_MAP", "NFT_SET_TIMEOUT"},
        NFTA_SET_KEY_TYPE=nftsocket.DATA_TYPE_IPADDR,
        NFTA_SET_KEY_LEN=4,
        NFTA_SET_DATA_TYPE=nftsocket.DATA_TYPE_MARK,
        NFTA_SET_DATA_LEN=4,
        NFTA_SET_EXPR=nft.counter(),
    )
    _commit(_table(), new_map, _add_element(60_000))


def _in_place_renewal() -> None:
    """Give the element of `_timeout_map` a longer timeout and read back whether it took it."""
    _commit(_add_element(600_000))
    read: list[int] = []

    async def get() -> None:
        async with AsyncNFTables() as tables:
            request = _element(nftsocket.NFT_MSG_GETSETELEM)
            request["header"]["flags"] = NLM_F_REQUEST | NLM_F_ACK
            async for answer in tables.nlm_request_batch([request]):
                elements = answer.get_attr("NFTA_SET_ELEM_LIST_ELEMENTS") or ()
                read.extend(one.get_attr("NFTA_SET_ELEM_EXPIRATION") for one in elements)

    asyncio.run(get())
    if not read or read[0] <= 60_000:
        raise OSError(errno.EOPNOTSUPP, "the old timeout stayed")


def _expression(name: str, *attributes: tuple[str, Any]) -> nft.Expression:
    return {"attrs": [("NFTA_EXPR_NAME", name), ("NFTA_EXPR_DATA", {"attrs": list(attributes)})]}


def _tc_bpf() -> None:
    """Load the fast path's programs, which verifies them, and attach them to an interface."""
    index = _add_link("ingress0", "veth", peer="ingress1")
    if not fastpath.PROGRAM.exists():
        why = f"{fastpath.PROGRAM.name} was not built: run scripts/setup"
        raise FileNotFoundError(errno.ENOENT, why)
    with closing(libbpf.Object(fastpath.PROGRAM)) as found:
        found.load()
        for name in (fastpath.N3, fastpath.N6):
            found.program(name).attach(index)


def _conntrack() -> None:
    _try_rule(_expression("ct", ("NFTA_CT_DREG", nft.REG_1), ("NFTA_CT_KEY", CT_STATE)))


def _ct_mark() -> None:
    _try_rule(nft.ct_load_mark(), nft.ct_set_mark())


def _nft_queue() -> None:
    _try_rule(nft.queue(1))


def _nfqueue_target() -> None:
    _try_rule(nft.queue_target(1))


def _nft_reject() -> None:
    _try_rule(nft.reject())


def _nfqueue() -> None:
    """Open a packet queue: the rules are of no use without one."""
    from netfilterqueue import NetfilterQueue

    NetfilterQueue().bind(1, lambda packet: None, 16)


# --- sockets ----------------------------------------------------------------------------------


def _udp_option(option: int, value: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe_socket:
        probe_socket.setsockopt(socket.SOL_SOCKET, option, value)


def _so_timestampns() -> None:
    _udp_option(SO_TIMESTAMPNS, 1)


def _so_rxq_ovfl() -> None:
    _udp_option(SO_RXQ_OVFL, 1)


def _so_rcvbufforce() -> None:
    _udp_option(SO_RCVBUFFORCE, 1 << 24)


def _packet_vnet_hdr() -> None:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as probe_socket:
        probe_socket.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)


# --- all of them ------------------------------------------------------------------------------

# In this order: a later probe may use what an earlier one made.
PROBES: tuple[Callable[[], None], ...] = (
    _netns,
    _net_admin,
    _veth,
    _bridge,
    _ipv6,
    _policy_routing,
    _policy_routing6,
    _htb,
    _netem,
    _nft_inet,
    _nft_bridge,
    _timeout_map,
    _in_place_renewal,
    _tc_bpf,
    _conntrack,
    _ct_mark,
    _nft_queue,
    _nfqueue_target,
    _nft_reject,
    _nfqueue,
    _so_timestampns,
    _so_rxq_ovfl,
    _so_rcvbufforce,
    _packet_vnet_hdr,
    _mount_pid_ns,  # last: no thread can be started after it
)


def _probe_here() -> dict[str, Any]:
    """Run every probe in this process, which is changed by it: for the child only."""
    found: dict[str, Any] = {"kernel": os.uname().release}
    reasons: dict[str, str] = {}
    for attempt in PROBES:
        name = attempt.__name__.removeprefix("_")
        if "netns" in reasons:  # nothing may be tried in the caller's own namespace
            reasons[name] = "not tried: no network namespace of its own"
            continue
        try:
            attempt()
        except NetlinkError as error:
            absent = error.code in (errno.ENOENT, errno.EOPNOTSUPP)
            reasons[name] = "not in this kernel" if absent else os.strerror(error.code)
        except Exception as error:  # one surprise must not hide what the others find
            reasons[name] = getattr(error, "strerror", None) or repr(error)
        else:
            found[name] = True
    return {**found, "reasons": reasons}


if __name__ == "__main__":
    print(json.dumps(_probe_here(), indent=2))
