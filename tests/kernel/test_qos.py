"""QoS: a lease's profile puts its packets in a class that congestion does not touch."""

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
from plane import PORT, SERVICE, UE, Plane, plane

from controlplane.enforcement import Install
from upf import qos

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces"),
]
CAPACITY_BPS = 8_000_000
SHARES = {"QOS_E": 0.5, "BEST_EFFORT": 0.0}
PAYLOAD = b"x" * 1_000
FLOOD, STREAM = 4_000, 40


@pytest.fixture
def net() -> Iterator[Plane]:
    # Past the IP stack a packet of this machine stays its socket's until it has left the queue: the
    # flood would wait for room instead of filling it (docs/decisions/0016).
    with plane(fast_path=False) as made:
        capacities = dict.fromkeys(made.config.n3_interfaces, CAPACITY_BPS)
        qos.install(made.hosts["upf"].path, capacities, SHARES)
        qos.install(made.hosts["upf"].path, capacities, SHARES)  # kept as it is
        yield made


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(("profile", "kept"), [("QOS_E", True), ("BEST_EFFORT", False)])
def test_a_leased_stream_beside_a_flood(net: Plane, version: int, profile: str, kept: bool) -> None:
    """Both UEs are behind one cell; UE 2's flood fills it. Best effort is the negative control."""
    assert net.config.qos_classes["QOS_E"] == qos.class_ids(SHARES)["QOS_E"]
    stream = replace(net.binding("stream", 1, "a", ue=1), qos_profile=profile)
    flood = replace(net.binding("flood", 1, "a", ue=2), qos_profile="BEST_EFFORT")
    net.route_both_ues_through_one_cell()
    net.gate.apply([Install(stream), Install(flood)])
    with (
        net.open_socket("ue1", version, UE[version][0]) as receiver,
        net.open_socket("a", version, SERVICE[version]) as sender,
    ):
        receiver.settimeout(2.0)
        for number in range(FLOOD):
            sender.sendto(PAYLOAD, (UE[version][1], PORT))
            if number % (FLOOD // STREAM) == FLOOD // STREAM - 1:
                sender.sendto(PAYLOAD, (UE[version][0], PORT))
        got = 0
        try:
            while got < STREAM:
                receiver.recv(2_000)
                got += 1
        except TimeoutError:
            pass
    assert (got == STREAM) is kept


def test_more_than_everything_cannot_be_guaranteed(net: Plane) -> None:
    with pytest.raises(qos.QosError, match="more than the whole"):
        qos.install(net.hosts["upf"].path, {"n3-1": CAPACITY_BPS}, {"a": 0.7, "b": 0.4})
