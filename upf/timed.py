"""Elements that end at a deadline, whatever becomes of this process: changed in one batch."""

import time
from collections.abc import Callable, Iterable
from operator import itemgetter

from controlplane.enforcement import EnforcementError
from upf.elements import Addition, Counters
from upf.nft_socket import NftSocket
from upf.readback import read_element

NS_PER_MS = 1_000_000
# A timeout counts from when the kernel handles the batch, at most this long after it was computed
# (checked each time); it is shortened by as much, so that no element outlives its lease.
GUARD_MS = 1
ELEMENTS_PER_GUARD_MS = 50  # and a large batch takes longer
MAX_TRIES = 12

ElementName = tuple[str, bytes]  # set, key

# What an element should be: set, key, data, comment, deadline (CLOCK_MONOTONIC, ns), and counters
# to start from if it has them of its own. A bare tuple: six of them a lease, on the hot path.
Wanted = tuple[str, bytes, bytes, bytes, int, Counters | None]


class TimedElements:
    """Brings the elements of one kernel's sets to what they should be."""

    def __init__(
        self,
        socket: NftSocket,
        *,
        in_place_renewal: bool,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._socket = socket
        self._in_place_renewal = in_place_renewal
        self._clock = clock

    def change(self, pairs: Iterable[tuple[list[Wanted], list[Wanted]]], now_ns: int) -> None:
        """Send the difference between what is and what should be, by flow, as one batch.

        Raises BatchError or OSError if the kernel refuses it, and EnforcementError if it is too
        slow; nothing of it took effect then, but for what had to end.
        """
        changes: list[Wanted] = []
        deletes: list[ElementName] = []
        for are, after in pairs:
            if not are:
                changes += after
                continue
            before = {is_[:2]: is_ for is_ in are if is_[4] > now_ns}
            for wanted in after:
                is_ = before.pop(wanted[:2], None)
                if is_ is None:
                    changes.append(wanted)
                elif is_ != wanted:
                    changes.append(self._changed(is_, wanted, deletes))
            deletes += before
        self._send(deletes, changes)

    def replace(self, strangers: list[ElementName], wanted: list[Wanted]) -> None:
        """Delete some elements and add others, which may be there already."""
        self._send(strangers + [one[:2] for one in wanted], wanted)

    def _changed(self, is_: Wanted, wanted: Wanted, deletes: list[ElementName]) -> Wanted:
        """Return what to add so that a live element becomes what is wanted.

        If it must go first it is appended to `deletes`; a renewed one then counts on from where
        it was.
        """
        set_name, key, data, comment, deadline_ns, counters = wanted
        if is_[2:4] != (data, comment):
            deletes.append((set_name, key))
        elif not self._in_place_renewal:
            deletes.append((set_name, key))
            found = read_element(self._socket, set_name, key)
            if found is not None and found.counted:
                counters = Counters(found.packets, found.bytes)
        return (set_name, key, data, comment, deadline_ns, counters)

    def _send(self, deletes: list[ElementName], changes: list[Wanted]) -> None:
        """Send one batch. If it began to count too late to end in time, correct it at once."""
        deletes.sort(key=itemgetter(0))  # neighbours of one set share a request
        changes.sort(key=itemgetter(0))
        least_ms = GUARD_MS + len(changes) // ELEMENTS_PER_GUARD_MS
        for doublings in range(MAX_TRIES):
            guard_ms = least_ms << doublings
            computed_ns = self._clock()
            ends_ns = computed_ns + guard_ms * NS_PER_MS
            adds: list[Addition] = []
            over: list[ElementName] = []
            for set_name, key, data, comment, deadline_ns, counters in changes:
                timeout_ms = (deadline_ns - ends_ns) // NS_PER_MS
                if timeout_ms > 0:
                    adds.append((set_name, key, timeout_ms, data, comment, counters))
                else:
                    over.append((set_name, key))
            if over:
                deletes = list(dict.fromkeys(deletes + over))
            self._socket.commit([*deletes, *adds])
            if not changes or self._clock() <= ends_ns:
                return
            deletes = []
            changes = [self._changed(wanted, wanted, deletes) for wanted in changes]
        self._socket.commit([wanted[:2] for wanted in changes])  # fail closed
        raise EnforcementError("this machine is too slow to time a lease")
