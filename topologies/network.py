"""The emulated network: built from a TopologySpec, read back, and handed to experiments.

UEs, gNBs, one UPF, anchors and a core host, each a network namespace, joined by veth pairs.
Routers are plain nodes. See `topologies.addressing` for who has which address.
"""

import contextlib
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface
from types import TracebackType
from typing import Any, Self

from topologies import addressing
from topologies.build import Builder
from topologies.errors import TopologyError
from topologies.hosts import Anchor, Core, Gnb, Host, Ue, Upf
from topologies.readback import Route
from topologies.spec import TopologySpec


def _silent(_what: str) -> None:
    pass


class Network:
    """An emulated network; a context manager, to be entered once, inside an isolated run.

    `progress` is told, in a few words, what is being done. Raises TopologyError.
    """

    def __init__(self, spec: TopologySpec, progress: Callable[[str], None] = _silent) -> None:
        self.spec = spec
        self.ues: list[Ue] = []
        self.gnbs: dict[str, Gnb] = {}
        self.anchors: dict[str, Anchor] = {}
        self.upf: Upf
        self.core: Core
        self.readback: dict[str, Any] = {}
        self._progress = progress
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Self:
        try:
            self._build()
        except BaseException:
            self._undo.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._undo.close()

    @property
    def hosts(self) -> list[Host]:
        """Every node, UEs first."""
        return [*self.ues, *self.gnbs.values(), self.upf, *self.anchors.values(), self.core]

    def host(self, name: str) -> Host:
        """The node of that name. Raises TopologyError."""
        for host in self.hosts:
            if host.name == name:
                return host
        names = ", ".join(host.name for host in self.hosts)
        raise TopologyError(f"there is no host {name}; there are {names}")

    def handover(self, ue: str | Ue, gnb: str) -> None:
        """Make-before-break path switch of a UE to another gNB; both its radios stay up.

        Downlink first (the UPF's routes), then uplink (the UE's); each route is replaced in one
        step. Raises TopologyError.
        """
        moved = ue if isinstance(ue, Ue) else self._ue(ue)
        target = self._gnb(gnb)
        self._route_downlink(moved, target)
        self._route_uplink(moved, target)
        moved.serving_gnb = gnb

    def set_radio(self, ue: str | Ue, gnb: str, *, up: bool) -> None:
        """Have a radio link between a UE and a gNB, or lose it: neither end is told.

        Raises TopologyError.
        """
        moved = ue if isinstance(ue, Ue) else self._ue(ue)
        self._guards[self._gnb(gnb).name].set_radio(moved.name, up=up)

    def add_service(self, anchor: str, address4: IPv4Address, address6: IPv6Address) -> None:
        """Let the anchor answer for a service's addresses."""
        if anchor not in self.anchors:
            raise TopologyError(f"there is no anchor {anchor}")
        stack = self._nodes[anchor].stack
        stack.add_address("lo", IPv4Interface(address4))
        stack.add_address("lo", IPv6Interface(address6))

    def verify(self) -> None:
        """Read everything back into `readback`, or raise TopologyError on a mismatch."""
        self.readback = {name: node.stack.verify() for name, node in self._nodes.items()}

    def check_alive(self) -> None:
        """Raise TopologyError if a process that the network needs has died."""
        for name, node in self._nodes.items():
            if node.shell.poll() is not None:
                raise TopologyError(f"{name}: the process that holds the namespace has died")
        self._delays.check_alive()

    def measure_delays(self) -> dict[str, Any]:
        """Measure what each delayed link does: see `topologies.delay`. Up to 2 s per link."""
        return self._delays.measure()

    def delay_statistics(self) -> dict[str, Any]:
        """Frames forwarded and dropped so far by the relays, per delayed link."""
        return self._delays.statistics()

    def radio_drops(self) -> dict[str, int]:
        """Packets with a source that is not the sender's own, dropped so far, per gNB."""
        return {name: guard.drops() for name, guard in self._guards.items()}

    def _build(self) -> None:
        parts = Builder(self.spec, self._undo)
        parts.build(self._progress)
        self.ues, self.gnbs, self.anchors = parts.ues, parts.gnbs, parts.anchors
        self.upf, self.core = parts.upf, parts.core
        self._nodes, self._guards, self._delays = parts.nodes, parts.guards, parts.delays
        self._undo.callback(self._stop_programs)
        for ue in self.ues:
            self.handover(ue, ue.serving_gnb)
        self._progress("reading everything back")
        self.verify()

    def _stop_programs(self) -> None:
        for host in self.hosts:
            host.stop_programs()

    def _route_downlink(self, ue: Ue, gnb: Gnb) -> None:
        via, stack = addressing.n3_gnb(gnb.number), self._nodes["upf"].stack
        stack.set_route(Route(f"{ue.address4}/32", str(via.address4), gnb.upf_interface))
        stack.set_route(Route(f"{ue.address6}/128", str(via.address6), gnb.upf_interface))

    def _route_uplink(self, ue: Ue, gnb: Gnb) -> None:
        via, stack = addressing.cell_gnb(gnb.number), self._nodes[ue.name].stack
        radio = f"radio-{gnb.name}"
        stack.set_route(Route("0.0.0.0/0", str(via.address4), radio, str(ue.address4)))
        stack.set_route(Route("::/0", str(via.address6), radio, str(ue.address6)))

    def _ue(self, name: str) -> Ue:
        for ue in self.ues:
            if ue.name == name:
                return ue
        raise TopologyError(f"there is no UE {name}")

    def _gnb(self, name: str) -> Gnb:
        if name not in self.gnbs:
            raise TopologyError(f"there is no gNB {name}")
        return self.gnbs[name]
