"""The probe against real packets: what it reports must be what was done to them."""

from __future__ import annotations

import ctypes
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from pyroute2 import IPRoute

from scripts.interruption import Trace, build_trace, interruption
from topologies.endpoints.probe_plan import Direction, Flow, ProbePlan, Site
from topologies.endpoints.probe_receiver import overflow_by_socket
from topologies.endpoints.probe_session import ProbeError, ProbeSession, ProbeStats
from topologies.endpoints.probe_sockets import CLONE_NEWNET, in_namespace, open_sockets

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
]

UE, SERVICE = "10.45.0.1", "198.18.0.1"
UE6, SERVICE6 = "fd00:45::1", "fd00:a151::1"
GATEWAYS = {"edge1": "10.99.1.1", "edge2": "10.99.2.1"}
GATEWAYS6 = {"edge1": "fd00:99:1::1", "edge2": "fd00:99:2::1"}
IFA_F_NODAD = 2
RATE_PPS = 2000


class Network:
    """ue - router - edge1 and edge2, which both hold the service address."""

    def __init__(self) -> None:
        self._fds = {name: _new_namespace() for name in ("ue", "router", "edge1", "edge2")}
        self.paths = {name: f"/proc/{os.getpid()}/fd/{fd}" for name, fd in self._fds.items()}
        for name in self._fds:
            with self._route(name) as route:
                route.link("set", index=1, state="up")
        with in_namespace(self.paths["router"]):
            Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
            Path("/proc/sys/net/ipv6/conf/all/forwarding").write_text("1")
        self._link("ue", [UE, UE6], ["10.45.0.254", "fd00:45::254"])
        for number, edge in enumerate(GATEWAYS, start=1):
            own = [GATEWAYS[edge], GATEWAYS6[edge]]
            self._link(edge, own, [f"10.99.{number}.254", f"fd00:99:{number}::254"])
            with self._route(edge) as route:
                route.addr("add", index=1, address=SERVICE, prefixlen=32)
                route.addr("add", index=1, address=SERVICE6, prefixlen=128, flags=IFA_F_NODAD)
        self.await_paths(UE, SERVICE)

    def await_paths(self, ue: str, service: str) -> None:
        """Wait until both edges answer, edge1 last: it stays the one steered to."""
        for edge in ("edge2", "edge1"):
            self.steer(edge)
            self._await_path(edge, ue, service)

    def steer(self, edge: str) -> None:
        """Have the router forward the service address to `edge`."""
        with self._route("router") as route:
            route.route("replace", dst=f"{SERVICE}/32", gateway=GATEWAYS[edge])
            route.route("replace", dst=f"{SERVICE6}/128", gateway=GATEWAYS6[edge])

    def blackhole(self) -> None:
        """Have the router drop what goes to the service address, without a word."""
        with self._route("router") as route:
            route.route("replace", dst=f"{SERVICE}/32", type="blackhole")

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)

    def _await_path(self, edge: str, ue: str, service: str) -> None:
        """Send until an answer comes: IPv6 neighbours take a second or two after the links."""
        family = socket.AF_INET6 if ":" in ue else socket.AF_INET
        with in_namespace(self.paths["ue"]):
            client = socket.socket(family, socket.SOCK_DGRAM)
        with in_namespace(self.paths[edge]):
            server = socket.socket(family, socket.SOCK_DGRAM)
        with client, server:
            client.bind((ue, 0))
            client.settimeout(0.02)
            server.bind((service, 9))
            server.settimeout(0.02)
            until = time.monotonic() + 10
            while time.monotonic() < until:
                client.sendto(b"?", (service, 9))
                try:
                    _, peer = server.recvfrom(1)
                    server.sendto(b"!", peer[:2])
                    client.recv(1)
                except TimeoutError:
                    continue
                return
        raise TimeoutError(f"no path between {ue} and {service} at {edge}")

    def _link(self, name: str, own: list[str], routers: list[str]) -> None:
        with self._route(name) as route:
            route.link(
                "add",
                ifname="up",
                kind="veth",
                peer={"ifname": f"to-{name}", "net_ns_fd": self._fds["router"]},
            )
        for place, interface, addresses in (
            (name, "up", own),
            ("router", f"to-{name}", routers),
        ):
            with self._route(place) as route:
                index = route.link_lookup(ifname=interface)[0]
                for address in addresses:
                    wide, flags = (64, IFA_F_NODAD) if ":" in address else (24, 0)
                    route.addr("add", index=index, address=address, prefixlen=wide, flags=flags)
                route.link("set", index=index, state="up")
        with self._route(name) as route:
            route.route("add", dst="0.0.0.0/0", gateway=routers[0])
            route.route("add", dst="::/0", gateway=routers[1])

    def _route(self, name: str) -> IPRoute:
        with in_namespace(self.paths[name]):
            return IPRoute()


