import socket
import time

import pytest
from testbed_helpers import in_isolation, udp

from controlplane.configfile import parse_yaml
from topologies import delay
from topologies.delay_measurement import describe
from topologies.errors import TopologyError
from topologies.network import Network
from topologies.spec import TopologySpec

pytestmark = pytest.mark.testbed

FAR = """\
name: far
ues: {count: 2}
gnbs:
  - {name: gnb1, downlink_mbps: 10000, uplink_mbps: 10000, radio: {delay_ms: 2}, n3: {delay_ms: 3}}
anchors:
  - {name: edge1, delay_ms: 10}
core: {delay_ms: 0}
"""


@pytest.fixture(params=["netem", "relay"])
def mechanism(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    missing = {"netem": delay.netem_missing, "relay": delay.relay_missing}[request.param]()
    if missing:
        pytest.skip(missing)
    monkeypatch.setattr(delay, "mechanism", lambda: request.param)
    return str(request.param)


def far() -> TopologySpec:
    return parse_yaml(FAR, TopologySpec, "far")


def test_achieved_delays_are_those_asked_for(mechanism: str) -> None:
    def body() -> None:
        with Network(far()) as network:
            start = time.monotonic()
            measured = network.measure_delays()
            assert time.monotonic() - start < 2 * len(measured)
            assert set(measured) == {"wire-gnb1", "wire-upf-gnb1", "wire-upf-edge1"}
            for link in measured.values():
                asked = link["asked_delay_ms"]
                assert link["mechanism"] == mechanism
                assert link["probes_lost"] == 0
                assert asked <= link["there_ms"]["p50"] < asked + 2
                assert asked <= link["back_ms"]["p50"] < asked + 2
                assert link["lossless_packets_per_s"] > 5_000
            assert len(describe(measured)) == 3

    in_isolation(body)


def test_every_link_of_a_path_adds_its_delay(mechanism: str) -> None:
    def body() -> None:
        with Network(far()) as network:
            edge = network.anchors["edge1"]
            for ue in network.ues:
                for ours, theirs in ((ue.address4, edge.address4), (ue.address6, edge.address6)):
                    here, there = udp(ue, ours), udp(edge, theirs)
                    echo(here, there)  # neighbours are resolved, at a round trip each
                    start = time.monotonic()
                    echo(here, there)
                    assert 0.030 <= time.monotonic() - start < 0.040

    in_isolation(body)


def echo(here: socket.socket, there: socket.socket) -> None:
    here.sendto(b"x", there.getsockname()[:2])
    there.sendto(*there.recvfrom(16))
    here.recv(16)


def test_order_is_kept_and_nothing_is_lost_or_doubled(mechanism: str) -> None:
    def body() -> None:
        with Network(far()) as network:
            ue, edge = network.ues[0], network.anchors["edge1"]
            here, there = udp(ue, ue.address4), udp(edge, edge.address4)
            there.setsockopt(socket.SOL_SOCKET, 33, 32 << 20)  # SO_RCVBUFFORCE
            echo(here, there)
            count = 10_000
            start = time.monotonic()
            for number in range(count):
                here.sendto(number.to_bytes(4, "big"), there.getsockname())
                while time.monotonic() - start < number / 20_000:
                    pass
            got = [int.from_bytes(there.recv(16), "big") for _ in range(count)]
            assert got == list(range(count))
            there.settimeout(0.1)
            with pytest.raises(TimeoutError):
                there.recv(16)

    in_isolation(body)


def test_streams_survive_offloads_and_unfinished_checksums(mechanism: str) -> None:
    def body() -> None:
        with Network(far()) as network:
            script = "import socket,sys,hashlib\n"
            serve = network.anchors["edge1"].popen(
                [
                    "python3",
                    "-c",
                    script + "s=socket.create_server(('',7000));print('ready',flush=True);"
                    "c,_=s.accept();h=hashlib.sha256();n=0\n"
                    "while d:=c.recv(1<<20): h.update(d);n+=len(d)\n"
                    "print(n,h.hexdigest())",
                ],
                stdout=-1,
                text=True,
            )
            assert serve.stdout
            assert serve.stdout.readline() == "ready\n"
            send = network.ues[0].popen(
                [
                    "python3",
                    "-c",
                    script + "import random;d=random.Random(1).randbytes(1<<20)*40\n"
                    "c=socket.create_connection(('10.47.1.2',7000));c.sendall(d);c.close()\n"
                    "print(len(d),hashlib.sha256(d).hexdigest())",
                ],
                stdout=-1,
                text=True,
            )
            assert send.stdout
            assert serve.stdout.readline() == send.stdout.readline() != ""

    in_isolation(body)


def test_a_relay_counts_and_its_death_is_noticed() -> None:
    if delay.mechanism() != "relay":
        pytest.skip("this kernel has netem, so links need no relay")

    def body() -> None:
        with Network(far()) as network:
            ue, edge = network.ues[0], network.anchors["edge1"]
            before = network.delay_statistics()["wire-upf-edge1"]
            echo(udp(ue, ue.address4), udp(edge, edge.address4))
            after = network.delay_statistics()["wire-upf-edge1"]
            assert all(a["forwarded"] > b["forwarded"] for a, b in zip(after, before, strict=True))
            assert all(direction["dropped"] == 0 for direction in after)
            network.check_alive()
            relay = network._delays._wires["wire-upf-edge1"].relay
            assert relay
            relay._process.kill()
            relay._process.wait()
            with pytest.raises(TopologyError, match="wire-upf-edge1: the relay has died"):
                network.check_alive()

    in_isolation(body)


def test_without_any_means_of_delay_a_delayed_link_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(delay, "netem_missing", lambda: "no netem")
    monkeypatch.setattr(delay, "relay_missing", lambda: "no packet sockets")

    def body() -> None:
        with pytest.raises(TopologyError, match="no netem; no packet sockets"), Network(far()):
            pass

    in_isolation(body)
