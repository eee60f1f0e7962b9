"""docs/serving.md's network in namespaces: a router, UEs and anchors, and the daemon's files."""

import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

from controlplane.access_tokens import generate_secret
from upf.netns import Namespace, connect

DOCUMENT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
SERVICES = {4: "198.18.0.1", 6: "fd00:a151::1"}
UES = {"ue1": ("10.45.0.1", "fd00:45::1"), "ue2": ("10.45.0.2", "fd00:45::2")}
API = "http://10.49.0.1:8080"
INTENT = {"task": "text-generation", "durationMs": 120_000}
PORT = 7
QUIET_S = 0.2
START_S = 30
LEFT_OVER = {  # what the daemon puts into the kernel, and what shows it
    "table": ["nft", "list", "ruleset"],
    "rules": ["ip", "rule"],
    "rules6": ["ip", "-6", "rule"],
    "routes": ["ip", "route", "show", "table", "all"],
    "routes6": ["ip", "-6", "route", "show", "table", "all"],
    "qdiscs": ["tc", "qdisc"],
}


def block(first_line: str) -> str:
    found = re.search(rf"^```\w+\n({re.escape(first_line)}\n.*?)^```$", DOCUMENT, re.M | re.S)
    assert found, first_line
    return found[1]


class Site:
    """The document's network: its commands run, its files written to a folder."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.hosts = {
            name: stack.enter_context(Namespace()) for name in ("ue", "router", "edge1", "edge2")
        }
        self.programs: dict[str, subprocess.Popen[str]] = {}
        stack.callback(self._stop)
        self.secret, self._secret_hash = generate_secret()
        self.config, self.user_plane = folder / "router.yaml", folder / "upf.yaml"
        for name in ("router", "catalogue", "tenants", "upf"):
            self._write(name)
        self._wire()

    def run(self, host: str, command: Sequence[str]) -> str:
        result = self.hosts[host].run(
            lambda: subprocess.run(command, capture_output=True, text=True, check=False)
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    def left_over(self) -> dict[str, str]:
        return {what: self.run("router", command) for what, command in LEFT_OVER.items()}

    # Programs

    def serve(self) -> None:
        self.start("daemon", "router", ["scripts.cli", "serve", str(self.config)])

    def hold_user_plane(self) -> None:
        """Start the user plane's agent and wait for its gate; `serve` then serves over it."""
        self.launch("agent", "router", ["scripts.cli", "upf", str(self.user_plane)])
        self.wait_for("agent")

    def start_anchors(self) -> None:
        services = self.folder / "services.json"
        services.write_text(re.search(r"`services.json` being `(\{.*?\}\})`", DOCUMENT, re.S)[1])
        for number in (1, 2):
            name, address = f"edge{number}", f"10.47.{number}.2"
            command = ["topologies.endpoints.anchor", "--name", name, "--address", address]
            self.start(name, name, [*command, "--core", API, "--services", str(services)])

    def end(self, name: str, with_signal: signal.Signals) -> int:
        self.programs[name].send_signal(with_signal)
        return self.programs[name].wait(20)

    def words(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def start(self, name: str, host: str, module: Sequence[str]) -> None:
        """Start a program and wait until it says that it is ready."""
        self.launch(name, host, module)
        self.wait_for(name)

    def launch(self, name: str, host: str, module: Sequence[str]) -> None:
        with (self.folder / f"{name}.log").open("a") as log:
            program = self.hosts[host].run(
                lambda: subprocess.Popen(
                    [sys.executable, "-m", *module], stdout=subprocess.PIPE, stderr=log, text=True
                )
            )
        self.programs[name] = program

    def wait_for(self, name: str) -> None:
        program = self.programs[name]
        assert program.stdout is not None
        ready, _, _ = select.select([program.stdout], [], [], START_S)
        assert ready, f"{name} does not start: {self.words(name)}"
        assert program.stdout.readline(), self.words(name)

    def _stop(self) -> None:
        for program in self.programs.values():
            program.kill()
            program.wait()

    # Packets

    def reached(self, ue: str, version: int) -> str | None:
        """Return which anchor gets a UE's datagram to the service; and its answer comes back."""
        family = socket.AF_INET if version == 4 else socket.AF_INET6

        def bound(host: str, address: str) -> socket.socket:
            def make() -> socket.socket:
                made = socket.socket(family, socket.SOCK_DGRAM)
                made.bind((address, PORT))
                made.settimeout(QUIET_S)
                return made

            return self.hosts[host].run(make)

        with ExitStack() as stack:
            service = SERVICES[version]
            sender = stack.enter_context(bound("ue", UES[ue][0 if version == 4 else 1]))
            listeners = [stack.enter_context(bound(name, service)) for name in ("edge1", "edge2")]
            sender.sendto(b"?", (service, PORT))
            for name, listener in zip(("edge1", "edge2"), listeners, strict=True):
                try:
                    _, source = listener.recvfrom(10)
                except TimeoutError:
                    continue
                listener.sendto(b"!", source)
                assert sender.recv(10) == b"!"
                return name
        return None

    def answered(self, host: str, method: str, path: str, **options: Any) -> httpx.Response:
        """Ask the API over TCP from a host."""

        def ask() -> httpx.Response:
            with httpx.Client(base_url=API, trust_env=False, timeout=10) as client:
                return client.request(method, path, **options)

        return self.hosts[host].run(ask)

    def operator(self, method: str, path: str, body: Any = None) -> Any:
        transport = httpx.HTTPTransport(uds=str(self.folder / "state" / "operator.sock"))
        with httpx.Client(transport=transport, base_url="http://daemon", timeout=10) as client:
            answer = client.request(method, path, json=body)
        assert answer.is_success, answer.text
        return answer.json() if answer.content else None

    # How it is made

    def _write(self, name: str) -> None:
        text = block(f"# /etc/aipaging/{name}.yaml")
        text = text.replace("/etc/aipaging", str(self.folder))
        text = text.replace("/var/lib/aipaging", str(self.folder / "state"))
        text = text.replace("/run/aipaging", str(self.folder / "run"))
        text = re.sub(r"sha256\$[\w$-]+", lambda _: self._secret_hash, text)
        (self.folder / f"{name}.yaml").write_text(text)

    def _wire(self) -> None:
        router = self.hosts["router"]
        for host in self.hosts.values():  # addresses are usable at once
            host.run(lambda: _sysctl("net.ipv6.conf.default.accept_dad", "0"))
        links = [("n3-gnb1", "ue", "48:1"), ("n6-edge1", "edge1", "47:1")]
        for name, host, network in (*links, ("n6-edge2", "edge2", "47:2")):
            v4, v6 = f"10.{network.replace(':', '.')}", f"fd00:{network}:"
            ends = (f"{v4}.1/24", f"{v4}.2/24"), (f"{v6}:1/64", f"{v6}:2/64")
            connect(router, name, self.hosts[host], "uplink", *ends)
        for line in block("net.ipv4.ip_forward = 1").splitlines():
            if not line.startswith("#"):
                name, _, value = line.partition(" = ")
                router.run(lambda name=name, value=value: _sysctl(name, value))
        self.run("router", ["sh", "-e", "-c", block("# router")])
        edge1 = block("# edge1")
        self.run("edge1", ["sh", "-e", "-c", edge1])
        edge2 = edge1.replace("10.47.1.", "10.47.2.").replace("fd00:47:1:", "fd00:47:2:")
        self.run("edge2", ["sh", "-e", "-c", edge2])
        commands = [
            f"ip address add {address} dev lo {'nodad' if ':' in address else ''}"
            for addresses in UES.values()
            for address in addresses
        ]
        commands.append("ip route add default via 10.48.1.1 src 10.45.0.1")
        commands.append("ip route add default via fd00:48:1::1 src fd00:45::1")
        self.run("ue", ["sh", "-e", "-c", "\n".join(commands)])


def _sysctl(name: str, value: str) -> None:
    path = Path("/proc/sys") / name.replace(".", "/")
    path.write_text(value)
