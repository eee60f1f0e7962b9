"""What a flow should be in the kernel: which lease it has, and the elements that calls for.

A flow is one UE and one service (or server), known here by its key: both addresses. An operation
says what a flow should be next. Everything here is pure: no I/O, and the time is an argument.
"""

from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

from controlplane.enforcement import (
    Binding,
    EndDrain,
    EnforcementError,
    Flow,
    Hold,
    Install,
    Move,
    Operation,
    Renew,
    Resume,
    Revoke,
    StaleEpochError,
)
from upf.config import GateConfig
from upf.elements import Counters
from upf.expressions import u32
from upf.fastpath import DOWN, NUMBER, UP, UPLINK, Ports, encode_down, encode_up, ue_numbers
from upf.marking import Marking, encode_marking
from upf.tables import FAMILIES, IPV4, ifname_key
from upf.timed import ElementName, Wanted

FROM_ZERO = Counters(0, 0)
UNMARKED = Marking(0, 0)

Draining = tuple[tuple[Binding, int], ...]  # a lease that was moved away from, and until when


class FlowState(NamedTuple):
    """Which lease a flow has, and which older ones still drain."""

    binding: Binding | None
    draining: Draining
    epoch: int  # the highest ever seen (fencing)
    held_until_ns: int = 0  # its uplink is parked until then
    carried: Counters | None = None  # what the fast path had counted when the hold began


NO_LEASE = FlowState(None, (), 0)


def flow_key(flow: Flow) -> bytes:
    """Return what the keys of a flow's elements begin with."""
    return flow.ue.packed + flow.service.packed


