"""Sessions on the emulated network: what a UE, its anchor and the operator see of a lease."""

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from testbed_helpers import on_a_testbed, udp

from scripts.errors import UserError
from scripts.testbed import Testbed
from topologies.hosts import Ue

pytestmark = pytest.mark.testbed
TASK = "text-generation"
SO_RCVBUFFORCE = 33


def reached(testbed: Testbed, ue: Ue, *, source: Ue | None = None) -> str | None:
    """Return which anchor gets a UE's datagram to the service; `source`: whose address it bears."""
    service = testbed.catalogue.services[0].address4
    listeners = {}
    for name, anchor in testbed.network.anchors.items():
        listeners[name] = udp(anchor, service)
    ports = {name: listener.getsockname()[1] for name, listener in listeners.items()}
    bearer = source or ue
    with udp(ue, bearer.address4, foreign=bearer is not ue) as sender:
        for port in set(ports.values()):
            sender.sendto(b"x", (str(service), port))
    got = []
    for name, listener in listeners.items():
        listener.settimeout(0.3)
        try:
            listener.recv(10)
            got.append(name)
        except TimeoutError:
            pass
        listener.close()
    assert len(got) <= 1
    return got[0] if got else None


@contextmanager
def traffic(testbed: Testbed, ue: Ue, anchor: str) -> Iterator[dict[str, int]]:
    """Send 1,000 datagrams/s to the service for as long as this is open; count both ends."""
    service = testbed.catalogue.services[0].address4
    counts = {"sent": 0, "received": 0}
    done = threading.Event()
    with (
        udp(testbed.network.anchors[anchor], service) as receiver,
        udp(ue, ue.address4) as sender,
    ):
        receiver.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 24)
        port = receiver.getsockname()[1]

        def send() -> None:
            while not done.wait(0.001):
                sender.sendto(b"x", (str(service), port))
                counts["sent"] += 1

        thread = threading.Thread(target=send)
        thread.start()
        try:
            yield counts
        finally:
            done.set()
            thread.join()
        receiver.settimeout(0.3)
        with suppress(TimeoutError):
            while receiver.recv(10):
                counts["received"] += 1


def test_a_lease_from_intent_to_release() -> None:
    def body(testbed: Testbed) -> None:
        ue1, ue2 = testbed.network.ues
        assert reached(testbed, ue1) is None
        paged = testbed.page(ue1, TASK, max_tokens=5)
        answer, stream = paged["answer"], paged["stream"]
        anchor = answer["commit"]["anchor"]
        assert stream["complete"]
        assert (stream["lost"], stream["repeated"], stream["reordered"]) == (0, 0, 0)
        assert {token["anchor"] for token in stream["tokens"]} == {anchor}
        assert reached(testbed, ue1) == anchor
        assert reached(testbed, ue2) is None

        # The address follows the UE from cell to cell; so does its lease.
        testbed.network.handover(ue1, "gnb2")
        assert reached(testbed, ue1) == anchor

        # An anchor wants the token, whatever the network lets through.
        request = (
            "import httpx,sys; print(httpx.post(sys.argv[1], json={'model':'chat.example',"
            "'messages':[{'role':'user','content':'hi'}]}).status_code)"
        )
        url = "http://198.18.0.1:8000/v1/chat/completions"
        told = ue1.popen([sys.executable, "-c", request, url], stdout=subprocess.PIPE)
        assert told.communicate(timeout=20)[0].strip() == b"401"

        testbed.request("DELETE", f"/sessions/{answer['sessionId']}")
        assert reached(testbed, ue1) is None
        status = testbed.request("GET", "/status")
        assert status["enforced"] == []
        assert status["slotsUsed"][anchor] == 0

    on_a_testbed(body)


def test_a_ue_cannot_use_the_lease_of_another_in_its_cell() -> None:
    def body(testbed: Testbed) -> None:
        ue1, ue2 = testbed.network.ues
        testbed.page(ue1, TASK)
        assert reached(testbed, ue2, source=ue1) is None
        assert sum(testbed.network.radio_drops().values()) > 0

    on_a_testbed(body)


def test_a_killed_controller_comes_back_with_every_lease() -> None:
    def body(testbed: Testbed) -> None:
        ue1, ue2 = testbed.network.ues
        session = testbed.page(ue1, TASK)["answer"]
        anchor = session["commit"]["anchor"]
        testbed.page(ue2, TASK)
        before = testbed.request("GET", "/sessions")
        with traffic(testbed, ue1, anchor) as counts:
            testbed.kill_controller()
            assert reached(testbed, ue1) == anchor  # the kernel goes on without it
            testbed.start_controller()
        assert counts["sent"] > 500
        assert counts["received"] == counts["sent"]  # nor does its coming back disturb a packet
        assert testbed.request("GET", "/sessions") == before
        target = "edge2" if anchor == "edge1" else "edge1"
        path = f"/sessions/{session['sessionId']}/relocate"
        moved = testbed.request("POST", path, {"target": target})
        assert moved["commit"]["epoch"] == session["commit"]["epoch"] + 1
        assert moved["serviceAddress"] == session["serviceAddress"]
        assert reached(testbed, ue1) == target
        log = testbed.state.with_name("evidence.jsonl")
        testbed.export(log)
        entries = [json.loads(line) for line in log.read_text().splitlines()]
        assert [entry["index"] for entry in entries] == list(range(len(entries)))

    on_a_testbed(body)


def test_a_token_stream_lives_through_a_relocation() -> None:
    """It began at the old anchor and finishes there while that drains; what is new goes on."""

    def body(testbed: Testbed) -> None:
        ue1, _ = testbed.network.ues
        command = [
            *(sys.executable, "-m", "topologies.endpoints.ue", "--core", testbed.core_url),
            *("--task", TASK, "--max-tokens", "150"),
        ]
        agent = ue1.popen(command, stdout=subprocess.PIPE)
        until = time.monotonic() + 20
        while not (sessions := testbed.request("GET", "/sessions")["sessions"]):
            assert time.monotonic() < until
        time.sleep(1)  # tokens come 20 ms apart: some fifty
        commit = sessions[0]["commits"][-1]
        target = "edge2" if commit["anchor"] == "edge1" else "edge1"
        path = f"/sessions/{sessions[0]['sessionId']}/relocate"
        testbed.request("POST", path, {"target": target})
        stream = json.loads(agent.communicate(timeout=30)[0])["stream"]
        assert stream["complete"]
        assert (stream["lost"], stream["repeated"], stream["reordered"]) == (0, 0, 0)
        assert {token["anchor"] for token in stream["tokens"]} == {commit["anchor"]}
        assert reached(testbed, ue1) == target

    on_a_testbed(body)


def test_refusals_reach_the_ue_with_their_reason() -> None:
    def body(testbed: Testbed) -> None:
        ue1, _ = testbed.network.ues
        with pytest.raises(UserError, match="TASK_UNKNOWN"):
            testbed.page(ue1, "image-segmentation")
        with pytest.raises(UserError, match=r"503.*no anchor satisfies"):
            intent = {"task": TASK, "regions": ["atlantis"]}
            testbed.request("POST", "/sessions", {"ue": ue1.name, "intent": intent})
        # The operator's side is closed to UEs.
        ask = "import httpx,sys; print(httpx.get(sys.argv[1]).status_code)"
        url = f"{testbed.core_url}/status"
        told = ue1.popen([sys.executable, "-c", ask, url], stdout=subprocess.PIPE)
        assert told.communicate(timeout=20)[0].strip() == b"403"

    on_a_testbed(body)
