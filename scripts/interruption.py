"""What one flow suffered: loss, duplicates, reordering and outages, from its records alone.

Pure functions of numpy arrays. A `Trace` puts together what was sent and what arrived, one entry
for each sequence number; `interruption` gives the figures of a stretch of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NO_SITE = 255

Int = NDArray[np.int64]
Flag = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Trace:
    """One flow's packets in the order of sending; every array has one entry a packet."""

    send_ns: Int
    recv_ns: Int
    """Kernel receive stamp of the first copy; 0 for a packet that never came."""
    site: NDArray[np.uint8]
    """The anchor of the first copy: it received, sent or echoed the packet; else `NO_SITE`."""
    lost: Flag
    """No copy within the waiting time (RFC 7680, section 2)."""
    late: Flag
    """Lost, but a copy came after the waiting time."""
    extra_copies: Int
    """Copies after the first (RFC 5560, arrival count minus one)."""
    reordered: Flag
    """Arrived after a packet with a greater sequence number (RFC 4737, section 3.3)."""
    arrivals_ns: Int
    """Receive stamps of all copies, sorted; as many as arrived."""

    @property
    def delay_ns(self) -> Int:
        """Receive stamp minus send time; without meaning where the packet never came."""
        return self.recv_ns - self.send_ns

    def window(self, start_ns: int, end_ns: int) -> slice:
        """The packets sent from `start_ns` to before `end_ns`."""
        low, high = np.searchsorted(self.send_ns, [start_ns, end_ns])
        return slice(int(low), int(high))


def build_trace(
    send_ns: Int,
    seq: NDArray[np.uint32],
    site: NDArray[np.uint8],
    recv_ns: Int,
    waiting_time_ms: int,
) -> Trace:
    """Join what a flow sent with what was received of it.

    `send_ns[i]` is when sequence number i was sent, in ascending order. `seq`, `site` and
    `recv_ns` are the received records in any order; ValueError if one of them was never sent.
    """
    count = len(send_ns)
    if len(seq) and int(seq.max()) >= count:
        raise ValueError(f"sequence number {int(seq.max())} received, {count} packets sent")
    order = np.lexsort((seq, recv_ns))
    seq, site, recv_ns = seq[order].astype(np.int64), site[order], recv_ns[order]
    unique, first_at = np.unique(seq, return_index=True)
    first_ns = np.zeros(count, np.int64)
    first_ns[unique] = recv_ns[first_at]
    first_site = np.full(count, NO_SITE, np.uint8)
    first_site[unique] = site[first_at]
    copies = np.bincount(seq, minlength=count)
    came = copies > 0
    late = came & (first_ns - send_ns > waiting_time_ms * 1_000_000)
    lost = late | ~came
    arrival = np.sort(first_at)
    arrival = arrival[~late[seq[arrival]]]
    in_order = seq[arrival]
    reordered = np.zeros(count, np.bool_)
    if len(in_order):
        reordered[in_order] = in_order < np.maximum.accumulate(in_order)
    return Trace(
        send_ns=send_ns,
        recv_ns=first_ns,
        site=first_site,
        lost=lost,
        late=late,
        extra_copies=np.maximum(copies - 1, 0),
        reordered=reordered,
        arrivals_ns=recv_ns,
    )


@dataclass(frozen=True, slots=True)
class Interruption:
    """The figures of one stretch of a flow."""

    sent: int
    received: int
    """Packets of which a copy came within the waiting time: sent = received + lost."""
    lost: int
    duplicated: int
    reordered: int
    late: int
    loss_outage_ms: float
    """Lost packets times the interval: lost / offered rate."""
    gap_outage_ms: float
    """Time without delivery by the clock: over the runs of missing sequence numbers, the send
    time of the first packet after the run minus that of the last before it, minus one interval."""
    loss_periods: int
    """Runs of consecutive losses (RFC 3357, section 4.1)."""
    longest_loss_period_packets: int
    loss_distances: Int
    """From each lost packet to the previous lost one, in packets (RFC 3357, section 3.4)."""

    def outages_disagree(self, interval_ns: int) -> bool:
        """Whether the two outages differ by more than one interval."""
        return abs(self.loss_outage_ms - self.gap_outage_ms) > interval_ns / 1e6


def interruption(trace: Trace, window: slice, interval_ns: int) -> Interruption:
    """The figures of the packets in `window`; a run that leaves the window is cut there."""
    lost = trace.lost[window]
    lost_count = int(np.count_nonzero(lost))
    begins, ends = _runs(lost)
    periods_ns = _elapsed_ns(trace.send_ns, begins + window.start, ends + window.start, interval_ns)
    return Interruption(
        sent=len(lost),
        received=len(lost) - lost_count,
        lost=lost_count,
        duplicated=int(trace.extra_copies[window].sum()),
        reordered=int(np.count_nonzero(trace.reordered[window])),
        late=int(np.count_nonzero(trace.late[window])),
        loss_outage_ms=lost_count * interval_ns / 1e6,
        gap_outage_ms=float(periods_ns.sum()) / 1e6,
        loss_periods=len(begins),
        longest_loss_period_packets=int((ends - begins).max(initial=0)),
        loss_distances=np.diff(np.flatnonzero(lost)),
    )


def _runs(flags: Flag) -> tuple[Int, Int]:
    """First index and index after the last of each run of true values."""
    edges = np.diff(np.concatenate(([False], flags, [False])).astype(np.int8))
    return np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)


def _elapsed_ns(send_ns: Int, begins: Int, ends: Int, interval_ns: int) -> Int:
    """How long each run of losses lasted by the send times around it.

    At the ends of a flow, where there is no packet before or after, one is put an interval away.
    """
    if not len(begins):
        return np.zeros(0, np.int64)
    padded = np.concatenate(([send_ns[0] - interval_ns], send_ns, [send_ns[-1] + interval_ns]))
    # Packet i is padded[i + 1]: padded[begins] is the one before, padded[ends + 1] the one after.
    elapsed: Int = padded[ends + 1] - padded[begins] - interval_ns
    return np.maximum(elapsed, 0)