def flow_of(key: bytes) -> Flow:
    """Return the flow of a key."""
    kind = IPv4Address if len(key) == 2 * IPV4.address_bytes else IPv6Address
    return Flow(kind(key[: len(key) // 2]), kind(key[len(key) // 2 :]))


def comment_of(binding: Binding) -> bytes:
    """Return the comment of a lease's elements."""
    return f"{binding.lease_id} {binding.epoch}".encode()


def parse_comment(comment: bytes) -> tuple[str, int]:
    """Return lease id and epoch."""
    lease_id, _, epoch = comment.decode(errors="replace").rpartition(" ")
    return lease_id, int(epoch) if epoch.isdigit() else 0


def subject(operation: Operation) -> Binding:
    """Return the binding whose flows an operation is about."""
    if isinstance(operation, Move):
        return operation.new
    return operation.old if isinstance(operation, EndDrain) else operation.binding


def next_state(operation: Operation, state: FlowState, now_ns: int) -> FlowState:
    """Return what a flow should be after an operation.

    Raises StaleEpochError if a later epoch got there first.
    """
    draining, held_until_ns = state.draining, state.held_until_ns
    if draining:
        draining = tuple(drain for drain in draining if drain[1] > now_ns)
    if held_until_ns <= now_ns:
        held_until_ns = 0
    match operation:
        case Install() | Renew():
            _fence(operation.binding, state.epoch)
            held = holding(operation.binding, draining, held_until_ns)
            return held._replace(carried=state.carried) if isinstance(operation, Renew) else held
        case Revoke():
            _fence(operation.binding, state.epoch)
            return FlowState(None, (), state.epoch)
        case Move(new, old, drain_until_ns):
            _fence(new, state.epoch, exceeding=1)
            others = (drain for drain in draining if drain[0].anchor != old.anchor)
            left = (*others, (old, min(drain_until_ns, old.expires_ns)))
            return holding(new, left, held_until_ns)
        case EndDrain(old):
            left = tuple(drain for drain in draining if drain[0].lease_id != old.lease_id)
            return state._replace(draining=left, held_until_ns=held_until_ns)
        case Hold(binding, until_ns):
            _fence(binding, state.epoch)
            return state._replace(held_until_ns=min(until_ns, binding.expires_ns))
        case Resume():
            return state._replace(held_until_ns=0)


def holding(binding: Binding, draining: Draining, held_until_ns: int = 0) -> FlowState:
    """Return the state of a flow with this lease. What drains at its own anchor is superseded."""
    if draining:
        draining = tuple(drain for drain in draining if drain[0].anchor != binding.anchor)
    if held_until_ns:
        held_until_ns = min(held_until_ns, binding.expires_ns)
    return FlowState(binding, draining, binding.epoch, held_until_ns)


def _fence(binding: Binding, epoch: int, exceeding: int = 0) -> None:
    if binding.epoch < epoch + exceeding:
        raise StaleEpochError(
            f"lease {binding.lease_id} has epoch {binding.epoch}; the gate is at {epoch}"
        )


class _Place(NamedTuple):
    """Where an anchor is, as keys and data of elements hold it."""

    mark: bytes
    port: bytes  # interface, by name
    device: bytes  # that interface, by index; 0: there is no fast path
    addresses: dict[int, bytes]  # length of a flow's key -> the anchor's own address


class LeaseElements:
    """Knows which elements of the gate a lease calls for, in one configuration."""

    def __init__(
        self,
        config: GateConfig,
        class_of: Callable[[Binding], int],
        ports: Ports | None = None,
    ) -> None:
        """`class_of`: the tc class of a lease; `ports`: the interfaces, if there is a fast path."""
        self._class_of = class_of
        self._ue_numbers = ue_numbers(config) if ports else {}  # whom the fast path knows
        self._anchors: dict[str, _Place] = {}
        for anchor in config.anchors:
            self._anchors[anchor.name] = _Place(
                u32(config.mark(anchor.name)),
                ifname_key(anchor.interface),
                NUMBER.pack(ports.index[anchor.interface] if ports else 0),
                {
                    2 * len(address.packed): address.packed
                    for address in (anchor.address4, anchor.address6)
                },
            )
        self._sets = {  # length of a flow's key -> names of the sets of its family
            2 * family.address_bytes: tuple(
                family.name(stem) for stem in ("steer", "return", "qos", "drain", "hold", UP, DOWN)
            )
            for family in FAMILIES
        }
        self._queued = config.queue is not None

    def check(self, operation: Operation) -> None:
        """Raise EnforcementError if there are no elements that would do an operation."""
        match operation:
            case Install() | Renew():
                self._check_anchor(operation.binding)
            case Move(new, old):
                if new.anchor is None or old.anchor is None:
                    raise EnforcementError(
                        f"leases {old.lease_id}, {new.lease_id}: without anchors nothing moves"
                    )
                self._check_anchor(new)
                self._check_anchor(old)
            case Hold(binding):
                if binding.anchor is None or not self._queued:
                    raise EnforcementError(f"lease {binding.lease_id}: nothing here can be held")

    def _check_anchor(self, binding: Binding) -> None:
        if binding.anchor is not None and binding.anchor not in self._anchors:
            raise EnforcementError(f"the gate knows no anchor named {binding.anchor}")

    def of(self, key: bytes, state: FlowState) -> list[Wanted]:
        """Return the gate's elements of a flow, given its key; no two have the same name."""
        steer, back, qos, drain, hold, _, _ = self._sets[len(key)]
        elements: list[Wanted] = []
        binding = state.binding
        if binding is not None:
            if state.held_until_ns:
                elements.append((hold, key, b"", b"", state.held_until_ns, None))
            comment, until_ns = comment_of(binding), binding.expires_ns
            class_id, dscp = self._class_of(binding), binding.qos.dscp
            if binding.anchor is None:
                # The one element that says that there is such a lease, so it counts.
                data = encode_marking(class_id, dscp)
                elements.append((qos, key, data, comment, until_ns, FROM_ZERO))
            else:
                place = self._anchors[binding.anchor]
                elements.append((steer, key, place.mark, comment, until_ns, None))
                elements.append((back, key + place.port, b"", comment, until_ns, None))
                if class_id:
                    data = encode_marking(class_id, dscp)
                    elements.append((qos, key, data, comment, until_ns, None))
        if not state.draining:
            return elements
        named: dict[ElementName, Wanted] = {}
        for old, until_ns in state.draining:
            assert old.anchor is not None  # `check` lets no other move
            comment, place = comment_of(old), self._anchors[old.anchor]
            for name in ((back, key + place.port), (drain, key + place.mark)):
                named[name] = (*name, b"", comment, until_ns, None)
        named |= {wanted[:2]: wanted for wanted in elements}  # anchors may share an interface
        return list(named.values())

    def fast(self, key: bytes, state: FlowState) -> list[Wanted]:
        """Return the fast path's entries of a flow; no two have the same name."""
        binding, half = state.binding, len(key) // 2
        ue = self._ue_numbers.get(key[:half])
        if ue is None:
            return []
        up, down = self._sets[len(key)][5:]
        answer = key[half:] + key[:half]  # as packets have it
        # Of one flow the packets of all anchors are marked alike.
        data = encode_down(ue, *(UNMARKED if binding is None else self.marking(binding)))
        entries: list[Wanted] = []
        live_device = b""
        if binding is not None and binding.anchor is not None:
            place, comment = self._anchors[binding.anchor], comment_of(binding)
            live_device, until_ns = place.device, binding.expires_ns
            entries.append((down, answer + live_device, data, comment, until_ns, None))
            if not state.held_until_ns:  # what is held must not get past the queue
                out = encode_up(ue, live_device, place.addresses[len(key)])
                entries.append((up, key + UPLINK, out, comment, until_ns, state.carried))
        if not state.draining:
            return entries
        drains: dict[bytes, Wanted] = {}  # anchors may share an interface
        for old, until_ns in state.draining:
            assert old.anchor is not None
            device = self._anchors[old.anchor].device
            if device != live_device:
                drains[device] = (down, answer + device, data, comment_of(old), until_ns, None)
        return [*entries, *drains.values()]

    def hold(self, key: bytes) -> str:
        """Return the name of the set that holds a flow's uplink."""
        return self._sets[len(key)][4]

    def fast_uplink(self, key: bytes) -> ElementName:
        """Return the name of the entry that lets a flow's uplink past the IP stack."""
        return (self._sets[len(key)][5], key + UPLINK)

    def marking(self, binding: Binding) -> Marking:
        """Return how a lease's packets are marked."""
        return Marking(self._class_of(binding), binding.qos.dscp)

    def counting(self, key: bytes, binding: Binding) -> tuple[ElementName, ...]:
        """Return the names of the gate's elements that count a lease's packets."""
        steer, back, qos, *_ = self._sets[len(key)]
        if binding.anchor is None:
            return ((qos, key),)
        place = self._anchors.get(binding.anchor)
        return () if place is None else ((steer, key), (back, key + place.port))

    def fast_counting(self, key: bytes, binding: Binding) -> tuple[ElementName, ...]:
        """Return the names of the fast path's entries that count a lease's packets."""
        half = len(key) // 2
        place = self._anchors.get(binding.anchor or "")
        if place is None or key[:half] not in self._ue_numbers:
            return ()
        up, down = self._sets[len(key)][5:]
        return ((up, key + UPLINK), (down, key[half:] + key[:half] + place.device))
