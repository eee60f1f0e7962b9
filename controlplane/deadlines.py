"""When each live lease needs attention: before it is due, to be counted, and when it is due.

Counts are read twice before the end: the second time is as late as the kernel's own tolerance
allows, and the first is for when a stall of this process makes that too late.
"""

import heapq
from collections.abc import Callable

from controlplane.clock import NS_PER_MS
from controlplane.lease import Lease, State

# Before the deadline; the last is the deadline itself.
COUNTED = (500 * NS_PER_MS, 30 * NS_PER_MS, 0)
AGAIN_NS = 5 * NS_PER_MS  # between tries to end what is overdue
NOT_COUNTED = (0,)  # what was only prepared has nothing to count


class Deadlines:
    """A heap of instants; those of leases that have changed since are passed over."""

    def __init__(self, find: Callable[[str], Lease | None]) -> None:
        """`find` returns a lease as it is now."""
        self._find = find
        self.sooner: Callable[[], None] = lambda: None  # whoever waits for `next_ns` wants to know
        self._heap: list[tuple[int, int, str]] = []  # instant, deadline, lease id

    def watch(self, lease: Lease, now_ns: int) -> None:
        """Let a lease be returned when it next needs attention, after `now_ns`."""
        deadline_ns = lease.deadline_ns
        at_ns = now_ns + AGAIN_NS
        for before_ns in NOT_COUNTED if lease.state is State.PREPARED else COUNTED:
            if deadline_ns - before_ns > now_ns:
                at_ns = deadline_ns - before_ns
                break
        if not self._heap or at_ns < self._heap[0][0]:
            self.sooner()
        heapq.heappush(self._heap, (at_ns, deadline_ns, lease.terms.lease_id))

    def next_ns(self) -> int | None:
        """Return when a lease next needs attention; None if none ever will."""
        while self._heap:
            at_ns, deadline_ns, lease_id = self._heap[0]
            if self._current(lease_id, deadline_ns) is not None:
                return at_ns
            heapq.heappop(self._heap)
        return None

    def due(self, now_ns: int) -> list[Lease]:
        """Return the leases that need attention by now; each is to be watched again, or ends."""
        found: dict[str, Lease] = {}  # one may be there twice: a drain that ends with its lease
        while self._heap and self._heap[0][0] <= now_ns:
            _, deadline_ns, lease_id = heapq.heappop(self._heap)
            lease = self._current(lease_id, deadline_ns)
            if lease is not None:
                found[lease_id] = lease
        return list(found.values())

    def _current(self, lease_id: str, deadline_ns: int) -> Lease | None:
        lease = self._find(lease_id)
        if lease is None or lease.state is State.ENDED or lease.deadline_ns != deadline_ns:
            return None
        return lease
