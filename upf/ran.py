"""QoS at a gNB: what the SMF tells it over N2 of each QoS flow (TS 23.502, 4.3.3), as kernel state.

A real gNB schedules its cell itself. An emulated one is a Linux router, and gets a table of ours:
leases' packets are marked with their class on the way to the cell (downlink) and to N3 (uplink),
the latter with their DSCP as well. Like the gate's, its elements end with their leases.

    forward   to a UE: ran_qos map --> class    from a UE: ran_qos map --> class, DSCP
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing

from pyroute2.netlink.nfnetlink.nftsocket import NFPROTO_INET

from controlplane.enforcement import Binding
from upf import expressions as nft
from upf.config import GateConfig, GnbPort
from upf.expressions import Expression
from upf.flows import FlowState, comment_of
from upf.marking import Marking, dscp_chains, encode_marking, mark, qos_map
from upf.messages import RAN_PREFIX, RAN_TABLE, Message, batch
from upf.nft_socket import NftSocket
from upf.readback import read_elements, table_comments
from upf.tables import FAMILIES, Family, Table, within
from upf.timed import ElementName, TimedElements, Wanted

VERSION = 1
FORWARD, PRIORITY_MANGLE = 2, -150
_QOS = {2 * family.address_bytes: f"{RAN_PREFIX}{family.name('qos')}" for family in FAMILIES}


def remove(gnb: GnbPort) -> None:
    """Delete the table, if it is there."""
    with closing(NftSocket(gnb.netns, in_place_renewal=False)) as handle:
        if table_comments(handle, RAN_TABLE):
            handle.commit_messages(batch([Table(NFPROTO_INET, RAN_TABLE).remove()]))


class Ran:
    """The QoS flows of one gNB."""

    def __init__(
        self,
        gnb: GnbPort,
        config: GateConfig,
        marking: Callable[[Binding], Marking],
        *,
        in_place_renewal: bool,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """Open the gNB's table, making it if it is not there.

        What an earlier process has left in it lives on; `replace` says what should be.
        """
        self._marking = marking
        self._socket = NftSocket(gnb.netns, in_place_renewal=in_place_renewal)
        self._timed = TimedElements(self._socket, in_place_renewal=in_place_renewal, clock=clock)
        messages = list(_messages(config, comment := _fingerprint(config)))
        found = table_comments(self._socket, RAN_TABLE)
        if found.get(NFPROTO_INET) != comment:
            if found:
                messages.insert(0, Table(NFPROTO_INET, RAN_TABLE).remove())
            self._socket.commit_messages(batch(messages))

    def close(self) -> None:
        """Let go of it. Elements live on until they expire."""
        self._socket.close()

    def change(
        self, before: Mapping[bytes, FlowState], after: Mapping[bytes, FlowState], now_ns: int
    ) -> None:
        """Bring flows from what `before` says to what `after` says, in one batch.

        Raises BatchError, OSError, or EnforcementError if this machine is too slow.
        """
        pairs = [
            (self._elements(key, before.get(key)), self._elements(key, state))
            for key, state in after.items()
        ]
        if any(are or should for are, should in pairs):
            self._timed.change(pairs, now_ns)

    def replace(self, flows: Mapping[bytes, FlowState]) -> None:
        """Make the kernel hold exactly these flows' elements."""
        wanted = [one for key, state in flows.items() for one in self._elements(key, state)]
        strangers: list[ElementName] = [
            (name, element.key)
            for name in _QOS.values()
            for element in read_elements(self._socket, name)
        ]
        self._timed.replace(strangers, wanted)

    def _elements(self, key: bytes, state: FlowState | None) -> list[Wanted]:
        binding = state.binding if state is not None else None
        if binding is None:
            return []
        marking = self._marking(binding)
        if not marking.class_id:
            return []
        comment, until_ns = comment_of(binding), binding.expires_ns
        return [(_QOS[len(key)], key, encode_marking(*marking), comment, until_ns, None)]


def _fingerprint(config: GateConfig) -> str:
    told = repr((VERSION, config.ue_prefixes, config.dscps))
    return f"ai-paging ran {VERSION} {hashlib.sha256(told.encode()).hexdigest()[:16]}"


def _messages(config: GateConfig, comment: str) -> Iterator[Message]:
    table = Table(NFPROTO_INET, RAN_TABLE)
    yield table.make(comment)
    for family in FAMILIES:
        yield qos_map(table, family, f"{RAN_PREFIX}{family.name('qos')}")
        yield from dscp_chains(table, family, config.dscps, RAN_PREFIX)
    yield table.chain("forward", (FORWARD, PRIORITY_MANGLE))
    for family in FAMILIES:
        ues = config.ue_prefixes[FAMILIES.index(family)]
        proto = [nft.meta_load(nft.META_NFPROTO), nft.compare(bytes([family.nfproto]))]
        for ue, peer, is_uplink in (("daddr", "saddr", False), ("saddr", "daddr", True)):
            key = [*_address(family, ue, 0), *_address(family, peer, family.address_bytes)]
            marked = mark(family, key, RAN_PREFIX, dscp=is_uplink)
            yield table.rule("forward", [*proto, *within(family, ue, ues), *marked])


def _address(family: Family, field: str, offset_bytes: int) -> Iterable[Expression]:
    offset = family.source_offset if field == "saddr" else family.destination_offset
    reg = nft.register(offset_bytes)
    return (nft.payload(nft.NETWORK_HEADER, offset, family.address_bytes, reg),)
