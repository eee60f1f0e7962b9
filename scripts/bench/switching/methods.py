"""The ways to move a service to another anchor, each in a network of its own.

Here are those that are done in the kernel's routing; `programs` has those that run a program.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import ClassVar

from controlplane.enforcement import Binding, Flow, Install, Move
from scripts.bench.chain import LEASE_TTL_NS, QOS, edge, n6, open_gate, route
from scripts.bench.switching.network import (
    HTTP_PORT,
    SERVICE,
    SERVICE_NET,
    UE,
    Network,
    Switched,
    command,
)
from upf.features import Features

DRAIN_NS = 2_000_000_000
FIRST_TABLE = 101


class Traffic(StrEnum):
    """What goes through while the service moves."""

    DATAGRAMS = "datagrams"
    """UDP, uplink, paced."""
    REQUESTS = "requests"
    """HTTP, a connection each."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A program that a method needs."""

    program: str
    package: str  # of Debian and Ubuntu
    version: tuple[str, ...]  # the command that tells it


class Method:
    """One way to move the service. Built on the first anchor, in a network of its own."""

    name: ClassVar[str]
    tools: ClassVar[tuple[Tool, ...]] = ()
    traffic: ClassVar[tuple[Traffic, ...]] = (Traffic.DATAGRAMS, Traffic.REQUESTS)
    settings: ClassVar[str]
    """How it is used here: for the file."""
    guarantees: ClassVar[str]
    """What it has that a lease has not, and the other way round."""
    settling_s: ClassVar[float] = 0.0
    """How long a switch takes by its nature, beyond the traffic's own window."""
    resolver: ClassVar[bool] = False
    """Whether clients find the service by name, at their own resolver."""

    host: str = str(SERVICE)
    """How clients name the service."""

    def __init__(self, undo: ExitStack, features: Features) -> None:
        self.network = Network(undo)

    @classmethod
    def missing(cls) -> str:
        """Return what is to be installed for this method; empty if all is there."""
        for tool in cls.tools:
            if shutil.which(tool.program) is None:
                return f"no {tool.program}: apt-get install {tool.package}"
        return ""

    @classmethod
    def version(cls) -> str:
        """Return the version of the method's program, in its own words."""
        if not cls.tools:
            return ""
        done = subprocess.run(cls.tools[0].version, capture_output=True, text=True, check=False)
        return (done.stdout or done.stderr).partition("\n")[0].strip()

    @property
    def url(self) -> str:
        """Where requests go."""
        return f"http://{self.host}:{HTTP_PORT}/"

    def switch(self, number: int) -> Switched:
        """Move the service to an anchor (0 or 1)."""
        raise NotImplementedError


class Lease(Method):
    """The gate: `Gate.apply([Move])`, in this process as in the daemon's."""

    name = "lease"
    settings = (
        "Gate.apply([Move]) in the process that holds the gate, as the daemon does; the old anchor "
        "drains for 2 s; one live lease"
    )
    guarantees = (
        "gated: without a live lease nothing is steered, and the kernel ends it at its deadline; "
        "connections finish at the anchor where they began, until the drain ends"
    )

    def __init__(self, undo: ExitStack, features: Features) -> None:
        super().__init__(undo, features)
        self._gate = open_gate(self.network.router, 2, (UE,), features, undo)
        self._lease = Binding(
            lease_id="bench-1",
            epoch=1,
            flows=(Flow(UE, SERVICE),),
            anchor=edge(0),
            qos=QOS,
            expires_ns=time.monotonic_ns() + LEASE_TTL_NS,
        )
        self._gate.apply([Install(self._lease)])

    def switch(self, number: int) -> Switched:
        """Move the lease."""
        new = replace(
            self._lease,
            lease_id=f"bench-{self._lease.epoch + 1}",
            epoch=self._lease.epoch + 1,
            anchor=edge(number),
        )
        move = Move(new, self._lease, time.monotonic_ns() + DRAIN_NS)
        begin_ns = time.time_ns()
        self._gate.apply([move])
        end_ns = time.time_ns()
        self._lease = new
        return Switched(begin_ns, end_ns)


