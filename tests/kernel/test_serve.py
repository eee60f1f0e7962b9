"""docs/serving.md done: a plain router, its daemon, anchors and UEs in namespaces, real packets."""

import errno
import functools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from router_site import INTENT, LEFT_OVER, PORT, SERVICES, UES, Site

from topologies.endpoints.ue import Answer, stream

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces"),
]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with ExitStack() as stack:
        yield Site(tmp_path, stack)


def test_a_router_as_the_document_says(site: Site) -> None:
    before = site.left_over()
    site.serve()
    site.start_anchors()
    installed = site.left_over()
    assert all(installed[what] != before[what] for what in LEFT_OVER)  # what there is to take away

    # Only a lease opens the way.
    assert [site.reached("ue1", version) for version in SERVICES] == [None, None]
    paged = site.operator("POST", "/sessions", {"ue": "ue1", "intent": INTENT})
    anchor = paged["commit"]["anchor"]
    assert anchor == "edge1"
    assert [site.reached("ue1", version) for version in SERVICES] == [anchor, anchor]
    assert [site.reached("ue2", version) for version in SERVICES] == [None, None]
    report = site.hosts["ue"].run(lambda: stream(Answer.model_validate(paged), "hi", 5))
    assert (report.complete, {token.anchor for token in report.tokens}) == (True, {anchor})

    # A third party, over TCP, for a UE of its tenant; others' sessions are not there for it.
    token = site.answered(
        *("edge2", "POST", "/oauth2/token"),
        auth=("clinic-app", site.secret),
        data={"grant_type": "client_credentials"},
    ).json()["access_token"]
    bearer = {"headers": {"authorization": f"Bearer {token}"}}
    body = {"ueAddress": UES["ue2"][1], "intent": {"task": "text-generation"}}
    assert site.answered("edge2", "POST", "/sessions", json=body, **bearer).status_code == 201
    assert site.reached("ue2", 4) is not None
    mine = site.answered("edge2", "GET", "/sessions", **bearer).json()["sessions"]
    assert [(session["ue"], session["tenant"]) for session in mine] == [("ue2", "clinic")]
    path = f"/sessions/{paged['sessionId']}"
    assert site.answered("edge2", "GET", path, **bearer).status_code == 404

    # Dead, the daemon changes nothing for UEs; the next one takes over what there is.
    known = site.operator("GET", path)
    counted = uplink_packets(site, paged)
    site.end("daemon", signal.SIGKILL)
    assert site.reached("ue1", 4) == anchor
    site.serve()
    assert uplink_packets(site, paged) == counted + 1  # adopted: its counts went on
    after = site.operator("GET", path)
    assert after["commits"] == known["commits"]
    wait_until_heard(site, anchor)
    moved = site.operator("POST", f"{path}/relocate", {})
    assert (moved["commit"]["epoch"], site.reached("ue1", 4)) == (2, "edge2")

    # Stopped, it still leaves leases; removed, nothing.
    assert site.end("daemon", signal.SIGTERM) == 0
    assert site.reached("ue1", 6) == "edge2"
    remove = [sys.executable, "-m", "scripts.cli", "serve", str(site.config), "--remove"]
    site.run("router", remove)
    assert site.left_over() == before
    assert site.reached("ue1", 4) is None
    site.run("router", remove)  # nothing to do
    for name in ("daemon", "edge1", "edge2"):
        assert "Traceback" not in site.words(name)


def uplink_packets(site: Site, paged: dict[str, Any]) -> int:
    return sum(
        int(entry["uplinkPackets"])
        for entry in site.operator("GET", "/status")["enforced"]
        if entry["leaseId"] == paged["commit"]["leaseId"]
    )


def wait_until_heard(site: Site, anchor: str) -> None:
    until = time.monotonic() + 5
    while True:
        for described in site.operator("GET", "/anchors")["anchors"]:
            if described["name"] == anchor and described["readyAisis"] is not None:
                return
        assert time.monotonic() < until
        time.sleep(0.01)


