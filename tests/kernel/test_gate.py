"""The gate, by what real packets do in namespaces of its own."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from plane import ANCHOR, PORT, SERVICE, UE, Plane, heard, plane, receives
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.packet import Packet

from controlplane.enforcement import (
    EndDrain,
    EnforcementError,
    Install,
    Move,
    Renew,
    Revoke,
    StaleEpochError,
)

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces"),
]
VERSIONS = pytest.mark.parametrize("version", [4, 6])
MS = 1_000_000
TCP_REPAIR = 19  # linux/tcp.h


@pytest.fixture(params=[True, False], ids=["fast path", "no fast path"])
def net(request: pytest.FixtureRequest) -> Iterator[Plane]:
    with plane(fast_path=request.param) as made:
        yield made


@pytest.fixture(params=[True, False], ids=["renews in place", "deletes and adds"])
def any_kernel(request: pytest.FixtureRequest) -> Iterator[Plane]:
    """The gate as on this kernel, and as on one that cannot renew an element in place."""
    with plane(in_place_renewal=request.param) as made:
        yield made


@VERSIONS
def test_without_a_lease_nothing_passes(net: Plane, version: int) -> None:
    assert net.reaches(version) is None
    assert not net.answers(version, "a")
    assert not net.answers(version, "a", source=ANCHOR["a"][version])
    assert net.gate.drops()["no_lease_uplink"] == 1
    assert net.gate.drops()["no_lease_downlink"] == 2


@VERSIONS
def test_a_lease_opens_its_ue_its_service_and_its_anchor_only(net: Plane, version: int) -> None:
    net.gate.apply([Install(net.binding("lease", 1, "a"))])
    assert net.reaches(version, ue=1) == "a"
    assert net.reaches(version, ue=2) is None
    assert net.answers(version, "a")
    assert not net.answers(version, "b")
    assert not net.answers(version, "a", ue=2)


@VERSIONS
def test_an_anchor_is_not_reached_by_its_own_address(net: Plane, version: int) -> None:
    net.gate.apply([Install(net.binding("lease", 1, "a"))])
    own = ANCHOR["a"][version]
    with (
        net.open_socket("a", version, own) as listener,
        net.open_socket("ue1", version, UE[version][0]) as sender,
    ):
        sender.sendto(b"x", (own, PORT))
        assert not receives(listener)
    assert net.gate.drops()["direct_to_anchor"] == 1


@VERSIONS
def test_a_spoofed_source_is_dropped_and_counted(net: Plane, version: int) -> None:
    """UE 2 has no lease and borrows the address of UE 1, which has."""
    net.gate.apply([Install(net.binding("lease", 1, "a"))])
    listeners = net.listeners(version)
    send_crafted(net, "ue2", network(version, UE[version][0]) / UDP(sport=1, dport=PORT) / b"x")
    assert heard(listeners) is None
    # Nor does it get anywhere else: to the other UE, whose address is no service.
    with net.open_socket("ue1", version, UE[version][0]) as other:
        packet = network(version, "10.99.0.1" if version == 4 else "fd99::1")
        packet.dst = UE[version][0]
        send_crafted(net, "ue2", packet / UDP(sport=1, dport=PORT) / b"x")
        assert not receives(other)
    assert net.gate.drops()["spoofed_source"] == 2
    assert net.gate.enforced()[0].usage.uplink_packets == 0


@VERSIONS
def test_a_lease_ends_at_its_deadline_without_us(net: Plane, version: int) -> None:
    """The granting process is dead long before the deadline; only the kernel can end the lease."""
    ttl_ms = 400
    started = time.monotonic_ns()
    child = os.fork()
    if child == 0:
        net.gate.apply([Install(net.binding("lease", 1, "a", ttl_ms))])
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    with (
        net.open_socket("a", version, SERVICE[version]) as listener,
        net.open_socket("ue1", version, UE[version][0]) as sender,
    ):
        last_ns = 0
        while (now := time.monotonic_ns()) < started + (ttl_ms + 200) * MS:
            sender.sendto(b"x", (SERVICE[version], PORT))
            listener.setblocking(False)
            try:
                while listener.recv(10):
                    last_ns = now
            except BlockingIOError:
                pass
            time.sleep(0.0005)
    # The deadline counts from the grant, somewhat after `started`.
    assert started + (ttl_ms - 50) * MS < last_ns < started + (ttl_ms + 50) * MS
    assert net.gate.enforced() == []


@VERSIONS
def test_a_move_takes_over_and_the_source_may_finish_until_the_drain_ends(
    any_kernel: Plane, version: int
) -> None:
    net = any_kernel
    old, new = net.binding("old", 1, "a"), net.binding("new", 2, "b")
    net.gate.apply([Install(old)])
    net.gate.apply([Move(new, old, time.monotonic_ns() + 700 * MS)])
    assert net.reaches(version) == "b"
    assert net.answers(version, "b")
    assert net.answers(version, "a")
    time.sleep(0.7)
    assert not net.answers(version, "a")
    assert net.answers(version, "b")


def test_a_move_back_during_the_drain_keeps_the_anchor_beyond_it(any_kernel: Plane) -> None:
    net = any_kernel
    first, second = net.binding("1", 1, "a"), net.binding("2", 2, "b")
    third = net.binding("3", 3, "a")
    drain_ns = time.monotonic_ns() + 300 * MS
    net.gate.apply([Install(first)])
    net.gate.apply([Move(second, first, drain_ns)])
    net.gate.apply([Move(third, second, drain_ns)])
    time.sleep(0.4)
    assert net.reaches(4) == "a"
    assert net.answers(4, "a")
    assert not net.answers(4, "b")


def test_the_end_of_a_drain_closes_the_source_at_once(net: Plane) -> None:
    old, new = net.binding("old", 1, "a"), net.binding("new", 2, "b")
    net.gate.apply([Install(old)])
    net.gate.apply([Move(new, old, time.monotonic_ns() + 60_000 * MS)])
    net.gate.apply([EndDrain(old)])
    assert not net.answers(4, "a")
    assert net.reaches(4) == "b"


def test_renewal_moves_the_deadline_and_keeps_the_counters(any_kernel: Plane) -> None:
    net = any_kernel
    net.gate.apply([Install(net.binding("lease", 1, "a", ttl_ms=500))])
    assert net.reaches(4) == "a"
    net.gate.apply([Renew(net.binding("lease", 1, "a", ttl_ms=60_000))])
    time.sleep(0.6)
    assert net.reaches(4) == "a"
    (entry,) = (entry for entry in net.gate.enforced() if entry.flow.ue.version == 4)
    assert entry.usage.uplink_packets == 2
    assert entry.usage.uplink_bytes == 2 * 29
    assert 50_000 < entry.remaining_ms < 60_000


def test_revocation_closes_at_once_and_may_be_repeated(net: Plane) -> None:
    binding = net.binding("lease", 1, "a")
    net.gate.apply([Install(binding)])
    for _ in range(2):
        net.gate.apply([Revoke(binding)])
        assert net.reaches(4) is None
        assert not net.answers(4, "a")


def test_an_older_epoch_is_refused_and_changes_nothing(net: Plane) -> None:
    net.gate.apply([Install(net.binding("new", 5, "b"))])
    stale = net.binding("old", 4, "a")
    for operation in (
        Install(stale),
        Renew(stale),
        Revoke(stale),
        Move(net.binding("same", 5, "a"), net.binding("new", 5, "b"), time.monotonic_ns() + MS),
    ):
        with pytest.raises(StaleEpochError):
            net.gate.apply([operation])
    assert net.reaches(4) == "b"
    # A new process on the same kernel learns the epoch from the live elements.
    with pytest.raises(StaleEpochError):
        net.open_gate().apply([Install(stale)])


def test_a_batch_is_all_or_nothing(net: Plane) -> None:
    with pytest.raises(EnforcementError, match="no anchor named nowhere"):
        net.gate.apply(
            [
                Install(net.binding("good", 1, "a", ue=1)),
                Install(net.binding("bad", 1, "nowhere", ue=2)),
            ]
        )
    assert net.gate.enforced() == []


def test_a_lease_that_is_over_is_not_installed(net: Plane) -> None:
    with pytest.raises(EnforcementError, match="over before"):
        net.gate.apply([Install(net.binding("lease", 1, "a", ttl_ms=0))])


def test_an_element_that_expired_unnoticed_does_not_fail_a_move(net: Plane) -> None:
    """The kernel ends an element up to some milliseconds early; the gate cannot know."""
    frozen = time.monotonic_ns()
    gate = net.open_gate(clock=lambda: frozen)
    old = net.binding("old", 1, "a", ttl_ms=30)
    gate.apply([Install(old)])
    time.sleep(0.1)
    gate.apply([Move(net.binding("new", 2, "b"), old, frozen + 60_000 * MS)])
    assert net.reaches(4) == "b"


@pytest.mark.parametrize(
    ("lags_ms", "left_ms"),
    [
        # Timeouts are computed 300 ms too long.
        ([0, 300], [1_000, 1_000]),
        # And when that is seen, the lease is over.
        ([0, 300, -2_000, -2_000], []),
    ],
)
def test_a_late_batch_still_ends_in_time(
    net: Plane, lags_ms: list[int], left_ms: list[int]
) -> None:
    """The process stalls between computing a timeout and sending it: the gate corrects it."""
    lags: list[int] = []

    def clock() -> int:
        return time.monotonic_ns() - (lags.pop(0) * MS if lags else 0)

    gate = net.open_gate(clock=clock)
    lags += lags_ms  # of its readings: for the check, for timeouts, after the batch, for timeouts
    gate.apply([Install(net.binding("lease", 1, "a", ttl_ms=1_000))])
    assert not lags
    found = [entry.remaining_ms for entry in gate.enforced()]
    assert len(found) == len(left_ms)
    assert all(is_ <= most for is_, most in zip(found, left_ms, strict=True))


def test_reconciliation_removes_adopts_and_installs(any_kernel: Plane) -> None:
    net = any_kernel
    known, stranger = net.binding("known", 3, "a", ue=1), net.binding("stranger", 1, "a", ue=2)
    net.gate.apply([Install(known), Install(stranger)])
    assert net.reaches(4, ue=1) == "a"
    net.gate.close()
    net.gate = net.open_gate()  # a new process: the table and its leases are still there
    assert net.reaches(4, ue=1) == "a"
    outcome = net.gate.reconcile([known])
    assert (outcome.adopted, outcome.installed, outcome.removed) == (("known",), (), ("stranger",))
    assert net.reaches(4, ue=1) == "a"
    assert net.reaches(4, ue=2) is None
    missing = net.binding("missing", 2, "b", ue=2)
    assert net.gate.reconcile([known, missing]).installed == ("missing",)
    assert net.reaches(4, ue=2) == "b"
    usage = {entry.lease_id: entry.usage.uplink_packets for entry in net.gate.enforced()}
    assert usage["known"] in (0, 3)  # of whichever family came last


def test_reconciliation_corrects_what_disagrees(net: Plane) -> None:
    """Same lease, but the kernel has it at another anchor and for longer than the journal."""
    net.gate.apply([Install(net.binding("lease", 1, "a", ttl_ms=60_000))])
    journalled = net.binding("lease", 1, "b", ttl_ms=5_000)
    assert net.gate.reconcile([journalled]).installed == ("lease",)
    assert net.reaches(4) == "b"
    assert not net.answers(4, "a")
    assert all(entry.remaining_ms <= 5_000 for entry in net.gate.enforced())


def test_another_configuration_replaces_the_table(net: Plane) -> None:
    net.gate.apply([Install(net.binding("lease", 1, "a"))])
    net.gate.close()
    net.config = type(net.config)(
        n3_interfaces=net.config.n3_interfaces,
        anchors=net.config.anchors[:1],
        attachments=net.config.attachments,
    )
    net.gate = net.open_gate()
    assert net.gate.enforced() == []
    assert net.reaches(4) is None


@VERSIONS
def test_connections_begun_on_the_source_finish_there(net: Plane, version: int) -> None:
    old, new = net.binding("old", 1, "a"), net.binding("new", 2, "b")
    net.gate.apply([Install(old)])
    for name in ANCHOR:
        serve_name(net, name, version)
    first = dial(net, version)
    assert ask(first) == b"a"
    net.gate.apply([Move(new, old, time.monotonic_ns() + 800 * MS)])
    assert ask(first) == b"a"  # pinned, and no use of the new lease
    assert {entry.usage.uplink_packets for entry in net.gate.enforced()} == {0}
    second = dial(net, version)
    assert ask(second) == b"b"
    time.sleep(0.8)
    assert ask(first) is None  # the drain is over
    assert ask(second) == b"b"
    net.gate.apply([Revoke(new)])
    assert ask(second) is None


@VERSIONS
def test_a_port_is_good_again_after_a_cut_that_nobody_was_told_of(net: Plane, version: int) -> None:
    """Conntrack remembers the connection at the source; its port's next one is at the target."""
    old, new = net.binding("old", 1, "a"), net.binding("new", 2, "b")
    net.gate.apply([Install(old)])
    for name in ANCHOR:
        serve_name(net, name, version)
    first = dial(net, version)
    assert ask(first) == b"a"
    port = first.getsockname()[1]
    net.gate.apply([Revoke(old)])
    net.gate.apply([Install(new)])
    first.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
    first.close()  # in repair: without a packet
    second = dial(net, version, port)
    assert ask(second) == b"b"


