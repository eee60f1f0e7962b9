"""QoS classes on the N3 side: an HTB tree that leases put packets into.

The tree itself gives nobody anything: without a lease's `qos` element every packet is in the
default class. A profile's class is guaranteed a share of the cell's capacity and goes first; what
it leaves, and no more than the cell can carry, is best effort.

    a15:    root
    a15:1   the cell's capacity
    a15:10  best effort: what is not guaranteed, up to everything
    a15:20, a15:21, ...  one class a profile: its share guaranteed, up to everything
"""

from collections.abc import Iterable, Mapping
from typing import Any

from pyroute2 import IPRoute

from upf.netns import route_socket

# A major number that is nobody's habit, as 1: is.
ROOT, WHOLE, BEST_EFFORT, FIRST_PROFILE = 0xA15_0000, 0xA15_0001, 0xA15_0010, 0xA15_0020
MAX_PROFILES = 0x100
QUEUE_PACKETS = 1_000
BURST_MS = 2
LEAST_BURST_BYTES = 16_384
LEAST_BEST_EFFORT_SHARE = 0.01
PRIORITY_GUARANTEED, PRIORITY_BEST_EFFORT = 0, 1


class QosError(Exception):
    """QoS classes could not be set, or are not what was set."""


def class_ids(shares: Mapping[str, float]) -> dict[str, int]:
    """Return the tc class of each profile that has a guaranteed share; others are best effort."""
    names = [name for name, share in shares.items() if share > 0]
    if len(names) > MAX_PROFILES:
        raise QosError(f"more than {MAX_PROFILES} QoS profiles")
    return {name: FIRST_PROFILE + number for number, name in enumerate(names)}


def install(
    netns_path: str, capacities_bps: Mapping[str, int], shares: Mapping[str, float]
) -> None:
    """Put the tree on every interface of `capacities_bps` (name -> bit/s), and read it back.

    `shares`: of the capacity, guaranteed to each profile; their sum may be 1 at most. A tree that
    is there already is kept if it is the same, so that a restart disturbs no packet.
    """
    if not 0 <= sum(shares.values()) <= 1:
        raise QosError("QoS profiles guarantee more than the whole capacity")
    with route_socket(netns_path) as routes:
        for name, capacity_bps in capacities_bps.items():
            found = routes.link_lookup(ifname=name)
            if not found:
                raise QosError(f"there is no interface {name}")
            wanted = _wanted(capacity_bps, shares)
            if _read(routes, found[0]) != wanted:
                _build(routes, found[0], wanted)
                if (is_ := _read(routes, found[0])) != wanted:
                    raise QosError(f"{name}: asked for HTB classes {wanted}, found {is_}")


def remove(netns_path: str, interfaces: Iterable[str]) -> None:
    """Take the tree away from these interfaces, those of them that are there and have it."""
    with route_socket(netns_path) as routes:
        for name in interfaces:
            for index in routes.link_lookup(ifname=name):
                _remove(routes, index)


# class id -> (parent, guaranteed bytes/s, most bytes/s, priority)
_Tree = dict[int, tuple[int, int, int, int]]


def _wanted(capacity_bps: int, shares: Mapping[str, float]) -> _Tree:
    whole = capacity_bps // 8
    rest = max(1 - sum(shares.values()), LEAST_BEST_EFFORT_SHARE)
    tree = {
        WHOLE: (ROOT, whole, whole, 0),
        BEST_EFFORT: (WHOLE, int(whole * rest), whole, PRIORITY_BEST_EFFORT),
    }
    for name, class_id in class_ids(shares).items():
        tree[class_id] = (WHOLE, int(whole * shares[name]), whole, PRIORITY_GUARANTEED)
    return tree


def _build(routes: IPRoute, index: int, tree: _Tree) -> None:
    _remove(routes, index)
    routes.tc("add", "htb", index=index, handle=ROOT, default=BEST_EFFORT & 0xFFFF)
    for class_id, (parent, rate, ceil, priority) in tree.items():
        burst = max(ceil * BURST_MS // 1_000, LEAST_BURST_BYTES)
        routes.tc(
            "add-class",
            "htb",
            index=index,
            handle=class_id,
            parent=parent,
            rate=rate,
            ceil=ceil,
            burst=burst,
            cburst=burst,
            prio=priority,
        )
        if class_id != WHOLE:
            queue = (class_id & 0xFFFF) << 16
            routes.tc(
                "add", "pfifo", index=index, handle=queue, parent=class_id, limit=QUEUE_PACKETS
            )


def _remove(routes: IPRoute, index: int) -> None:
    if any(_is_ours(qdisc, index) for qdisc in routes.get_qdiscs()):
        routes.tc("del", index=index, handle=ROOT, root=True)


def _read(routes: IPRoute, index: int) -> _Tree:
    if not any(_is_ours(qdisc, index) for qdisc in routes.get_qdiscs()):
        return {}
    tree: _Tree = {}
    for found in routes.get_classes(index=index):
        parameters = found.get_attr("TCA_OPTIONS").get_attr("TCA_HTB_PARMS")
        tree[found["handle"]] = (
            ROOT if found["parent"] == 0xFFFF_FFFF else found["parent"],
            parameters["rate"],
            parameters["ceil"],
            parameters["prio"],
        )
    return tree


def _is_ours(qdisc: Any, index: int) -> bool:
    return bool(
        qdisc["index"] == index and qdisc["handle"] == ROOT and qdisc.get_attr("TCA_KIND") == "htb"
    )
