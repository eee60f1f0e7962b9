"""The fast path's map of where each UE is: kept as the router's routes to the UEs are.

The router's routes decide, and whoever changes them: an operator, a routing daemon, a handover.
This follows within a millisecond or so; without a process to follow them the map stays as it is.
"""

from collections.abc import Iterable

from pyroute2.netlink.nfnetlink.nftsocket import NFT_MSG_DELSETELEM, NFT_MSG_NEWSETELEM

from upf import expressions as nft
from upf.config import GateConfig
from upf.fastpath import PATH, Ports
from upf.messages import batch, element_message, key_attribute
from upf.nft_socket import NftSocket
from upf.routes import Address, Network, Routes
from upf.tables import MOST_ELEMENTS, data_attribute


class Paths:
    """Keeps the elements of `fast_path4` and `fast_path6`."""

    def __init__(
        self,
        netns_path: str,
        config: GateConfig,
        ports: Ports,
        socket: NftSocket,
        known: dict[bytes, bytes],
    ) -> None:
        """`known`: what the kernel has (packed address -> data), from an earlier process."""
        self._n3 = {ports.index[name] for name in config.n3_interfaces}
        self._ues = tuple(dict.fromkeys(one.address for one in config.attachments))
        self._is_ue = frozenset(self._ues)
        self._known = known
        self._socket = socket
        self._routes = Routes(netns_path)
        self._refresh(self._ues)

    def close(self) -> None:
        """Stop following. The elements stay."""
        self._routes.close()

    def fileno(self) -> int:
        """What to wait on before `follow`."""
        return self._routes.fileno()

    def follow(self) -> None:
        """Take in every change of routes so far. Raises BatchError, OSError."""
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
        known = self._known
        deletes: dict[str, list[tuple[bytes, bytes]]] = {}
        adds: dict[str, list[tuple[bytes, bytes]]] = {}
        for ue, hop in zip(ues, self._routes.look_up(ues), strict=True):
            name, key, data = f"{PATH}{ue.version}", ue.packed, b""
            if hop is not None and hop.index in self._n3:
                data = nft.u32(hop.index) + hop.neighbour
            if data != known.get(key, b""):
                if key in known:
                    deletes.setdefault(name, []).append((key, b""))
                adds.setdefault(name, []).append((key, data))
        requests = []
        for kind, sets in ((NFT_MSG_DELSETELEM, deletes), (NFT_MSG_NEWSETELEM, adds)):
            for name, pairs in sets.items():
                encoded = [
                    {"attrs": [key_attribute(key), *data_attribute(data)]}
                    for key, data in pairs
                    if data or kind == NFT_MSG_DELSETELEM
                ]
                for start in range(0, len(encoded), MOST_ELEMENTS):
                    some = encoded[start : start + MOST_ELEMENTS]
                    requests.append(element_message(kind, name, some))
        if not requests:
            return
        self._socket.commit_messages(batch(requests))
        for pairs in adds.values():
            for key, data in pairs:
                if data:
                    known[key] = data
                else:
                    del known[key]