def _new_namespace() -> int:
    made: list[int] = []

    def make() -> None:
        assert ctypes.CDLL(None).unshare(CLONE_NEWNET) == 0
        made.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    return made[0]


@pytest.fixture
def network() -> Iterator[Network]:
    network = Network()
    try:
        yield network
    finally:
        network.close()


def plan_for(network: Network, *directions: Direction, ipv6: bool = False) -> ProbePlan:
    flows = []
    for family in (4, 6) if ipv6 else (4,):
        for direction in directions:
            number = len(flows)
            flows.append(
                Flow(
                    id=10 + number,
                    ue="ue",
                    direction=direction,
                    ue_address=UE if family == 4 else UE6,
                    ue_port=6000 + number,
                    service_address=SERVICE if family == 4 else SERVICE6,
                    service_port=7000 + number,
                    anchors=("edge1", "edge2"),
                )
            )
    return ProbePlan(
        sites=tuple(Site(name=name, netns=path) for name, path in network.paths.items()),
        flows=tuple(flows),
        rate_pps=RATE_PPS,
        max_duration_s=20,
    )


def run_for(seconds: float) -> None:
    """Let packets flow: the time is the measurement."""
    time.sleep(seconds)


def trace_of(folder: Path, flow: int) -> Trace:
    sent = pq.read_table(folder / "sent.parquet", filters=[("flow", "=", flow)])
    received = pq.read_table(folder / "received.parquet", filters=[("flow", "=", flow)])
    return build_trace(
        np.asarray(sent["send_ns"]),
        np.asarray(received["seq"]),
        np.asarray(received["site"]),
        np.asarray(received["recv_ns"]),
        waiting_time_ms=300,
    )


def assert_healthy(stats: ProbeStats) -> None:
    faults = (stats.overflow, stats.malformed, stats.send_errors, stats.clock_stepped)
    assert not any(faults), stats.raw


def test_loses_nothing_where_nothing_is_lost(network: Network, tmp_path: Path) -> None:
    network.await_paths(UE6, SERVICE6)
    plan = plan_for(network, *Direction, ipv6=True)
    with ProbeSession(plan, tmp_path) as probe:
        run_for(1.0)
        stats = probe.stop()
    assert_healthy(stats)
    assert len(stats.sent) == 6
    assert stats.received == stats.sent
    for flow in plan.flows:
        trace = trace_of(tmp_path, flow.id)
        assert len(trace.send_ns) + stats.missed_sends > 0.8 * RATE_PPS
        assert not trace.lost.any()
        assert set(trace.site) == {plan.site_index("edge1")}
        assert (trace.delay_ns > 0).all()
        assert int(np.median(trace.delay_ns)) < 5_000_000


def test_a_blackout_is_reported_with_its_length(network: Network, tmp_path: Path) -> None:
    plan = plan_for(network, Direction.UPLINK)
    with ProbeSession(plan, tmp_path) as probe:
        run_for(0.3)
        before_ns = time.time_ns()
        network.blackhole()
        begin_ns = time.time_ns()
        run_for(0.05)
        end_ns = time.time_ns()
        network.steer("edge2")
        after_ns = time.time_ns()
        run_for(0.3)
        stats = probe.stop()
    assert_healthy(stats)
    trace = trace_of(tmp_path, 10)
    figures = interruption(trace, slice(0, len(trace.send_ns)), plan.interval_ns)
    # What the sender missed on a busy machine is no loss.
    slack_ms = (2 + stats.missed_sends) * plan.interval_ns / 1e6 + 2
    assert (end_ns - begin_ns) / 1e6 - slack_ms < figures.loss_outage_ms
    assert figures.loss_outage_ms < (after_ns - before_ns) / 1e6 + slack_ms
    assert abs(figures.loss_outage_ms - figures.gap_outage_ms) < slack_ms
    assert figures.loss_periods == 1
    received = trace.site[~trace.lost]
    assert received[0] == plan.site_index("edge1")
    assert received[-1] == plan.site_index("edge2")


