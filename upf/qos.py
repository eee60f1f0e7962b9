"""The HTB trees that say whose packets go first where capacity is short.

A tree gives nobody anything: without a lease's `qos` element every packet is best effort.

    a15:      root
    a15:1     the capacity
    a15:9     best effort, the default: what is left, up to everything
    a15:5QI   leases of a non-GBR 5QI share one class by it, in the order of their priority levels
    a15:1000  from here on, one class for each lease of a GBR 5QI (`upf.lease_classes`)
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute

from controlplane.enforcement import QosFlow
from upf.config import QosPoint
from upf.htb import ROOT, WHOLE, HtbClass, HtbError, HtbSocket
from upf.netns import route_socket

BEST_EFFORT = 9  # 5QI, and minor number of its class
# Minor numbers, and major ones of their queues: above the root's, below those the kernel gives.
FIRST_LEASE, LAST_LEASE = 0x1000, 0x7FFF
SHARED_PARTS = 1_000  # a shared class has this part of the capacity at least; the rest it borrows

# HTB has eight priorities: delay-critical GBR, then GBR, then the others, each kind in the order of
# the 5QIs' priority levels (TS 23.501, 5.7.3.3). A level from the list on is a step later.
CRITICAL = 0
GBR, GBR_LEVELS = 1, (25,)
SHARED, SHARED_LEVELS = 3, (50, 62, 70, 90)


class QosError(Exception):
    """QoS classes could not be set, or are not what was set."""


def priority(qos: QosFlow) -> int:
    """Return the HTB priority of a QoS flow; 0 goes first."""
    if qos.delay_critical:
        return CRITICAL
    if qos.guaranteed:
        return GBR + sum(qos.priority_level >= level for level in GBR_LEVELS)
    return _shared_priority(qos.priority_level)


def install(points: Iterable[QosPoint], shared: Mapping[int, int]) -> None:
    """Put a tree on every interface, and read it back.

    `shared`: the non-GBR 5QIs in use, and the priority level of each. A tree that is there already
    is kept if it is the same, with its leases' classes, so that a restart disturbs no packet.
    """
    for point in points:
        with _interface(point) as (routes, index):
            capacity = point.capacity_bps // 8
            wanted = {WHOLE: HtbClass(WHOLE, ROOT, capacity, capacity, 0)}
            wanted |= _shared(capacity, {BEST_EFFORT: 90, **shared})
            if read(routes, index) != wanted:
                _remove(routes, index)
                routes.tc("add", "htb", index=index, handle=ROOT, default=BEST_EFFORT)
                _make(point, index, wanted.values())
                _check(point, wanted, read(routes, index))


def extend(points: Iterable[QosPoint], shared: Mapping[int, int]) -> None:
    """Add the classes that leases share to trees of others, and read them back.

    Best effort must be such a tree's default, and borrow what it has.
    """
    for point in points:
        with _interface(point) as (routes, index):
            found = read(routes, index)
            if WHOLE not in found:
                raise QosError(
                    f"{point.interface}: no HTB tree a15: with its capacity as class a15:1"
                )
            others = {five_qi: level for five_qi, level in shared.items() if five_qi != BEST_EFFORT}
            wanted = found | _shared(found[WHOLE].ceil, others)
            missing = [one for name, one in wanted.items() if found.get(name) != one]
            if missing:
                _make(point, index, missing)
                _check(point, wanted, read(routes, index))


def remove(points: Iterable[QosPoint]) -> None:
    """Take the trees away from these interfaces, those of them that are there and have one."""
    for point in points:
        with _routes(point) as routes:
            for index in routes.link_lookup(ifname=point.interface):
                _remove(routes, index)


def withdraw(points: Iterable[QosPoint]) -> None:
    """Take from trees of others whatever was added to them: all but capacity and default."""
    for point in points:
        with _routes(point) as routes:
            for index in routes.link_lookup(ifname=point.interface):
                keep = {WHOLE} | {
                    ROOT | qdisc.get_attr("TCA_OPTIONS").get_attr("TCA_HTB_INIT")["defcls"]
                    for qdisc in routes.get_qdiscs()
                    if _is_tree(qdisc, index)
                }
                with contextlib.closing(HtbSocket(point.netns)) as handle:
                    handle.remove((index, one) for one in class_ids(routes, index) - keep)


def is_lease(class_id: int) -> bool:
    """Return whether a class is a lease's own."""
    return FIRST_LEASE <= class_id & 0xFFFF <= LAST_LEASE


def class_ids(routes: IPRoute, index: int) -> set[int]:
    """Return the ids of all classes on an interface; none if it has no tree of ours."""
    if not any(_is_tree(qdisc, index) for qdisc in routes.get_qdiscs()):
        return set()
    return {int(found["handle"]) for found in routes.get_classes(index=index)}


def read(routes: IPRoute, index: int) -> dict[int, HtbClass]:
    """Read the classes of an interface's tree, but for those of leases."""
    tree: dict[int, HtbClass] = {}
    if not any(_is_tree(qdisc, index) for qdisc in routes.get_qdiscs()):
        return tree
    for found in routes.get_classes(index=index):
        if is_lease(found["handle"]):
            continue
        options = found.get_attr("TCA_OPTIONS")
        parameters = options.get_attr("TCA_HTB_PARMS")
        tree[found["handle"]] = HtbClass(
            found["handle"],
            ROOT if found["parent"] == 0xFFFF_FFFF else found["parent"],
            options.get_attr("TCA_HTB_RATE64") or parameters["rate"],
            options.get_attr("TCA_HTB_CEIL64") or parameters["ceil"],
            parameters["prio"],
        )
    return tree


def _routes(point: QosPoint) -> IPRoute:
    if not Path(point.netns).exists():  # to enter it would make it
        raise QosError(f"there is no network namespace {point.netns}")
    return route_socket(point.netns)


@contextlib.contextmanager
def _interface(point: QosPoint) -> Iterator[tuple[IPRoute, int]]:
    with _routes(point) as routes:
        found = routes.link_lookup(ifname=point.interface)
        if not found:
            raise QosError(f"there is no interface {point.interface}")
        yield routes, found[0]


def _shared(capacity: int, shared: Mapping[int, int]) -> dict[int, HtbClass]:
    least = max(capacity // SHARED_PARTS, 1)
    return {
        ROOT | five_qi: HtbClass(ROOT | five_qi, WHOLE, least, capacity, _shared_priority(level))
        for five_qi, level in shared.items()
    }


def _shared_priority(level: int) -> int:
    return SHARED + sum(level >= one for one in SHARED_LEVELS)


def _make(point: QosPoint, index: int, classes: Iterable[HtbClass]) -> None:
    with contextlib.closing(HtbSocket(point.netns)) as handle:
        try:
            handle.make((index, one) for one in classes)
        except HtbError as error:
            raise QosError(f"{point.interface}: {error}") from error


def _check(point: QosPoint, wanted: dict[int, HtbClass], found: dict[int, HtbClass]) -> None:
    if found != wanted:
        raise QosError(f"{point.interface}: asked for HTB classes {wanted}, found {found}")


def _remove(routes: IPRoute, index: int) -> None:
    if any(_is_tree(qdisc, index) for qdisc in routes.get_qdiscs()):
        routes.tc("del", index=index, handle=ROOT, root=True)


def _is_tree(qdisc: Any, index: int) -> bool:
    return bool(
        qdisc["index"] == index and qdisc["handle"] == ROOT and qdisc.get_attr("TCA_KIND") == "htb"
    )
