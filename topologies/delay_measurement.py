"""What a delayed link really does: one-way delays, and the packet rate it carries without loss.

Both ends share the machine's clock, so one-way delays need no synchronisation: from the sender's
clock reading just before the send to the kernel's receive timestamp.
"""

import socket
import struct
import time
from typing import Any

from upf.netns import in_namespace

_SO_TIMESTAMPNS = 35
_SO_RCVBUFFORCE = 33
_RECEIVE_BUFFER_BYTES = 64 << 20
_PROBES = 200
_PROBE_INTERVAL_NS = 1_000_000
_SETTLE_S = 2.0
_RATES_PER_S = (10_000, 20_000, 40_000, 80_000, 160_000)
_RATE_STEP_S = 0.12
_PAYLOAD_BYTES = 64


def measure(netns1: str, address1: str, netns2: str, address2: str) -> dict[str, Any]:
    """Measure the link between two nodes.

    `there_ms` and `back_ms` hold p50 and p99 of the one-way delays, `probes` and `probes_lost`
    how many there were in both directions; `lossless_packets_per_s` is the highest rate that
    was sent one way without loss, `first_lossy_packets_per_s` the next one tried, or None.
    """
    end1 = in_namespace(netns1, lambda: _socket(address1))
    end2 = in_namespace(netns2, lambda: _socket(address2))
    with end1, end2:
        there, back = _one_way_ms(end1, end2)
        lossless, lossy = _rates(end1, end2)
    return {
        "there_ms": _summary(there),
        "back_ms": _summary(back),
        "probes": 2 * _PROBES,
        "probes_lost": 2 * _PROBES - len(there) - len(back),
        "lossless_packets_per_s": lossless,
        "first_lossy_packets_per_s": lossy,
    }


def describe(measured: dict[str, Any]) -> list[str]:
    """What `Network.measure_delays` returned, a line per link, for a reader."""
    lines = []
    for name, link in measured.items():
        lossy = link["first_lossy_packets_per_s"]
        lines.append(
            f"{name}: asked for {link['asked_delay_ms']:g} ms one way, got "
            f"{link['there_ms']['p50']:.3f} there and {link['back_ms']['p50']:.3f} back "
            f"(p99 {link['there_ms']['p99']:.3f}, {link['back_ms']['p99']:.3f}) "
            f"by {link['mechanism']}; no loss at {link['lossless_packets_per_s']} packets/s"
            + (f", loss at {lossy}" if lossy else "")
        )
    return lines


def _socket(address: str) -> socket.socket:
    end = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    end.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
    end.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER_BYTES)
    end.bind((address, 0))
    return end


def _one_way_ms(end1: socket.socket, end2: socket.socket) -> tuple[list[float], list[float]]:
    # The first packet each way resolves the neighbour's address; it is not counted.
    for source, sink in ((end1, end2), (end2, end1)):
        source.sendto(b"first", sink.getsockname())
        sink.settimeout(_SETTLE_S)
        sink.recv(64)
    start_ns = time.monotonic_ns()
    for number in range(_PROBES):
        wait_ns = start_ns + number * _PROBE_INTERVAL_NS - time.monotonic_ns()
        time.sleep(max(wait_ns, 0) / 1e9)
        for source, sink in ((end1, end2), (end2, end1)):
            source.sendto(time.time_ns().to_bytes(8, "big"), sink.getsockname())
    return _delays_ms(end2), _delays_ms(end1)


def _delays_ms(sink: socket.socket) -> list[float]:
    delays: list[float] = []
    while len(delays) < _PROBES:
        try:
            data, ancillary, _, _ = sink.recvmsg(64, 128)
        except TimeoutError:
            break
        seconds, nanoseconds = struct.unpack("qq", ancillary[0][2])
        received_ns = seconds * 1_000_000_000 + nanoseconds
        delays.append((received_ns - int.from_bytes(data, "big")) / 1e6)
    return delays


def _rates(source: socket.socket, sink: socket.socket) -> tuple[int, int | None]:
    """The highest achieved rate without loss and the first one with loss."""
    lossless = 0
    for asked in _RATES_PER_S:
        count, achieved = _burst(source, sink.getsockname(), asked)
        if _drain(sink, count) < count:
            return lossless, achieved
        if achieved <= lossless * 1.1:
            break  # the sender can do no more
        lossless = max(lossless, achieved)
    return lossless, None


def _burst(source: socket.socket, to: Any, rate_per_s: int) -> tuple[int, int]:
    payload = bytes(_PAYLOAD_BYTES)
    sent, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < _RATE_STEP_S:
        for _ in range(int(elapsed * rate_per_s) - sent):
            source.sendto(payload, to)
            sent += 1
    return sent, int(sent / (time.perf_counter() - start))


def _drain(sink: socket.socket, count: int) -> int:
    received = 0
    sink.settimeout(0.3)
    try:
        while received < count:
            sink.recv(256)
            received += 1
    except TimeoutError:
        pass
    return received


def _summary(delays_ms: list[float]) -> dict[str, float | None]:
    if not delays_ms:
        return {"p50": None, "p99": None}
    ordered = sorted(delays_ms)
    return {
        "p50": round(ordered[len(ordered) // 2], 4),
        "p99": round(ordered[int(len(ordered) * 0.99)], 4),
    }
