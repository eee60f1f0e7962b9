"""What the kernel has counted on the elements, and the fast path's entries, of given leases."""

from collections.abc import Mapping, Sequence

from controlplane.enforcement import Binding, Usage
from upf.fastpath import FastPath, tag_of
from upf.flows import NO_LEASE, FlowState, LeaseElements, comment_of, flow_key
from upf.nft_socket import NftSocket
from upf.readback import look_up
from upf.timed import ElementName

Counts = dict[str, list[int]]  # lease id -> packets and bytes uplink, packets and bytes downlink


def read_usage(
    socket: NftSocket,
    elements: LeaseElements,
    fast_path: FastPath | None,
    flows: Mapping[bytes, FlowState],
    bindings: Sequence[Binding],
) -> dict[str, Usage]:
    """Return the usage of those leases that the gate has, by lease id. Raises BatchError, OSError.

    `flows`: what the gate holds. Without an anchor only downlink packets are counted. What a later
    lease of the same flow counts is not reported for an earlier one; a lease that drains has its
    downlink only.
    """
    counts = _by_gate(socket, elements, bindings)
    if fast_path is not None:
        _add_fast(counts, fast_path, elements, flows, bindings)
    return {
        lease_id: Usage(
            uplink_packets=sums[0],
            uplink_bytes=sums[1],
            downlink_packets=sums[2],
            downlink_bytes=sums[3],
        )
        for lease_id, sums in counts.items()
    }


def _by_gate(socket: NftSocket, elements: LeaseElements, bindings: Sequence[Binding]) -> Counts:
    names: list[ElementName] = []
    owners: list[tuple[str, bytes]] = []
    for binding in bindings:
        owner = (binding.lease_id, comment_of(binding))
        for flow in binding.flows:
            found = elements.counting(flow_key(flow), binding)
            names += found
            owners += [owner] * len(found)
    counts: Counts = {}
    for (lease_id, comment), (set_name, _), element in zip(
        owners, names, look_up(socket, names), strict=True
    ):
        if element is None or element.comment != comment:
            continue
        sums = counts.setdefault(lease_id, [0, 0, 0, 0])
        first = 0 if set_name.startswith("steer") else 2
        sums[first] += element.packets
        sums[first + 1] += element.bytes
    return counts


def _add_fast(
    counts: Counts,
    fast_path: FastPath,
    elements: LeaseElements,
    flows: Mapping[bytes, FlowState],
    bindings: Sequence[Binding],
) -> None:
    for binding in bindings:
        if binding.lease_id not in counts:
            continue
        sums, tag = counts[binding.lease_id], tag_of(comment_of(binding))
        for key in map(flow_key, binding.flows):
            names = elements.fast_counting(key, binding)
            for first, name in zip((0, 2), names, strict=False):
                entry = fast_path.get(name)
                if entry is not None and entry.tag == tag:
                    sums[first] += entry.packets
                    sums[first + 1] += entry.bytes
            state = flows.get(key, NO_LEASE)
            if state.binding == binding and state.held_until_ns and state.carried:
                sums[0] += state.carried.packets
                sums[1] += state.carried.bytes
