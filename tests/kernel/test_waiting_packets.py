"""Packets that wait at the UPF: first packets of a subscription, and what a lease holds."""

import errno
import gc
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from ipaddress import ip_address

import pytest
from plane import PORT, SERVICE, UE, Plane, packet_queue, plane, receives

from controlplane.enforcement import Flow, Hold, Install, Move, Renew, Resume, Revoke
from upf.buffering import PacketBuffer
from upf.nfqueue import PacketQueueError
from upf.parking import ParkingLimits

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces"),
    pytest.mark.skipif(
        os.geteuid() == 0 and packet_queue() is None, reason="the kernel has no NFQUEUE"
    ),
]
VERSIONS = pytest.mark.parametrize("version", [4, 6])
MS = 1_000_000


@pytest.fixture
def net() -> Iterator[Plane]:
    with plane(subscribed=True) as made:
        yield made


def buffer_of(net: Plane, limits: ParkingLimits | None = None) -> PacketBuffer:
    """Return the plane's buffer; another one if it is to have other limits."""
    assert net.buffer is not None
    if limits is not None:
        net.buffer.close()
        net.buffer = None
        gc.collect()
        net.buffer = net.open_buffer(limits)
    return net.buffer


def send(net: Plane, version: int, numbers: range, ue: int = 1) -> None:
    with net.open_socket(f"ue{ue}", version, UE[version][ue - 1]) as sender:
        for number in numbers:
            sender.sendto(str(number).encode(), (SERVICE[version], PORT))


def got(listener: socket.socket) -> list[int]:
    numbers = []
    listener.setblocking(False)
    try:
        while True:
            numbers.append(int(listener.recv(10)))
    except BlockingIOError:
        return numbers


def adds_up(buffer: PacketBuffer) -> bool:
    counts = buffer.counts
    return counts.stored == counts.released + counts.dropped + counts.expired + counts.held


@VERSIONS
def test_first_packets_wait_and_go_on_in_order_when_there_is_a_lease(
    net: Plane, version: int
) -> None:
    buffer = buffer_of(net)
    reported: list[Flow] = []
    buffer.report_to(reported.append)
    with net.open_socket("a", version, SERVICE[version]) as listener:
        send(net, version, range(10))
        buffer.read()
        send(net, version, range(10, 20))  # these wait in the kernel's queue, unread
        assert got(listener) == []
        assert reported == [
            Flow(ip_address(UE[version][0]), ip_address(SERVICE[version]))
        ]  # once, not once a packet
        buffer.apply([Install(net.binding("lease", 1, "a"))])
        send(net, version, range(20, 30))
        assert got(listener) == list(range(30))
    counts = buffer.counts
    assert (counts.stored, counts.released, counts.held) == (20, 20, 0)
    # The lease counts what it steers, and the queue is out of the way.
    assert net.gate.enforced()[(4, 6).index(version)].usage.uplink_packets == 30


@VERSIONS
def test_a_connection_waits_for_its_lease(net: Plane, version: int) -> None:
    buffer = buffer_of(net)
    with (
        net.open_socket("a", version, SERVICE[version], socket.SOCK_STREAM) as listener,
        net.open_socket("ue1", version, UE[version][0], socket.SOCK_STREAM) as client,
    ):
        listener.listen()
        client.setblocking(False)
        assert client.connect_ex((SERVICE[version], PORT)) == errno.EINPROGRESS
        buffer.read()
        assert buffer.counts.held == 1
        buffer.apply([Install(net.binding("lease", 1, "a"))])
        listener.settimeout(0.5)  # well before the client tries again
        connection, _ = listener.accept()
        connection.sendall(b"hello")
        client.settimeout(1)
        assert client.recv(10) == b"hello"
        connection.close()


