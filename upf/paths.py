"""The fast path's table of where each UE is: kept as the router's routes to the UEs are.

The router's routes decide, and whoever changes them: an operator, a routing daemon, a handover.
This follows within a millisecond or so; without a process to follow them the table stays as it is.
"""

from collections.abc import Iterable

from upf.config import GateConfig
from upf.fastpath import NUMBER, FastPath, Ports, encode_hop, ue_numbers
from upf.routes import Address, Network, Routes

NO_WAY = encode_hop(0, b"")


class Paths:
    """Keeps the fast path's `ues`."""

    def __init__(
        self, netns_path: str, config: GateConfig, ports: Ports, fast_path: FastPath
    ) -> None:
        """Look the routes to all UEs up; what an earlier process has found may be old."""
        self._n3 = {ports.index[name] for name in config.n3_interfaces}
        self._ues = tuple(dict.fromkeys(one.address for one in config.attachments))
        self._is_ue = frozenset(self._ues)
        self._numbers = ue_numbers(config)
        self._known: dict[Address, bytes] = {}
        self._table = fast_path.ues
        self._routes = Routes(netns_path)
        self._refresh(self._ues)

    def close(self) -> None:
        """Stop following. What is known stays."""
        self._routes.close()

    def fileno(self) -> int:
        """What to wait on before `follow`."""
        return self._routes.fileno()

    def follow(self) -> None:
        """Take in every change of routes so far. Raises OSError."""
        changed = self._routes.changed()
        if changed is None:
            self._refresh(self._ues)
        elif changed:
            self._refresh(self._within(changed))

    def _within(self, networks: Iterable[Network]) -> tuple[Address, ...]:
        found: dict[Address, None] = {}
        wide: list[Network] = []
        for network in networks:
            if network.prefixlen < network.max_prefixlen:
                wide.append(network)
            elif network.network_address in self._is_ue:
                found[network.network_address] = None
        if wide:
            found |= dict.fromkeys(ue for ue in self._ues if any(ue in network for network in wide))
        return tuple(found)

    def _refresh(self, ues: tuple[Address, ...]) -> None:
        for ue, hop in zip(ues, self._routes.look_up(ues), strict=True):
            data = NO_WAY
            if hop is not None and hop.index in self._n3:
                data = encode_hop(hop.index, hop.neighbour)
            if data != self._known.get(ue):
                self._table.put(NUMBER.pack(self._numbers[ue.packed]), data)
                self._known[ue] = data
