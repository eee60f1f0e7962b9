"""`aipaging upf` on a plain router: it comes, dies, changes and goes; others' traffic goes on."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from echoes import Echoes
from router_site import INTENT, LEFT_OVER, SERVICES, UES, Site

from upf.features import probe
from upf.netns import Namespace, connect

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces"),
]
KILLS = 20
MOST_LOST_WITH_A_QDISC = 50  # at one a millisecond; on an idle machine 0 or 1
PORT, N3 = 7_000, "n3-gnb1"
OURS = {
    "rules": re.compile(r"^4500:"),
    "rules6": re.compile(r"^4500:"),
    "routes": re.compile(r" table 4500\d "),
    "routes6": re.compile(r" table 4500\d "),
    "qdiscs": re.compile(r" dev n3-gnb1 "),
}
START_S = 0.8  # about as long as the agent takes: it is killed at every stage of its start
FAR = "10.60.0.0/16 via 10.50.1.2"
INTERNET = {4: "10.50.1.2", 6: "fd00:50:1::2"}
OTHERS = """
nft add table ip others
nft add chain ip others forward '{ type filter hook forward priority 0; policy accept; }'
nft add rule ip others forward ip daddr 10.50.1.2 counter accept
ip route add 10.60.0.0/16 via 10.50.1.2 table 777
ip rule add priority 90 from 10.60.0.0/16 table 777
ip -6 rule add priority 90 from fd00:60::/64 table 777
tc qdisc add dev internet root handle 1: htb default 10
tc class add dev internet parent 1: classid 1:10 htb rate 1gbit
"""


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with ExitStack() as stack:
        made = Site(tmp_path, stack)
        made.hosts["internet"] = stack.enter_context(Namespace())
        _connect_others(made)
        text = made.config.read_text()  # on a busy machine, an anchor is not dead that soon
        made.config.write_text(text.replace("detection_ms: 200 ", "detection_ms: 5000 "))
        with made.config.open("a") as config:
            config.write(f"upf_socket: {tmp_path}/run/upf.sock\n")
        found = probe()  # so that each start need not
        with made.user_plane.open("a") as config:
            config.write(f"in_place_renewal: {str(found.in_place_renewal).lower()}\n")
            config.write(f"fast_path: {str(found.tc_bpf).lower()}\n")
        yield made


def _connect_others(site: Site) -> None:
    ends = (("10.50.1.1/24", "10.50.1.2/24"), ("fd00:50:1::1/64", "fd00:50:1::2/64"))
    connect(site.hosts["router"], "internet", site.hosts["internet"], "uplink", *ends)
    routes = "ip route add default via 10.50.1.1; ip route add default via fd00:50:1::1"
    site.run("internet", ["sh", "-e", "-c", routes])
    site.run("router", ["sh", "-e", "-c", OTHERS])


def around(site: Site) -> dict[str, str]:
    """What the router holds, without the counts of what others count."""
    return {
        what: re.sub(r"packets \d+ bytes \d+", "", text) for what, text in site.left_over().items()
    }


def others_of(found: dict[str, str]) -> dict[str, str]:
    """What of it is not ours."""
    left = dict(found)
    left["table"] = re.sub(r"^table \w+ aipaging {.*?^}\n", "", left["table"], flags=re.S | re.M)
    for what, ours in OURS.items():
        left[what] = "\n".join(line for line in left[what].splitlines() if not ours.search(line))
    return left


def others(site: Site, sockets: ExitStack) -> dict[str, Echoes]:
    """Traffic of a UE without a lease, past all services: datagrams, and a connection."""
    flows = {}
    for version, address in INTERNET.items():
        near = sockets.enter_context(opened(site, "ue", UES["ue2"][version == 6]))
        far = sockets.enter_context(opened(site, "internet", address))
        flows[f"IPv{version}"] = Echoes(near, far, (address, PORT))
        flows[f"IPv{version}"].find_path()
    for host in ("ue", "internet"):  # a tail loss probe on a busy machine is no loss
        site.run(host, ["sh", "-c", "echo 0 > /proc/sys/net/ipv4/tcp_early_retrans"])
    with opened(site, "internet", INTERNET[4], socket.SOCK_STREAM) as listener:
        listener.listen()
        near = sockets.enter_context(opened(site, "ue", UES["ue2"][0], socket.SOCK_STREAM))
        near.connect((INTERNET[4], PORT))
        far = sockets.enter_context(listener.accept()[0])
    for end in (near, far):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return {**flows, "TCP": Echoes(near, far)}


def session(site: Site, sockets: ExitStack, anchor: str) -> dict[str, Echoes]:
    """Traffic of UE 1 to the service, at an anchor."""
    flows = {}
    for version, service in SERVICES.items():
        near = sockets.enter_context(opened(site, "ue", UES["ue1"][version == 6]))
        far = sockets.enter_context(opened(site, anchor, service))
        flows[f"IPv{version}"] = Echoes(near, far, (service, PORT))
    return flows


@contextmanager
def running(flows: dict[str, Echoes]) -> Iterator[None]:
    with ExitStack() as stack:
        for flow in flows.values():
            stack.enter_context(flow)
        yield


def lost(flows: dict[str, Echoes]) -> dict[str, int]:
    assert all(flow.sent > 100 for flow in flows.values())
    return {name: flow.lost() for name, flow in flows.items()}


NOTHING = {"IPv4": 0, "IPv6": 0}


def opened(site: Site, host: str, address: str, kind: int = socket.SOCK_DGRAM) -> socket.socket:
    def make() -> socket.socket:
        made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((address, PORT))
        return made

    return site.hosts[host].run(make)


def status(site: Site) -> dict[str, Any]:
    command = [sys.executable, "-m", "scripts.cli", "upf", str(site.user_plane), "--status"]
    return json.loads(site.run("router", command))


def fails(site: Site, *arguments: str) -> str:
    """Run a command on the router that has to fail, and return its words."""
    command = [sys.executable, "-m", "scripts.cli", *arguments]
    result = site.hosts["router"].run(
        lambda: subprocess.run(command, capture_output=True, text=True, check=False)
    )
    assert result.returncode == 1, result
    assert "Traceback" not in result.stderr
    return result.stderr


def wait_until_reached(site: Site, anchor: str) -> None:
    until = time.monotonic() + 10
    while site.reached("ue1", 4) != anchor:
        assert time.monotonic() < until, site.words("daemon")


def test_neither_death_nor_upgrade_of_the_user_plane_disturbs_others_or_leases(site: Site) -> None:
    before = around(site)
    with ExitStack() as sockets:
        foreign = others(site, sockets)
        with running(foreign):
            site.hold_user_plane()
            site.serve()
            site.start_anchors()
            installed = around(site)
            assert all(installed[what] != before[what] for what in LEFT_OVER)
            assert others_of(installed) == others_of(before)
            paged = site.operator("POST", "/sessions", {"ue": "ue1", "intent": INTENT})
            path, anchor = f"/sessions/{paged['sessionId']}", paged["commit"]["anchor"]
            live = session(site, sockets, anchor)
            with running(live):
                for number in range(KILLS):
                    site.end("agent", signal.SIGKILL)
                    site.launch("agent", "router", ["scripts.cli", "upf", str(site.user_plane)])
                    time.sleep(START_S * number / KILLS)
                site.wait_for("agent")
                # The control plane has found its way back, and the lease is the same.
                site.operator("POST", f"{path}/extend", {"requestedAdditionalDuration": 60})
                assert site.end("agent", signal.SIGTERM) == 0
                assert status(site)["agent"] is None
                site.hold_user_plane()
                # Nor does the death of the control plane matter to the user plane.
                site.end("daemon", signal.SIGKILL)
                site.serve()
            assert lost(live) == NOTHING
            found = status(site)
            assert found["agent"]["controllerPid"] == site.programs["daemon"].pid
            assert {entry["leaseId"] for entry in found["enforced"]} == {paged["commit"]["leaseId"]}
            # An upgrade makes the table anew, and the control plane opens it again.
            site.end("agent", signal.SIGKILL)
            more = "subscribers:\n  - {ue: ue3, address4: 10.45.0.3, address6: 'fd00:45::3'}"
            text = site.user_plane.read_text().replace("subscribers:", more)
            site.user_plane.write_text(text)
            site.hold_user_plane()
            wait_until_reached(site, anchor)
            assert status(site)["table"] != found["table"]
            assert others_of(around(site)) == others_of(before)
            assert "is running" in fails(site, "upf", str(site.user_plane), "--remove")
            for name in ("daemon", "agent"):
                assert site.end(name, signal.SIGTERM) == 0
            assert site.reached("ue1", 4) == anchor
        assert lost(foreign) == {**NOTHING, "TCP": 0}
    with ExitStack() as sockets:
        foreign = others(site, sockets)
        with running(foreign):
            time.sleep(0.3)
            command = [sys.executable, "-m", "scripts.cli", "upf", str(site.user_plane), "--remove"]
            site.run("router", command)
            assert around(site) == before
        gone = session(site, sockets, anchor)
        with running(gone):
            time.sleep(0.3)
        assert all(flow.lost() == flow.sent for flow in gone.values())  # lost is lost
        # What the kernel sends just while it takes a qdisc away is lost, whoever asks it to.
        assert all(count <= MOST_LOST_WITH_A_QDISC for count in lost(foreign).values())
    for name in ("agent", "daemon"):
        assert "Traceback" not in site.words(name)


def test_what_is_not_ours_is_refused_or_kept(site: Site) -> None:
    """A second agent, a second control plane, and the qdiscs and routes of somebody else."""
    upf = ("upf", str(site.user_plane))
    assert "no user plane" in fails(site, "serve", str(site.config))
    for add, take_away, words in (
        ("nft add table inet aipaging", "nft delete table inet aipaging", "rename it"),
        (f"tc qdisc add dev {N3} root handle 1: htb", f"tc qdisc del dev {N3} root", "htb 1:"),
        (f"ip route add {FAR} table 45002", "ip route flush table 45002", "table 45002"),
    ):
        site.run("router", add.split())
        before = around(site)
        assert words in fails(site, *upf)
        assert around(site) == before
        site.run("router", take_away.split())
    site.hold_user_plane()
    assert "in use" in fails(site, *upf)
    site.serve()
    other = site.folder / "other.yaml"
    other.write_text(site.config.read_text().replace("/state", "/other"))
    assert f"process {site.programs['daemon'].pid} is" in fails(site, "serve", str(other))
    assert "upf" in fails(site, "serve", str(other), "--remove")
    for path in (site.folder / "run", site.folder / "run" / "upf.sock"):
        assert path.stat().st_mode & 0o077 == 0