def test_only_root_gets_at_the_operators_socket_and_the_keys(site: Site) -> None:
    site.serve()
    state = site.folder / "state"
    secret = [state, state / "operator.sock", state / "evidence.key", *(state / "keys").iterdir()]
    for path in secret:
        assert path.stat().st_mode & 0o077 == 0, path
    assert site.answered("ue", "GET", "/status").status_code == 403
    assert site.answered("edge1", "GET", "/status").status_code == 403
    assert site.answered("router", "GET", "/status").status_code == 401
    second = [sys.executable, "-m", "scripts.cli", "serve", str(site.config)]
    result = site.hosts["router"].run(
        lambda: subprocess.run(second, capture_output=True, text=True, check=False)
    )
    assert result.returncode == 1
    assert "another controller is using it" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("apart", [False, True], ids=["one process", "upf apart"])
def test_a_ue_with_a_subscription_just_sends(site: Site, apart: bool) -> None:
    """Its first datagram and its first connection get there; what policy refuses, it is told of."""
    given = (
        "subscriptions: [{aisi: chat.example, intent: {task: text-generation, durationMs: 2000}}]"
    )
    for file in (site.config, site.user_plane):
        text = file.read_text()
        for _, address in UES.values():
            text = text.replace(f'"{address}"', f'"{address}", {given}')
        file.write_text(text)
    tenants = site.folder / "tenants.yaml"
    tenants.write_text(tenants.read_text().replace("maxSessions: 100", "maxSessions: 0"))
    if apart:
        with site.config.open("a") as config:
            config.write(f"upf_socket: {site.folder}/run/upf.sock\n")
        site.hold_user_plane()
    site.serve()
    site.start_anchors()
    assert site.reached("ue1", 6) == "edge1"
    assert site.reached("ue1", 4) == "edge1"
    [session] = site.operator("GET", "/sessions")["sessions"]
    assert (session["ue"], session["commits"][0]["cause"]) == ("ue1", "FIRST_PACKET")

    # Its lease over, a connection begins the next.
    def ask() -> int:
        with socket.create_connection(
            (SERVICES[4], 8000), timeout=3, source_address=(UES["ue1"][0], 0)
        ) as connection:
            connection.sendall(b"GET /ready HTTP/1.1\r\nHost: chat\r\nConnection: close\r\n\r\n")
            return int(connection.recv(100).split()[1])

    while site.operator("GET", "/sessions")["sessions"]:
        time.sleep(0.05)
    assert site.hosts["ue"].run(ask) == 200

    # The clinic's UE has no quota left: its socket says so.
    def refused(family: socket.AddressFamily, source: str, service: str) -> int:
        with socket.socket(family, socket.SOCK_DGRAM) as sender:
            sender.bind((source, PORT))
            sender.connect((service, PORT))
            sender.settimeout(3)
            sender.send(b"?")
            with pytest.raises(OSError) as told:
                sender.recv(10)
            return told.value.errno or 0

    for version, family in ((4, socket.AF_INET), (6, socket.AF_INET6)):
        asked = functools.partial(refused, family, UES["ue2"][version == 6], SERVICES[version])
        prohibited = errno.EACCES if version == 6 else errno.EHOSTUNREACH
        assert site.hosts["ue"].run(asked) == prohibited
    status = site.operator("GET", "/status")
    parked = status["parked"]
    assert parked["stored"] == parked["released"] + parked["dropped"]
    assert parked["released"] in (2, 3)  # the second family's datagram may meet the first's hold
    assert parked["dropped"] == 1  # one answer holds for both families
    assert status["drops"]["paging_refused"] == 2

    # All of it is in the evidence.
    assert site.end("daemon", signal.SIGTERM) == 0
    state, log = site.folder / "state", site.folder / "evidence.jsonl"
    aipaging = [sys.executable, "-m", "scripts.cli", "evidence"]
    site.run("router", [*aipaging, "export", str(state / "control.db"), str(log)])
    site.run("router", [*aipaging, "verify", str(log), "--key", str(state / "evidence.vkey")])
    assert log.read_text().count('"cause":"FIRST_PACKET"') == 2