class IpRoute(Method):
    """`ip route replace` of the route to the service address."""

    name = "ip_route"
    tools: ClassVar[tuple[Tool, ...]] = (Tool("ip", "iproute2", ("ip", "-V")),)
    settings = "`ip route replace SERVICE/32 via ANCHOR`; the start of the process is part of it"
    guarantees = (
        "one route for all UEs; not gated, never ends by itself; a connection's packets go to the "
        "new anchor in mid-connection"
    )

    def __init__(self, undo: ExitStack, features: Features) -> None:
        super().__init__(undo, features)
        route(self.network.router, SERVICE_NET, self.network.gateway(0))

    def switch(self, number: int) -> Switched:
        """Replace the route."""
        gateway = self.network.gateway(number)
        argv = ("ip", "route", "replace", str(SERVICE_NET), "via", gateway, "dev", n6(number))
        return command(self.network.router, argv)


class NoSwitch(IpRoute):
    """Nothing is switched: the noise floor."""

    name = "none"
    tools = ()
    settings = "nothing is switched: the noise floor"
    guarantees = ""

    def switch(self, number: int) -> Switched:
        """Do nothing."""
        now_ns = time.time_ns()
        return Switched(now_ns, now_ns)


class Nft(Method):
    """A map from service address to mark, changed by the `nft` command in one transaction."""

    name = "nft"
    tools = (Tool("nft", "nftables", ("nft", "--version")), *IpRoute.tools)
    settings = (
        "map service address : mark, policy routing by mark; `nft -f -` with delete and add of the "
        "element in one transaction; the start of the process is part of it"
    )
    guarantees = (
        "atomic; one element for all UEs; not gated, no deadline; a connection's packets go to the "
        "new anchor in mid-connection"
    )

    def __init__(self, undo: ExitStack, features: Features) -> None:
        super().__init__(undo, features)
        router = self.network.router
        with router.links() as links:  # what has no mark goes nowhere, without an ICMP answer
            links.route("add", dst=str(SERVICE_NET), type="blackhole")
            for number in range(2):
                table = FIRST_TABLE + number
                links.route("add", dst="default", gateway=self.network.gateway(number), table=table)
                links.rule("add", fwmark=number + 1, table=table, priority=100 + number)
        command(
            router,
            ("nft", "-f", "-"),
            f"""table ip steering {{
                map anchors {{ type ipv4_addr : mark; elements = {{ {SERVICE} : 1 }} }}
                chain prerouting {{
                    type filter hook prerouting priority mangle; policy accept;
                    ip daddr {SERVICE} meta mark set ip daddr map @anchors
                }}
            }}""",
        )

    def _delete(self) -> str:
        return f"delete element ip steering anchors {{ {SERVICE} }}\n"

    def _add(self, number: int) -> str:
        return f"add element ip steering anchors {{ {SERVICE} : {number + 1} }}\n"

    def switch(self, number: int) -> Switched:
        """Delete and add the element in one transaction."""
        text = self._delete() + self._add(number)
        return command(self.network.router, ("nft", "-f", "-"), text)


class NftTwoCalls(Nft):
    """The same in two calls: the control that must lose."""

    name = "nft_two_calls"
    settings = "as nft, but delete and add are two calls of `nft`: the control, which must lose"
    guarantees = "not atomic: between the calls the service is nowhere"

    def switch(self, number: int) -> Switched:
        """Delete the element, then add the new one."""
        router = self.network.router
        first = command(router, ("nft", "-f", "-"), self._delete())
        return Switched(
            first.begin_ns, command(router, ("nft", "-f", "-"), self._add(number)).end_ns
        )


IN_KERNEL: tuple[type[Method], ...] = (NoSwitch, Lease, Nft, NftTwoCalls, IpRoute)