def test_a_switched_source_goes_on_counting(network: Network, tmp_path: Path) -> None:
    plan = plan_for(network, Direction.DOWNLINK)
    with ProbeSession(plan, tmp_path) as probe:
        run_for(0.1)
        asked_ns = time.time_ns()
        switched = probe.switch_source(10, "edge2")
        with pytest.raises(ProbeError, match="already"):
            probe.switch_source(10, "edge2")
        run_for(0.1)
        stats = probe.stop()
    assert_healthy(stats)
    assert switched.at_ns >= asked_ns
    trace = trace_of(tmp_path, 10)
    assert not trace.lost.any()
    assert set(trace.site[: switched.first_seq]) == {plan.site_index("edge1")}
    assert set(trace.site[switched.first_seq :]) == {plan.site_index("edge2")}
    assert trace.send_ns[switched.first_seq] >= switched.at_ns
    sent = pq.read_table(tmp_path / "sent.parquet")
    assert np.asarray(sent["site"]).tolist() == trace.site.tolist()


def test_a_full_buffer_shows_as_overflow(network: Network) -> None:
    plan = plan_for(network, Direction.UPLINK)
    sockets = open_sockets(plan, receive_buffer_bytes=4096)
    sender = sockets.senders[10][0].sock
    for _ in range(200):
        sender.send(bytes(64))
    edge1, edge2 = overflow_by_socket(plan, sockets.receivers)
    assert edge1["site"] == "edge1"
    assert 100 < edge1["dropped"] < 200
    assert edge2["dropped"] == 0


def test_strangers_packets_are_not_counted(network: Network, tmp_path: Path) -> None:
    plan = plan_for(network, Direction.UPLINK)
    with ProbeSession(plan, tmp_path) as probe:
        with in_namespace(network.paths["ue"]):
            stranger = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with stranger:
            for _ in range(5):
                stranger.sendto(bytes(64), (SERVICE, 7000))
        run_for(0.1)
        stats = probe.stop()
    assert stats.malformed == 5
    assert stats.received == stats.sent


def test_what_cannot_be_sent_is_not_sent(network: Network, tmp_path: Path) -> None:
    plan = plan_for(network, Direction.UPLINK)
    with ProbeSession(plan, tmp_path) as probe:
        run_for(0.1)
        with in_namespace(network.paths["ue"]), IPRoute() as route:
            route.route("del", dst="0.0.0.0/0")
        run_for(0.1)
        stats = probe.stop()
    assert stats.send_errors > 100
    assert stats.raw["sender"]["flows"][0]["send_errors"].keys() == {"ENETUNREACH"}
    assert not trace_of(tmp_path, 10).lost.any()
    unsent = pq.read_table(tmp_path / "unsent.parquet").to_pylist()
    assert sum(row["count"] for row in unsent if row["errno"]) == stats.send_errors


def test_nothing_is_left_when_the_driver_kills_it(network: Network, tmp_path: Path) -> None:
    with ProbeSession(plan_for(network, Direction.ROUNDTRIP), tmp_path) as probe:
        assert probe.pid is not None
        children = _children(probe.pid)
        assert len(children) == 3
    until = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() and not _is_zombie(pid) for pid in children):
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_dead_probe_is_an_error(network: Network, tmp_path: Path) -> None:
    with ProbeSession(plan_for(network, Direction.UPLINK), tmp_path) as probe:
        assert probe.pid is not None
        for pid in _children(probe.pid):
            os.kill(pid, 9)
        with pytest.raises(ProbeError, match="died"):
            probe.stop()


def test_an_address_that_is_not_there_is_named(network: Network, tmp_path: Path) -> None:
    plan = plan_for(network, Direction.UPLINK)
    wrong = ProbePlan.from_dict(
        {**plan.to_dict(), "flows": [{**plan.to_dict()["flows"][0], "ue_address": "10.45.0.9"}]}
    )
    with pytest.raises(ProbeError, match=r"flow 10 at ue: .*10\.45\.0\.9.*Cannot assign"):
        ProbeSession(wrong, tmp_path).start()


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
