"""Rates and delays on interfaces: HTB and netem, set and read through tc messages."""

from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.rtnl.tcmsg.common import time2tick

_ROOT = 0xA15_0000  # a15:
_WHOLE = 0xA15_0001  # a15:1, the capacity
_DEFAULT = 0xA15_0009  # a15:9, where packets are that nobody has put elsewhere
_QUEUE = 0x9_0000  # 9:
_DEFAULT_PARTS = 1_000  # of the capacity it has one; the rest it borrows, after others
_QUANTUM_BYTES = 3_028
_LAST = 7  # HTB priority
QUEUE_PACKETS = 1000
_BURST_MS = 2
_LEAST_BURST_BYTES = 16_384
DELAYED_PACKETS_PER_S = 200_000
_LEAST_DELAYED_PACKETS = 1_024


def delay_buffer_packets(delay_ms: float) -> int:
    """How many packets a delayed link holds at once in each direction: 200,000/s worth of them."""
    return max(_LEAST_DELAYED_PACKETS, int(delay_ms * DELAYED_PACKETS_PER_S / 1000))


def add_htb(rtnl: IPRoute, index: int, rate_mbps: float) -> None:
    """Send at most at the rate, through a first-in-first-out queue of 1,000 packets.

    Classes for some packets may be added beside the default one (a15:9), below the whole (a15:1).
    """
    rate_bytes = int(rate_mbps * 1_000_000 / 8)
    burst_bytes = max(rate_bytes * _BURST_MS // 1000, _LEAST_BURST_BYTES)
    rtnl.tc("add", "htb", index=index, handle=_ROOT, default=_DEFAULT & 0xFFFF)
    for handle, parent, rate in (
        (_WHOLE, _ROOT, rate_bytes),
        (_DEFAULT, _WHOLE, max(rate_bytes // _DEFAULT_PARTS, 1_000)),
    ):
        rtnl.tc(
            "add-class",
            "htb",
            index=index,
            handle=handle,
            parent=parent,
            rate=rate,
            ceil=rate_bytes,
            burst=burst_bytes,
            cburst=burst_bytes,
            prio=0 if handle == _WHOLE else _LAST,
            quantum=_QUANTUM_BYTES,
        )
    rtnl.tc("add", "pfifo", index=index, handle=_QUEUE, parent=_DEFAULT, limit=QUEUE_PACKETS)


def add_netem(rtnl: IPRoute, index: int, delay_ms: float) -> None:
    """Send everything `delay_ms` later, in order."""
    rtnl.tc(
        "add",
        "netem",
        index=index,
        handle=_ROOT,
        delay=round(delay_ms * 1000),  # microseconds
        limit=delay_buffer_packets(delay_ms),
    )


def read_qdiscs(rtnl: IPRoute, names: dict[int, str]) -> list[dict[str, Any]]:
    """Every qdisc and HTB class of the interfaces, JSON-able; `names` maps index to name.

    `rate_mbps` is there for HTB classes, `delay_ms` for netem.
    """
    found = []
    for message in rtnl.get_qdiscs():
        if message["index"] not in names or message.get_attr("TCA_KIND") == "noqueue":
            continue
        entry = _entry(message, names)
        if entry["kind"] == "htb":
            init = message.get_attr("TCA_OPTIONS").get_attr("TCA_HTB_INIT")
            entry["default_class"] = init["defcls"]
        elif entry["kind"] == "netem":
            options = message.get_attr("TCA_OPTIONS")
            entry["delay_ms"] = round(options["delay"] / time2tick(1000), 3)
            entry["limit_packets"] = options["limit"]
        found.append(entry)
    for index in sorted({m["index"] for m in rtnl.get_qdiscs() if _is_htb(m)} & set(names)):
        for message in rtnl.get_classes(index=index):
            entry = _entry(message, names)
            entry["kind"] = "htb class"
            parameters = message.get_attr("TCA_OPTIONS").get_attr("TCA_HTB_PARMS")
            entry["rate_mbps"] = parameters["rate"] * 8 / 1_000_000
            entry["ceil_mbps"] = parameters["ceil"] * 8 / 1_000_000
            found.append(entry)
    return found


def _is_htb(message: Any) -> bool:
    return bool(message.get_attr("TCA_KIND") == "htb")


def _entry(message: Any, names: dict[int, str]) -> dict[str, Any]:
    return {
        "interface": names[message["index"]],
        "kind": message.get_attr("TCA_KIND"),
        "handle": _handle(message["handle"]),
        "parent": "root" if message["parent"] == 0xFFFF_FFFF else _handle(message["parent"]),
    }


def _handle(number: int) -> str:
    return f"{number >> 16:x}:{number & 0xFFFF:x}"
