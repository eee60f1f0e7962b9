"""Moving a service with programs that people run for it: Open vSwitch, HAProxy, DNS.

Each program is started in a namespace of the network, with its files in a folder of its own, and
used as its documentation says. They end with `undo`, and with this process's PID namespace.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from scripts.bench.chain import N3, N3_LINK, RADIO, make_local, n6
from scripts.bench.switching.methods import Method, Tool, Traffic
from scripts.bench.switching.network import (
    HTTP_PORT,
    SERVICE,
    SERVICE_NET,
    UE,
    Network,
    Switched,
    command,
)
from scripts.errors import UserError
from upf.features import Features
from upf.netns import Namespace

START_TIMEOUT_S = 10
END_TIMEOUT_S = 5


def start(
    undo: ExitStack,
    namespace: Namespace,
    argv: Sequence[str],
    folder: Path,
    ready: Callable[[], bool],
    environment: dict[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a program in a namespace and wait until it is `ready`; UserError if it is not."""
    log = folder / f"{argv[0]}.log"
    with log.open("ab") as out:
        process = namespace.run(
            lambda: subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env={**os.environ, **(environment or {})},
            )
        )
    undo.callback(_end, process)
    until = time.monotonic() + START_TIMEOUT_S
    while not ready():
        if process.poll() is not None or time.monotonic() > until:
            words = log.read_text(errors="replace").strip()[-1000:]
            raise UserError(f"{argv[0]} did not start: {words}")
        time.sleep(0.01)
    return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _folder(undo: ExitStack) -> Path:
    return Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="switch-")))


class OpenVSwitch(Method):
    """A flow of Open vSwitch's userspace datapath, changed by `ovs-ofctl mod-flows`."""

    name = "openvswitch"
    tools = tuple(
        Tool(program, "openvswitch-switch", ("ovs-vswitchd", "--version"))
        for program in ("ovs-vswitchd", "ovsdb-server", "ovsdb-tool", "ovs-vsctl", "ovs-ofctl")
    )
    settings = (
        "bridge with datapath_type=netdev (userspace, not DPDK) on the same veth links, fail_mode "
        "secure; one flow a direction that rewrites the Ethernet addresses; `ovs-ofctl mod-flows` "
        "replaces the uplink's actions; the start of the process is part of it"
    )
    guarantees = (
        "any match OpenFlow has; flows may have hard timeouts (whole seconds); not gated by a "
        "lease; a connection's packets go to the new anchor in mid-connection"
    )

    def __init__(self, undo: ExitStack, _features: Features) -> None:
        # The kernel of the router answers ARP, and forwards nothing: that is up to the switch.
        self.network = Network(undo, forwards=False)
        folder = _folder(undo)
        router = self.network.router
        database, db_socket = folder / "conf.db", f"unix:{folder}/db.sock"
        self._bridge = f"unix:{folder}/br0.mgmt"
        places = {
            name: str(folder)
            for name in ("OVS_RUNDIR", "OVS_DBDIR", "OVS_LOGDIR", "OVS_SYSCONFDIR")
        }
        schema = "/usr/share/openvswitch/vswitch.ovsschema"
        command(router, ("ovsdb-tool", "create", str(database), schema))
        server = (
            "ovsdb-server",
            str(database),
            f"--remote=p{db_socket}",
            f"--unixctl={folder}/ovsdb.ctl",
        )
        start(undo, router, server, folder, (folder / "db.sock").exists, places)
        control = ("ovs-vsctl", f"--db={db_socket}", "--timeout=10")
        command(router, (*control, "--no-wait", "init"))
        switchd = ("ovs-vswitchd", db_socket, f"--unixctl={folder}/switchd.ctl")
        start(undo, router, switchd, folder, (folder / "switchd.ctl").exists, places)
        ports = (N3, n6(0), n6(1))
        add = [word for port in ports for word in ("--", "add-port", "br0", port)]
        bridge = ("--", "set", "bridge", "br0", "datapath_type=netdev", "fail_mode=secure")
        command(router, (*control, "add-br", "br0", *bridge, *add))
        self._own = {port: _ethernet_address(router, port) for port in ports}
        self._anchors = [
            _ethernet_address(anchor, n6(number))
            for number, anchor in enumerate(self.network.anchors)
        ]
        self._flow("add-flow", self._uplink(0))
        ue = _ethernet_address(self.network.ue, RADIO)
        for number in range(2):
            match = f"priority=10,in_port={n6(number)},ip,nw_dst={UE}"
            self._flow("add-flow", f"{match},actions={_rewrite(self._own[N3], ue)},output:{N3}")

    def _uplink(self, number: int) -> str:
        port = n6(number)
        rewrite = _rewrite(self._own[port], self._anchors[number])
        return f"in_port={N3},ip,nw_dst={SERVICE},actions={rewrite},output:{port}"

    def _flow(self, what: str, flow: str) -> Switched:
        return command(self.network.router, ("ovs-ofctl", what, self._bridge, flow))

    def switch(self, number: int) -> Switched:
        """Replace the actions of the uplink's flow."""
        return self._flow("mod-flows", self._uplink(number))