@VERSIONS
@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_STREAM], ids=["UDP", "TCP"])
def test_the_sender_learns_of_a_refusal(net: Plane, version: int, kind: socket.SocketKind) -> None:
    buffer = buffer_of(net)
    flow = Flow(ip_address(UE[version][0]), ip_address(SERVICE[version]))
    prohibited = {4: errno.EHOSTUNREACH, 6: errno.EACCES}[version]
    with net.open_socket("ue1", version, UE[version][0], kind) as client:
        client.setblocking(False)
        client.connect_ex((SERVICE[version], PORT))
        if kind is socket.SOCK_DGRAM:
            client.send(b"1")
        buffer.read()
        assert buffer.counts.held == 1
        buffer.refuse([flow], 60_000)
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == prohibited
    assert (buffer.counts.dropped, buffer.counts.held) == (1, 0)
    assert net.gate.drops()["paging_refused"] == 1
    send(net, version, range(3))  # user space hears no more of it for a while
    buffer.read()
    assert buffer.counts.stored == 1
    assert net.gate.drops()["paging_refused"] == 4
    net.gate.apply([Install(net.binding("lease", 1, "a"))])
    assert net.reaches(version) == "a"


def test_what_nobody_answers_for_expires(net: Plane) -> None:
    buffer = buffer_of(net, ParkingLimits(page_timeout_ms=50))
    with net.open_socket("a", 4, SERVICE[4]) as listener:
        send(net, 4, range(3))
        buffer.read()
        time.sleep(0.05)
        buffer.expire()
        assert (buffer.counts.expired, buffer.counts.held) == (3, 0)
        buffer.apply([Install(net.binding("lease", 1, "a"))])
        assert got(listener) == []


def test_what_is_released_without_a_lease_is_dropped(net: Plane) -> None:
    """The queue has no authority: the lease has ended when the packets are let go."""
    buffer = buffer_of(net)
    binding = net.binding("lease", 1, "a", ttl_ms=100)
    with net.open_socket("a", 4, SERVICE[4]) as listener:
        buffer.apply([Install(binding)])
        buffer.apply([Hold(binding, time.monotonic_ns() + 60_000 * MS)])
        send(net, 4, range(5))
        buffer.read()
        time.sleep(0.11)
        buffer.expire()
        assert (buffer.counts.released, buffer.counts.held) == (5, 0)
        assert got(listener) == []
    assert net.gate.drops()["no_lease_uplink"] == 5


@VERSIONS
def test_a_hold_keeps_the_uplink_in_order_until_the_move(net: Plane, version: int) -> None:
    buffer = buffer_of(net)
    old, new = net.binding("old", 1, "a"), net.binding("new", 2, "b")
    listeners = net.listeners(version)
    buffer.apply([Install(old)])
    send(net, version, range(5))
    buffer.apply([Hold(old, time.monotonic_ns() + 60_000 * MS)])
    send(net, version, range(5, 100))
    buffer.read()
    send(net, version, range(100, 200))
    assert buffer.counts.held == 95
    buffer.apply([Move(new, old, time.monotonic_ns() + 500 * MS)])
    send(net, version, range(200, 230))
    assert got(listeners["a"]) == list(range(5))
    assert got(listeners["b"]) == list(range(5, 230))
    assert adds_up(buffer)
    for listener in listeners.values():
        listener.close()


def test_a_hold_that_is_called_off_loses_nothing(net: Plane) -> None:
    buffer = buffer_of(net)
    binding = net.binding("lease", 1, "a")
    buffer.apply([Install(binding)])
    with net.open_socket("a", 4, SERVICE[4]) as listener:
        buffer.apply([Hold(binding, time.monotonic_ns() + 60_000 * MS)])
        send(net, 4, range(100))
        buffer.apply([Resume(binding)])
        send(net, 4, range(100, 110))
        assert got(listener) == list(range(110))
        # One that nobody ends, ends by itself, and in order.
        buffer.apply([Hold(binding, time.monotonic_ns() + 30 * MS)])
        send(net, 4, range(10))
        buffer.read()
        time.sleep(0.03)
        buffer.expire()
        send(net, 4, range(10, 20))
        assert got(listener) == list(range(20))
    assert adds_up(buffer)


