"""Leases as the kernel holds them: what the live elements of the gate say, by flow.

Elements of one lease carry the same comment. A `qos` element that counts is a lease of its own,
of QoS alone; any other belongs to the lease that steers.
"""

import sys
from collections.abc import Iterator
from typing import NamedTuple

from controlplane.enforcement import Binding, Enforced, QosFlow, Usage
from upf.answers import Element
from upf.config import GateConfig
from upf.fastpath import DOWN, UP, FastPath, tag_of
from upf.flows import NO_LEASE, UNMARKED, FlowState, flow_of, parse_comment
from upf.marking import Marking
from upf.nft_socket import NftSocket
from upf.qos import BEST_EFFORT, is_lease
from upf.readback import read_elements
from upf.tables import FAMILIES, Family, ifname_key

NS_PER_MS = 1_000_000


def enforced_leases(
    socket: NftSocket, config: GateConfig, fast_path: FastPath | None
) -> list[Enforced]:
    """Read every live lease back, by flow, with its usage in both directions."""
    return [entry for family in FAMILIES for entry in _enforced(socket, config, fast_path, family)]


def _enforced(
    socket: NftSocket, config: GateConfig, fast_path: FastPath | None, family: Family
) -> Iterator[Enforced]:
    half = family.address_bytes
    counts: dict[tuple[bytes, bytes], list[int]] = {}  # flow and comment -> as in Usage

    def count(element: Element, flow: bytes, first: int) -> None:
        sums = counts.setdefault((flow, element.comment), [0, 0, 0, 0])
        sums[first] += element.packets
        sums[first + 1] += element.bytes

    steered = read_elements(socket, family.name("steer"))
    for element in steered:
        count(element, element.key, 0)
    for element in read_elements(socket, family.name("return")):
        count(element, element.key[: 2 * half], 2)
    if fast_path is not None:
        by_tag = {(flow, tag_of(comment)): sums for (flow, comment), sums in counts.items()}
        for stem, first in ((UP, 0), (DOWN, 2)):
            for key, entry in fast_path.entries(family.name(stem)):
                source, destination = key[:half], key[half : 2 * half]
                flow = source + destination if stem == UP else destination + source
                sums = by_tag.get((flow, entry.tag))
                if sums is not None:
                    sums[first] += entry.packets
                    sums[first + 1] += entry.bytes
    alone = [each for each in read_elements(socket, family.name("qos")) if each.counted]
    for element in alone:
        count(element, element.key, 2)
    anchors = [config.anchor(int.from_bytes(each.data, sys.byteorder)) for each in steered]
    for element, anchor in zip((*steered, *alone), (*anchors, *[None] * len(alone)), strict=True):
        lease_id, epoch = parse_comment(element.comment)
        sums = counts[element.key, element.comment]
        yield Enforced(
            lease_id=lease_id,
            epoch=epoch,
            flow=flow_of(element.key),
            anchor=anchor,
            remaining_ms=element.remaining_ms,
            usage=Usage(
                uplink_packets=sums[0],
                uplink_bytes=sums[1],
                downlink_packets=sums[2],
                downlink_bytes=sums[3],
            ),
        )


class Adopted(NamedTuple):
    """What an earlier process left: flows by key, and classes of GBR leases by lease id."""

    flows: dict[bytes, FlowState]
    classes: dict[str, int]


def adopted_flows(socket: NftSocket, config: GateConfig, now_ns: int) -> Adopted:
    """Learn flows, epochs, drains and QoS classes from live elements."""
    ports = {ifname_key(anchor.interface): anchor.name for anchor in config.anchors}
    flows: dict[bytes, FlowState] = {}
    classes: dict[str, int] = {}
    for family in FAMILIES:
        pair_bytes = 2 * family.address_bytes
        markings: dict[tuple[bytes, bytes], Marking] = {}
        for element in read_elements(socket, family.name("qos")):
            marking = Marking.decode(element.data)
            if is_lease(marking.class_id):
                classes[parse_comment(element.comment)[0]] = marking.class_id
            if element.counted:
                binding = _binding(element, element.key, None, marking, now_ns)
                flows[element.key] = FlowState(binding, (), binding.epoch)
            else:
                markings[element.key, element.comment] = marking
        for element in read_elements(socket, family.name("steer")):
            anchor = config.anchor(int.from_bytes(element.data, sys.byteorder))
            marking = markings.get((element.key, element.comment), UNMARKED)
            binding = _binding(element, element.key, anchor, marking, now_ns)
            flows[element.key] = FlowState(binding, (), binding.epoch)
        for element in read_elements(socket, family.name("return")):
            key, port = element.key[:pair_bytes], element.key[pair_bytes:]
            binding = _binding(element, key, ports[port], UNMARKED, now_ns)
            state = flows.get(key, NO_LEASE)
            if state.binding and state.binding.lease_id == binding.lease_id:
                continue
            flows[key] = FlowState(
                state.binding,
                (*state.draining, (binding, binding.expires_ns)),
                max(state.epoch, binding.epoch),
            )
    return Adopted(flows, classes)


def _binding(
    element: Element, key: bytes, anchor: str | None, marking: Marking, now_ns: int
) -> Binding:
    lease_id, epoch = parse_comment(element.comment)
    return Binding(
        lease_id=lease_id,
        epoch=epoch,
        flows=(flow_of(key),),
        anchor=anchor,
        qos=_qos(marking),
        expires_ns=now_ns + element.remaining_ms * NS_PER_MS,
    )


def _qos(marking: Marking) -> QosFlow:
    """Return as much of a QoS flow as its marking tells; the journal knows the rest."""
    guaranteed = is_lease(marking.class_id)
    return QosFlow(
        five_qi=0 if guaranteed else marking.class_id & 0xFFFF or BEST_EFFORT,
        priority_level=0,
        guaranteed=guaranteed,
        delay_critical=False,
        dscp=marking.dscp,
    )
