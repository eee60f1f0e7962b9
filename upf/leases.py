"""Leases as the kernel holds them: what the live elements of the gate say, by flow.

Elements of one lease carry the same comment. A `qos` element that counts is a lease of its own,
of QoS alone; any other belongs to the lease that steers.
"""

import sys
from collections.abc import Iterator

from controlplane.enforcement import Binding, Enforced, Usage
from upf.answers import Element
from upf.config import GateConfig
from upf.expressions import u32
from upf.fastpath import DOWN, UP
from upf.flows import NO_LEASE, FlowState, flow_of, parse_comment
from upf.nft_socket import NftSocket
from upf.readback import read_elements
from upf.tables import FAMILIES, Family, ifname_key

NS_PER_MS = 1_000_000


def enforced_leases(socket: NftSocket, config: GateConfig) -> list[Enforced]:
    """Read every live lease back, by flow, with its usage in both directions."""
    return [entry for family in FAMILIES for entry in _enforced(socket, config, family)]


def _enforced(socket: NftSocket, config: GateConfig, family: Family) -> Iterator[Enforced]:
    half = family.address_bytes
    counts: dict[tuple[bytes, bytes], list[int]] = {}  # flow and comment -> as in Usage

    def count(element: Element, flow: bytes, first: int) -> None:
        sums = counts.setdefault((flow, element.comment), [0, 0, 0, 0])
        sums[first] += element.packets
        sums[first + 1] += element.bytes

    steered = read_elements(socket, family.name("steer"))
    for element in (*steered, *read_elements(socket, family.name(UP))):
        count(element, element.key, 0)
    for element in read_elements(socket, family.name("return")):
        count(element, element.key[: 2 * half], 2)
    for element in read_elements(socket, family.name(DOWN)):
        count(element, element.key[half : 2 * half] + element.key[:half], 2)
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


def adopted_flows(socket: NftSocket, config: GateConfig, now_ns: int) -> dict[bytes, FlowState]:
    """Learn flows, epochs and drains from the live elements of an earlier process."""
    ports = {ifname_key(anchor.interface): anchor.name for anchor in config.anchors}
    profiles = {u32(class_id): name for name, class_id in config.qos_classes.items()}
    flows: dict[bytes, FlowState] = {}
    for family in FAMILIES:
        pair_bytes = 2 * family.address_bytes
        classes = {}
        for element in read_elements(socket, family.name("qos")):
            profile = profiles.get(element.data, "")
            if element.counted:
                binding = _binding(element, element.key, None, profile, now_ns)
                flows[element.key] = FlowState(binding, (), binding.epoch)
            else:
                classes[element.key, element.comment] = profile
        for element in read_elements(socket, family.name("steer")):
            anchor = config.anchor(int.from_bytes(element.data, sys.byteorder))
            profile = classes.get((element.key, element.comment), "")
            binding = _binding(element, element.key, anchor, profile, now_ns)
            flows[element.key] = FlowState(binding, (), binding.epoch)
        for element in read_elements(socket, family.name("return")):
            key, port = element.key[:pair_bytes], element.key[pair_bytes:]
            binding = _binding(element, key, ports[port], "", now_ns)
            state = flows.get(key, NO_LEASE)
            if state.binding and state.binding.lease_id == binding.lease_id:
                continue
            flows[key] = FlowState(
                state.binding,
                (*state.draining, (binding, binding.expires_ns)),
                max(state.epoch, binding.epoch),
            )
    return flows


def _binding(
    element: Element, key: bytes, anchor: str | None, qos_profile: str, now_ns: int
) -> Binding:
    lease_id, epoch = parse_comment(element.comment)
    return Binding(
        lease_id=lease_id,
        epoch=epoch,
        flows=(flow_of(key),),
        anchor=anchor,
        qos_profile=qos_profile,
        expires_ns=now_ns + element.remaining_ms * NS_PER_MS,
    )