def _rewrite(source: str, destination: str) -> str:
    return f"mod_dl_src:{source},mod_dl_dst:{destination}"


def _ethernet_address(namespace: Namespace, interface: str) -> str:
    with namespace.links() as links:
        link = links.get_links(links.link_lookup(ifname=interface)[0])[0]
        return str(link.get_attr("IFLA_ADDRESS"))


class Haproxy(Method):
    """A reverse proxy on the router whose server is changed over its runtime API."""

    name = "haproxy"
    tools = (Tool("haproxy", "haproxy", ("haproxy", "-v")),)
    traffic = (Traffic.REQUESTS,)
    settings = (
        "mode http, two servers, the second disabled; runtime API: `set server NEW state ready; "
        "set server OLD state maint`; it does not proxy UDP"
    )
    guarantees = (
        "retries, health checks, any balancing; requests under way finish at the old server; the "
        "anchor sees the proxy's address, not the UE's; TCP only; not gated by a lease"
    )

    def __init__(self, undo: ExitStack, features: Features) -> None:
        super().__init__(undo, features)
        folder = _folder(undo)
        router = self.network.router
        make_local(router, [SERVICE_NET])
        self._socket = folder / "admin.sock"
        servers = "\n".join(
            f"  server anchor{number} {self.network.gateway(number)}:{HTTP_PORT}"
            + (" disabled" if number else "")
            for number in range(2)
        )
        settings = folder / "haproxy.cfg"
        settings.write_text(
            f"""global
  stats socket {self._socket} mode 600 level admin
defaults
  mode http
  timeout connect 2s
  timeout client 10s
  timeout server 10s
frontend service
  bind {SERVICE}:{HTTP_PORT}
  default_backend anchors
backend anchors
{servers}
"""
        )
        argv = ("haproxy", "-db", "-f", str(settings))
        start(undo, router, argv, folder, self._socket.exists)

    def switch(self, number: int) -> Switched:
        """Make the new server ready, then take the old one out."""
        order = (
            f"set server anchors/anchor{number} state ready; "
            f"set server anchors/anchor{1 - number} state maint\n"
        )
        begin_ns = time.time_ns()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as api:
            api.connect(str(self._socket))
            api.sendall(order.encode())
            answer = b"".join(iter(lambda: api.recv(4096), b""))
        end_ns = time.time_ns()
        if answer.strip():
            raise UserError(f"haproxy: {answer.decode(errors='replace').strip()}")
        return Switched(begin_ns, end_ns)


class Dns(Method):
    """A name whose address changes; clients resolve it anew when its TTL is over."""

    name = "dns"
    tools = (Tool("dnsmasq", "dnsmasq-base", ("dnsmasq", "--version")),)
    traffic = (Traffic.REQUESTS,)
    settings = (
        "dnsmasq as the name's server on the router (--addn-hosts, --local-ttl=1, SIGHUP after the "
        "change) and as the UE's caching resolver; the client resolves for each connection, by "
        "getaddrinfo; both anchors go on serving"
    )
    guarantees = (
        "needs nothing in the network; every client moves when its resolver does; connections stay "
        "where they began; a datagram flow that does not resolve anew never moves; not gated"
    )
    settling_s = 1.5
    resolver = True
    host = "service.bench"

    def __init__(self, undo: ExitStack, features: Features) -> None:
        super().__init__(undo, features)
        folder = _folder(undo)
        for number in range(2):
            self.network.route_from_ue(self.network.gateway(number))
        self._hosts = folder / "hosts"
        self._write(0)
        address = N3_LINK[0][1].split("/")[0]
        common = ["dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-hosts"]
        common += ["--no-resolv", "--bind-interfaces", "--user=root", "--pid-file"]
        own = [f"--addn-hosts={self._hosts}", "--local-ttl=1", "--local=/bench/"]
        argv = [*common, f"--listen-address={address}", *own]
        router, ue = self.network.router, self.network.ue
        self._server = start(undo, router, argv, folder, lambda: _answers(router, address))
        argv = [*common, "--listen-address=127.0.0.1", f"--server={address}"]
        start(undo, ue, argv, folder, lambda: _answers(ue, "127.0.0.1"))

    def _write(self, number: int) -> None:
        new = self._hosts.with_suffix(".new")
        new.write_text(f"{self.network.gateway(number)} {self.host}\n")
        new.rename(self._hosts)

    def switch(self, number: int) -> Switched:
        """Change the name's address at its server."""
        begin_ns = time.time_ns()
        self._write(number)
        self._server.send_signal(signal.SIGHUP)
        return Switched(begin_ns, time.time_ns())


def _answers(namespace: Namespace, address: str) -> bool:
    """Tell whether a DNS server takes TCP connections there."""

    def connect() -> bool:
        try:
            socket.create_connection((address, 53), timeout=1).close()
        except OSError:
            return False
        return True

    return namespace.run(connect)


PROGRAMS: tuple[type[Method], ...] = (OpenVSwitch, Haproxy, Dns)
