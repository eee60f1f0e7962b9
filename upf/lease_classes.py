"""The HTB classes of GBR leases: which lease has which, and on which interfaces they stand.

A lease of a GBR 5QI has a class of its own, of the same number at every point where its packets may
queue: its GFBR is the class's rate, its MFBR the most it may borrow. The class is made before the
first element names it and removed after the last is gone, with whatever still waits in it; one
that no element names carries nobody's packets. A lease that moves hands its class on if its QoS
stays the same, so that a relocation loses nothing that waits there.
"""

import logging
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence

from controlplane.enforcement import Binding, EnforcementError, QosFlow
from upf.config import QosPoint
from upf.htb import ROOT, WHOLE, HtbClass, HtbError, HtbSocket, frame_bytes_per_s
from upf.netns import route_socket
from upf.qos import FIRST_LEASE, LAST_LEASE, QosError, class_ids, is_lease, priority

log = logging.getLogger(__name__)

LEAST_RATE_BPS = 8_000  # of a direction in which nothing is guaranteed: HTB wants a rate


class LeaseClasses:
    """Hands classes out and takes them back, at all points at once."""

    def __init__(self, points: Sequence[QosPoint], known: Mapping[str, int]) -> None:
        """`known`: classes that elements of an earlier process name, by lease id.

        Lease classes that are there without being known are removed. Raises QosError if an
        interface is missing.
        """
        self._class_of = dict(known)
        self._holders = Counter(known.values())  # leases, by class
        taken = {class_id & 0xFFFF for class_id in known.values()}
        self._free = deque(n for n in range(FIRST_LEASE, LAST_LEASE + 1) if n not in taken)
        self._sockets: dict[str, HtbSocket] = {}
        self._points: list[tuple[QosPoint, HtbSocket, int]] = []
        for point in points:
            handle = self._sockets.get(point.netns)
            if handle is None:
                handle = self._sockets[point.netns] = HtbSocket(point.netns)
            with route_socket(point.netns) as routes:
                found = routes.link_lookup(ifname=point.interface)
                if not found:
                    raise QosError(f"there is no interface {point.interface}")
                self._points.append((point, handle, found[0]))
                there = class_ids(routes, found[0])
            strange = {one for one in there if is_lease(one) and one & 0xFFFF not in taken}
            try:
                handle.remove((found[0], one) for one in strange)
            except HtbError as error:
                raise QosError(f"{point.interface}: {error}") from error

    def close(self) -> None:
        """Let go of the sockets. Classes stay."""
        for handle in self._sockets.values():
            handle.close()

    def class_of(self, binding: Binding) -> int:
        """Return the id of the class that a lease's packets belong to; 0: none, best effort."""
        qos = binding.qos
        if qos.guaranteed:
            return self._class_of[binding.lease_id]
        return ROOT | qos.five_qi if qos.dscp else 0  # what is not even marked is best effort

    def open(self, leases: Iterable[tuple[Binding, Binding | None]]) -> list[str]:
        """Give each of these leases a class, if it has none; return the ids of those that had none.

        With each comes the one whose place it takes. Raises EnforcementError, and changes nothing.
        """
        opened: list[str] = []
        new: list[Binding] = []
        for binding, old in leases:
            if binding.lease_id in self._class_of:
                continue
            opened.append(binding.lease_id)
            if old is not None and old.qos == binding.qos and old.lease_id in self._class_of:
                class_id = self._class_of[old.lease_id]
            elif self._free:
                class_id = ROOT | self._free.popleft()
                new.append(binding)
            else:
                self.forget(opened)
                raise EnforcementError("every QoS class is taken")
            self._class_of[binding.lease_id] = class_id
            self._holders[class_id] += 1
        try:
            self.make(new)
        except EnforcementError:
            self.forget(opened)
            raise
        return opened

    def make(self, bindings: Iterable[Binding]) -> None:
        """Make the classes that these leases have, or make them what their QoS says."""
        bindings = list(bindings)
        try:
            for point, handle, index in self._points if bindings else ():
                handle.make(
                    (index, lease_class(self._class_of[binding.lease_id], binding.qos, point))
                    for binding in bindings
                )
        except (HtbError, OSError) as error:
            raise EnforcementError(str(error)) from error

    def forget(self, lease_ids: Iterable[str]) -> None:
        """Take back the classes of leases whose elements are gone.

        One that was handed on stays with its new lease.
        """
        gone: list[int] = []
        for lease_id in lease_ids:
            class_id = self._class_of.pop(lease_id, None)
            if class_id is not None:
                self._holders[class_id] -= 1
                if not self._holders[class_id]:
                    del self._holders[class_id]
                    gone.append(class_id)
        self._free.extend(class_id & 0xFFFF for class_id in gone)
        try:
            for _, handle, index in self._points if gone else ():
                handle.remove((index, class_id) for class_id in gone)
        except (HtbError, OSError) as error:  # left over it is in nobody's way
            log.error("QoS classes are left over: %s", error)


def lease_class(class_id: int, qos: QosFlow, point: QosPoint) -> HtbClass:
    """Return the class of a lease at a point."""
    if point.uplink:
        guaranteed_bps, most_bps = qos.guaranteed_uplink_bps, qos.max_uplink_bps
    else:
        guaranteed_bps, most_bps = qos.guaranteed_downlink_bps, qos.max_downlink_bps
    ceil_bps = min(most_bps or point.capacity_bps, point.capacity_bps)
    rate_bps = min(max(guaranteed_bps, LEAST_RATE_BPS), ceil_bps)
    return HtbClass(
        class_id,
        WHOLE,
        frame_bytes_per_s(rate_bps),
        frame_bytes_per_s(ceil_bps),
        priority(qos),
    )