def test_floods_stay_within_bounds_and_harm_no_other(net: Plane) -> None:
    """UE 1, with a subscription, and UE 2, without one, send all they can; a lease goes on."""
    buffer = buffer_of(net, ParkingLimits(paged_packets_per_ue=16))
    other = net.binding("other", 1, "b", ue=2, versions=(6,))
    net.gate.apply([Install(other)])
    stop = threading.Event()

    def flood(ue: int) -> None:
        while not stop.is_set():
            send(net, 4, range(200), ue=ue)

    floods = [threading.Thread(target=flood, args=(ue,)) for ue in (1, 2)]
    with (
        net.open_socket("b", 6, SERVICE[6]) as listener,
        net.open_socket("ue2", 6, UE[6][1]) as sender,
    ):
        for thread in floods:
            thread.start()
        try:
            for number in range(200):
                sender.sendto(str(number).encode(), (SERVICE[6], PORT))
                buffer.read()
                assert buffer.counts.held <= 16
                time.sleep(0.002)
        finally:
            stop.set()
            for thread in floods:
                thread.join()
        buffer.read()
        assert got(listener) == list(range(200))
    drops = net.gate.drops()
    assert drops["paging_overflow"] > 1_000  # the kernel's work, not ours
    assert drops["no_lease_uplink"] > 1_000  # UE 2's: none of them got as far as the queue
    counts = buffer.counts
    assert counts.stored == counts.held == 16
    assert counts.lost_by_kernel == 0


def test_with_the_daemon_nothing_waits_any_more(net: Plane) -> None:
    """It dies with packets parked and a lease on hold; nothing of either passes afterwards."""
    buffer = buffer_of(net)
    binding = net.binding("lease", 1, "a", versions=(6,))
    with net.open_socket("a", 4, SERVICE[4]) as first, net.open_socket("a", 6, SERVICE[6]) as held:
        buffer.close()
        net.buffer = None
        child = os.fork()
        if child == 0:
            own = net.open_buffer()
            own.apply([Install(binding)])
            own.apply([Hold(binding, time.monotonic_ns() + 300 * MS)])
            send(net, 4, range(3))
            send(net, 6, range(3))
            own.read()
            os._exit(1) if own.counts.held != 6 else os.kill(os.getpid(), signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        send(net, 4, range(3, 6))
        send(net, 6, range(3, 6))
        assert not receives(first)
        assert not receives(held)
        time.sleep(0.2)  # the hold ends by itself; the lease goes on
        send(net, 6, range(6, 9))
        assert got(held) == [6, 7, 8]
        assert not receives(first)
        net.buffer = net.open_buffer()  # the next one takes over
        send(net, 4, range(5))
        net.buffer.read()
        assert net.buffer.counts.held == 5


def test_a_queue_that_is_taken_is_said_to_be(net: Plane) -> None:
    with pytest.raises(PacketQueueError, match="another program has it"):
        net.open_buffer()


@pytest.mark.parametrize("fast_path", [True, False], ids=["fast path", "slow path"])
def test_a_hold_costs_a_lease_none_of_its_counts(fast_path: bool) -> None:
    """The hold takes the fast path's element, and its counter with it."""
    with plane(subscribed=True, fast_path=fast_path) as net:
        buffer, binding = buffer_of(net), net.binding("lease", 1, "a", versions=(4,))
        buffer.apply([Install(binding)])

        def counted() -> int:
            return net.gate.usage([binding])["lease"].uplink_packets

        send(net, 4, range(5))
        buffer.apply([Hold(binding, time.monotonic_ns() + 60_000 * MS)])
        assert counted() == 5
        send(net, 4, range(5))
        assert counted() == 5
        buffer.apply([Resume(binding)])
        assert counted() == 10
        send(net, 4, range(5))
        longer = net.binding("lease", 1, "a", ttl_ms=90_000, versions=(4,))
        buffer.apply([Renew(longer)])
        send(net, 4, range(5))
        assert net.gate.usage([longer])["lease"].uplink_packets == 20


def test_what_is_held_ends_with_its_lease_or_goes_to_the_next(net: Plane) -> None:
    buffer, until_ns = buffer_of(net), time.monotonic_ns() + 60_000 * MS
    first, second, third = (net.binding(f"l{n}", n, "ab"[n % 2]) for n in (1, 2, 3))
    buffer.apply([Install(first)])
    buffer.apply([Hold(first, until_ns)])
    send(net, 4, range(5))
    buffer.read()
    buffer.apply([Revoke(first)])
    assert (buffer.counts.dropped, buffer.counts.held) == (5, 0)
    buffer.apply([Install(second)])
    buffer.apply([Hold(second, until_ns)])
    send(net, 4, range(5))
    with net.open_socket("b", 4, SERVICE[4]) as listener:  # its anchor dies: recovery
        buffer.apply([Revoke(second), Install(third)])
        assert got(listener) == list(range(5))
    assert adds_up(buffer)
