"""Mininet, trimmed: its Mininet, Host and Link classes, no controller, switches or side effects.

Mininet configures interfaces by typing commands into a shell per host. Here a link is one netlink
message, and everything else is set (and read back) by `topologies.stack`.
"""

import shutil
from typing import Any

# Mininet imports distutils, which Python 3.12 dropped; setuptools supplies it when imported first.
import setuptools  # type: ignore[import-untyped]  # noqa: F401
from mininet.link import Intf, Link
from mininet.net import Mininet
from mininet.node import Host

from topologies.errors import TopologyError
from topologies.stack import Stack


class Node(Host):  # type: ignore[misc]
    """A Mininet host with its network stack."""

    def __init__(self, name: str, **params: Any) -> None:
        super().__init__(name, **params)
        self.stack = Stack(name, f"/proc/{self.pid}/ns/net")

    def terminate(self) -> None:
        """Close the netlink socket, then end the host's shell."""
        self.stack.close()
        super().terminate()


class _Interface(Intf):  # type: ignore[misc]
    """Knows its name. `Stack` configures it; the kernel deletes it with its namespace."""

    def config(self, **_params: Any) -> dict[str, Any]:
        return {}

    def delete(self) -> None:
        self.node.delIntf(self)
        self.link = None


class _Veth(Link):  # type: ignore[misc]
    """A veth pair made in place by one netlink message."""

    @classmethod
    def makeIntfPair(
        cls,
        name1: str,
        name2: str,
        mac1: str,
        mac2: str,
        node1: Node,
        node2: Node,
        deleteIntfs: bool = False,
    ) -> None:
        node1.stack.add_veth(name1, mac1, name2, mac2, node2.stack)


class Emulation:
    """A set of Mininet hosts and links."""

    def __init__(self) -> None:
        if shutil.which("mnexec") is None:
            raise TopologyError("mnexec is missing: install the package 'mininet' (apt)")
        Mininet.inited = True  # else the first Mininet object changes sysctls of the whole machine
        self._net = Mininet(controller=None, host=Node, link=_Veth, intf=_Interface, build=False)

    def add_node(self, name: str) -> Node:
        """Start a host: a shell in a network namespace of its own."""
        node: Node = self._net.addHost(name)
        return node

    def add_link(self, node1: Node, name1: str, node2: Node, name2: str, **macs: str) -> None:
        """Connect two nodes through interfaces of the given names (`addr1=`, `addr2=`: MACs)."""
        self._net.addLink(node1, node2, intfName1=name1, intfName2=name2, **macs)

    def stop(self) -> None:
        """End every host, and with them all links."""
        self._net.stop()
