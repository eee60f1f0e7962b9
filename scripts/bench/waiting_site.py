"""What `bench waiting` measures on: a router with its daemon, UEs, and two anchors' workers."""

from __future__ import annotations

import json
import select
import subprocess
import sys
from contextlib import ExitStack
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

import httpx

from controlplane.catalogue import Catalogue
from controlplane.controller import Settings
from controlplane.intent import Intent
from controlplane.parties import Subscriber, Subscription
from scripts.errors import UserError
from scripts.serve import SOCKET_FILE, ServeConfig, write_config
from scripts.user_plane import CellConfig
from upf.config import AnchorPort
from upf.netns import Namespace, connect
from upf.parking import ParkingLimits

PORT = 8000
ANCHORS = ("edge1", "edge2")
SERVICES = {  # AISI -> task, how it relocates, its addresses by IP version
    "first": ("summarization", "drain", {4: "198.18.0.1", 6: "fd00:a151::1"}),
    "held": ("text-generation", "buffer", {4: "198.18.0.2", 6: "fd00:a151::2"}),
    "unheld": ("translation", "drain", {4: "198.18.0.3", 6: "fd00:a151::3"}),
}
LEASE_MS = 3_600_000
DRAIN_MS = 100
START_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 10.0


def ue_address(number: int, version: int) -> str:
    """Return the address of a UE, counted from 1."""
    return f"10.45.0.{number}" if version == 4 else f"fd00:45::{number:x}"


def own_address(anchor: str) -> str:
    """Return an anchor's own IPv4 address."""
    return f"10.47.{ANCHORS.index(anchor) + 1}.2"


def catalogue() -> Catalogue:
    """Return the services, all at both anchors."""
    services = [
        {
            "aisi": aisi,
            "task": task,
            "model": "m",
            "address4": addresses[4],
            "address6": addresses[6],
            "port": PORT,
            "relocation": relocation,
        }
        for aisi, (task, relocation, addresses) in SERVICES.items()
    ]
    anchors = [
        {
            "name": name,
            "region": "north",
            "trust_tier": 3,
            "slots": 1_000,
            "cost": float(cost),
            "hosts": [{"aisi": aisi, "service_time_ms": 1.0} for aisi in SERVICES],
        }
        for cost, name in enumerate(ANCHORS)
    ]
    return Catalogue.model_validate(
        {"qos_profiles": [{"name": "QOS_E"}], "services": services, "anchors": anchors}
    )


