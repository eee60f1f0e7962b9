"""The nodes of an emulated network as experiments see them."""

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from topologies.spec import AnchorSpec, GnbSpec

_GRACE_S = 1.0


@dataclass(eq=False, kw_only=True)
class Host:
    """A node: a network namespace held by the process `pid`."""

    name: str
    pid: int
    _programs: list[subprocess.Popen[Any]] = field(default_factory=list, repr=False)

    @property
    def netns(self) -> str:
        """The path of its network namespace."""
        return f"/proc/{self.pid}/ns/net"

    def popen(self, argv: Sequence[str], **kwargs: Any) -> subprocess.Popen[Any]:
        """Start a program in the host; the keywords are those of subprocess.Popen.

        The returned process is the program itself. It ends with the network at the latest.
        """
        program = subprocess.Popen(["mnexec", "-a", str(self.pid), *argv], **kwargs)
        self._programs = [known for known in self._programs if known.poll() is None]
        self._programs.append(program)
        return program

    def stop_programs(self) -> None:
        """End what `popen` started and still runs: SIGTERM, a second later SIGKILL."""
        running = [program for program in self._programs if program.poll() is None]
        for program in running:
            program.terminate()
        for program in running:
            try:
                program.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                program.kill()
                program.wait()
        self._programs.clear()


@dataclass(eq=False, kw_only=True)
class Ue(Host):
    """User equipment. Its addresses stay the same whichever gNB serves it."""

    number: int  # from 1
    address4: IPv4Address
    address6: IPv6Address
    serving_gnb: str


@dataclass(eq=False, kw_only=True)
class Gnb(Host):
    """A gNB: the router between its cell and N3."""

    number: int  # from 1
    spec: GnbSpec
    upf_interface: str  # the UPF's end of its N3 link


@dataclass(eq=False, kw_only=True)
class Anchor(Host):
    """An AI execution anchor (AEXF). `address4` and `address6` are its own, not a service's."""

    number: int  # from 1
    spec: AnchorSpec
    address4: IPv4Address
    address6: IPv6Address
    upf_interface: str  # the UPF's end of its N6 link


@dataclass(eq=False, kw_only=True)
class Core(Host):
    """The host of the control plane."""

    address4: IPv4Address
    address6: IPv6Address
    upf_interface: str


@dataclass(eq=False, kw_only=True)
class Upf(Host):
    """The user plane function: one N3 interface per gNB, one N6 interface per anchor and core."""

    n3_interfaces: dict[str, str]  # gNB name -> interface
    n6_interfaces: dict[str, str]  # anchor name -> interface
    core_interface: str