# Helpers


def network(version: int, source: str) -> Packet:
    kind = IP if version == 4 else IPv6
    return kind(src=source, dst=SERVICE[version])


def send_crafted(net: Plane, host: str, packet: Packet) -> None:
    """Send bytes as they are: a raw socket does not care whose source address it is."""
    data = bytes(packet)
    version = data[0] >> 4
    family = socket.AF_INET if version == 4 else socket.AF_INET6

    def send() -> None:
        with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
            raw.sendto(data, (packet.dst, 0))

    net.hosts[host].run(send)


def serve_name(net: Plane, name: str, version: int) -> None:
    """Answer every request on every connection with the anchor's name."""
    listener = net.open_socket(name, version, SERVICE[version], socket.SOCK_STREAM)
    listener.listen()
    listener.settimeout(10)

    def talk(connection: socket.socket) -> None:
        connection.settimeout(10)
        with connection:
            try:
                while connection.recv(1):
                    connection.send(name.encode())
            except OSError:
                pass

    def accept() -> None:
        with listener:
            try:
                while True:
                    connection, _ = listener.accept()
                    threading.Thread(target=talk, args=(connection,), daemon=True).start()
            except OSError:
                pass

    threading.Thread(target=accept, daemon=True).start()


def dial(net: Plane, version: int, port: int = 0) -> socket.socket:
    def make() -> socket.socket:
        connection = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6)
        connection.settimeout(2)
        connection.bind((UE[version][0], port))
        connection.connect((SERVICE[version], PORT))
        connection.settimeout(0.3)
        return connection

    return net.hosts["ue1"].run(make)


def ask(connection: socket.socket) -> bytes | None:
    connection.send(b"?")
    try:
        return connection.recv(10)
    except TimeoutError:
        return None