class Worker:
    """A worker process on an anchor."""

    def __init__(self, host: Namespace, anchor: str, careless_ms: int = 0) -> None:
        """Start it; `wait` returns when it says that it is ready."""
        addresses = [a for _, _, by_version in SERVICES.values() for a in by_version.values()]
        command = [
            *(sys.executable, "-m", "topologies.endpoints.worker", "--own", own_address(anchor)),
            *("--port", str(PORT), "--careless-ms", str(careless_ms), "--service", *addresses),
        ]
        self._process = host.run(
            lambda: subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        )

    def wait(self) -> None:
        """Return when it says that it is ready."""
        _first_line(self._process, "a worker")

    def kill(self) -> None:
        """End it, whatever it got."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> list[tuple[int, int, int]]:
        """End it; return what it got: episode, sequence number, when (Unix ns)."""
        self._process.terminate()
        out, _ = self._process.communicate(timeout=START_TIMEOUT_S)
        return [(episode, number, at) for episode, number, at in json.loads(out.split("\n")[-2])]


class Site:
    """Namespaces, links and routes, and the daemon; `folder` is on a real disk."""

    def __init__(self, folder: Path, ues: int, undo: ExitStack) -> None:
        self._undo = undo
        self.hosts = {name: undo.enter_context(Namespace()) for name in ("ue", "router", *ANCHORS)}
        self._wire(ues)
        listed = folder / "catalogue.json"
        listed.write_text(json.dumps(catalogue().model_dump(mode="json")))
        intent = Intent.model_validate({"task": SERVICES["first"][0], "durationMs": 60_000})
        config = ServeConfig(
            catalogue=listed,
            state=folder / "state",
            cells={"gnb1": CellConfig(n3_interface="n3", downlink_mbps=1e4, uplink_mbps=1e4)},
            anchors=tuple(
                AnchorPort(
                    name=name,
                    interface=f"n6-{name}",
                    address4=IPv4Address(own_address(name)),
                    address6=IPv6Address(f"fd00:47:{number}::2"),
                )
                for number, name in enumerate(ANCHORS, start=1)
            ),
            subscribers=tuple(
                Subscriber(
                    f"ue{number}",
                    IPv4Address(ue_address(number, 4)),
                    IPv6Address(ue_address(number, 6)),
                    "gnb1",
                    subscriptions=(Subscription("first", intent),),
                )
                for number in range(1, ues + 1)
            ),
            settings=Settings(drain_ms=DRAIN_MS),
            # Bursts of an experiment, not of a UE.
            parking=ParkingLimits(pages_per_ue_s=1_000),
        )
        file = folder / "serve.yaml"
        write_config(file, config)
        log = folder / "serve.log"
        with log.open("wb") as words:
            self.daemon = self.hosts["router"].run(
                lambda: subprocess.Popen(
                    [sys.executable, "-m", "scripts.cli", "serve", str(file)],
                    stdout=subprocess.PIPE,
                    stderr=words,
                    text=True,
                )
            )
        undo.callback(self._stop)
        _first_line(self.daemon, "the daemon", log)
        self._client = undo.enter_context(
            httpx.Client(
                transport=httpx.HTTPTransport(uds=str(config.state / SOCKET_FILE)),
                base_url="http://daemon",
                timeout=ANSWER_TIMEOUT_S,
                trust_env=False,
            )
        )

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Ask the daemon as the operator. Raises UserError if it refuses."""
        answer = self._client.request(method, path, json=body)
        if answer.is_error:
            raise UserError(f"{method} {path}: {answer.text}")
        return answer.json() if answer.content else None

    def worker(self, anchor: str, careless_ms: int = 0) -> Worker:
        """Start a worker on an anchor."""
        made = Worker(self.hosts[anchor], anchor, careless_ms)
        self._undo.callback(made.kill)
        return made

    def _stop(self) -> None:
        self.daemon.terminate()
        try:
            self.daemon.wait(ANSWER_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.daemon.kill()
            self.daemon.wait()

    def _wire(self, ues: int) -> None:
        ue, router = self.hosts["ue"], self.hosts["router"]
        n3 = (("10.48.1.2/24", "10.48.1.1/24"), ("fd00:48:1::2/64", "fd00:48:1::1/64"))
        connect(ue, "radio", router, "n3", *n3)
        for number, name in enumerate(ANCHORS, start=1):
            n6 = [
                (f"{stem}1/{length}", f"{stem}2/{length}")
                for stem, length in ((f"10.47.{number}.", 24), (f"fd00:47:{number}::", 64))
            ]
            connect(router, f"n6-{name}", self.hosts[name], "n6", *n6)
            for _, _, addresses in SERVICES.values():
                for address in addresses.values():
                    _own(self.hosts[name], address)
            _routes(
                self.hosts[name],
                ("10.45.0.0/16", f"10.47.{number}.1"),
                ("fd00:45::/64", f"fd00:47:{number}::1"),
            )
        for number in range(1, ues + 1):
            for version in (4, 6):
                _own(ue, ue_address(number, version))
        _routes(ue, ("198.18.0.0/15", "10.48.1.1"), ("fd00:a151::/64", "fd00:48:1::1"))
        _routes(router, ("10.45.0.0/16", "10.48.1.2"), ("fd00:45::/64", "fd00:48:1::2"))
        router.run(_forward)


def _first_line(process: subprocess.Popen[str], what: str, log: Path | None = None) -> None:
    assert process.stdout is not None
    ready = select.select([process.stdout], [], [], START_TIMEOUT_S)[0]
    if not ready or not process.stdout.readline():
        words = f":\n{log.read_text()[-2000:]}" if log is not None else ""
        raise UserError(f"{what} did not start{words}")


def _own(host: Namespace, address: str) -> None:
    with host.links() as links:
        flags = {"flags": 0x02} if ":" in address else {}  # IFA_F_NODAD
        links.addr(
            "add", index=1, address=address, prefixlen=128 if ":" in address else 32, **flags
        )


def _routes(host: Namespace, *routes: tuple[str, str]) -> None:
    with host.links() as links:
        for destination, gateway in routes:
            links.route("add", family=10 if ":" in gateway else 2, dst=destination, gateway=gateway)


def _forward() -> None:
    for name in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
        Path(f"/proc/sys/net/{name}").write_text("1")
