"""The gate: lease-gated steering of one user plane function, enforced by its kernel.

For each flow (UE, service) the gate knows which elements its lease calls for. An operation says
what the flow should be next; the difference is sent as one atomic batch. Every element carries its
lease's id and epoch, and a timeout that ends with the lease, whatever becomes of this process.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address

from controlplane.enforcement import (
    Binding,
    EndDrain,
    Enforced,
    EnforcementError,
    Flow,
    Install,
    Move,
    Operation,
    Reconciliation,
    Renew,
    Revoke,
    StaleEpochError,
    Usage,
)
from upf.config import GateConfig
from upf.elements import Add, Counters, Delete
from upf.expressions import u32
from upf.nft_socket import BatchError, NftSocket
from upf.readback import Element, drop_counters, read_element, read_elements, table_comment
from upf.schema import FAMILIES, Schema, ifname_key

NS_PER_MS = 1_000_000
# A timeout counts from when the kernel handles the batch, at most this long after it was computed
# (checked each time); it is shortened by as much, so that no element outlives its lease.
GUARD_MS = 1
ELEMENTS_PER_GUARD_MS = 50  # and a large batch takes longer
MAX_TRIES = 12
MAX_FLOWS = 1_000  # in a batch of a reconciliation
# A kernel timeout this close to what the journal says is the same deadline.
SAME_DEADLINE_MS = 20

ElementName = tuple[str, bytes]  # set, key


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What an element should be."""

    data: bytes
    comment: bytes
    deadline_ns: int


@dataclass(frozen=True, slots=True)
class _FlowState:
    """Which lease a flow has, and which older ones still drain: (binding, until)."""

    binding: Binding | None
    draining: tuple[tuple[Binding, int], ...]
    epoch: int  # the highest ever seen (fencing)


_NO_LEASE = _FlowState(None, (), 0)


@dataclass(frozen=True, slots=True)
class _Change:
    """An element to send; `replaces`: delete what is there first, and count on from `counters`."""

    name: ElementName
    wanted: _Wanted
    replaces: bool
    counters: Counters | None = None


class Gate:
    """Implements `controlplane.enforcement.Enforcer` on nftables."""

    def __init__(
        self,
        netns_path: str,
        config: GateConfig,
        *,
        in_place_renewal: bool,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """Open the gate's table in a namespace, making it if it is not there.

        A table made by the same version for the same configuration is adopted with its live
        leases. Any other of that name is replaced: its leases close, and `reconcile` opens again
        what the journal knows. `in_place_renewal`: whether adding an element that exists renews
        its timeout (Linux 6.12 and later); otherwise it is deleted and added in one batch.
        """
        self._config = config
        self._in_place_renewal = in_place_renewal
        self._clock = clock
        self._socket = NftSocket(netns_path, in_place_renewal=in_place_renewal)
        self._flows: dict[Flow, _FlowState] = {}
        self._anchors = {  # name -> mark and interface, as keys hold them
            anchor.name: (u32(config.mark(anchor.name)), ifname_key(anchor.interface))
            for anchor in config.anchors
        }
        schema = Schema(config)
        found = table_comment(self._socket)
        if found == schema.fingerprint():
            self._adopt()
        else:
            self._socket.commit_messages(schema.batch(replace=found is not None))

    def close(self) -> None:
        """Let go of the gate. Leases live on in the kernel until they expire."""
        self._socket.close()

    # Enforcer

    def apply(self, operations: Sequence[Operation]) -> None:
        """Apply all operations in one atomic batch (see Enforcer)."""
        states: dict[Flow, _FlowState] = {}
        for operation in operations:
            states |= dict(self._next_states(operation, states))
        self._commit(states)

    def enforced(self) -> list[Enforced]:
        """Read every live steering element back, with its lease's usage in both directions."""
        entries = []
        for family in FAMILIES:
            answered: dict[tuple[bytes, bytes], Element] = {}
            for element in read_elements(self._socket, family.name("return")):
                answered[element.key[: 2 * family.address_bytes], element.comment] = element
            for element in read_elements(self._socket, family.name("steer")):
                downlink = answered.get((element.key, element.comment))
                entries.append(self._enforced(element, downlink, family.address_bytes))
        return entries

    def reconcile(self, live: Iterable[Binding]) -> Reconciliation:
        """Make the kernel hold exactly these bindings, with the time each has left."""
        held = {(entry.flow, entry.lease_id): entry for entry in self.enforced()}
        adopted: set[str] = set()
        installed: set[str] = set()
        states: dict[Flow, _FlowState] = {}
        known: set[Flow] = set()
        now = self._clock()
        for binding in live:
            for flow in binding.flows:
                known.add(flow)
                entry = held.get((flow, binding.lease_id))
                left_ms = (binding.expires_ns - now) // NS_PER_MS
                same = (
                    entry is not None
                    and (entry.anchor, entry.epoch) == (binding.anchor, binding.epoch)
                    and abs(entry.remaining_ms - left_ms) <= SAME_DEADLINE_MS
                )
                current = self._flows.get(flow, _NO_LEASE)
                state = _FlowState(binding, current.draining, max(binding.epoch, current.epoch))
                if same:
                    self._flows[flow] = state
                    adopted.add(binding.lease_id)
                else:
                    states[flow] = state
                    installed.add(binding.lease_id)
        strangers = {entry.lease_id for (flow, _), entry in held.items() if flow not in known}
        for flow, state in self._flows.items():
            if flow not in known and (state.binding or state.draining):
                states[flow] = _FlowState(None, (), state.epoch)
        flows = list(states)
        for start in range(0, len(flows), MAX_FLOWS):
            self._commit({flow: states[flow] for flow in flows[start : start + MAX_FLOWS]})
        return Reconciliation(
            adopted=tuple(sorted(adopted - installed)),
            installed=tuple(sorted(installed)),
            removed=tuple(sorted(strangers)),
        )

    def drops(self) -> dict[str, int]:
        """Packets dropped so far, by reason."""
        return drop_counters(self._socket)

    # From operations to flow states

    def _next_states(
        self, operation: Operation, pending: dict[Flow, _FlowState]
    ) -> Iterator[tuple[Flow, _FlowState]]:
        binding = operation.old if isinstance(operation, EndDrain) else _subject(operation)
        for flow in binding.flows:
            state = pending.get(flow) or self._flows.get(flow, _NO_LEASE)
            yield flow, self._next_state(operation, state)

    def _next_state(self, operation: Operation, state: _FlowState) -> _FlowState:
        match operation:
            case Install(new):
                self._fence(new, state, at_least=state.epoch)
                self._check(new)
                return _FlowState(new, state.draining, new.epoch)
            case Move(new, old, drain_until_ns):
                self._fence(new, state, at_least=state.epoch + 1)
                self._check(new)
                until = min(drain_until_ns, old.expires_ns)
                draining = tuple(
                    (binding, end)
                    for binding, end in state.draining
                    if binding.anchor not in (old.anchor, new.anchor) and end > self._clock()
                )
                if old.anchor != new.anchor:
                    draining += ((old, until),)
                return _FlowState(new, draining, new.epoch)
            case Renew(new):
                self._fence(new, state, at_least=state.epoch)
                return replace(state, binding=new)
            case Revoke(old):
                self._fence(old, state, at_least=state.epoch)
                return _FlowState(None, (), state.epoch)
            case EndDrain(old):
                draining = tuple(
                    (binding, end)
                    for binding, end in state.draining
                    if binding.lease_id != old.lease_id
                )
                return replace(state, draining=draining)

    def _fence(self, binding: Binding, state: _FlowState, *, at_least: int) -> None:
        if binding.epoch < at_least:
            raise StaleEpochError(
                f"lease {binding.lease_id} has epoch {binding.epoch}; the gate is at {state.epoch}"
            )

    def _check(self, binding: Binding) -> None:
        if binding.anchor not in self._anchors:
            raise EnforcementError(f"the gate knows no anchor named {binding.anchor}")
        if binding.expires_ns - self._clock() <= GUARD_MS * NS_PER_MS:
            raise EnforcementError(f"lease {binding.lease_id} is over before the gate could open")

    # From flow states to elements

    def _elements(self, flow: Flow, state: _FlowState) -> dict[ElementName, _Wanted]:
        version = flow.ue.version
        pair = flow.ue.packed + flow.service.packed
        elements: dict[ElementName, _Wanted] = {}
        for binding, until in state.draining:
            comment, (mark, port) = _comment(binding), self._anchors[binding.anchor]
            elements[f"return{version}", pair + port] = _Wanted(b"", comment, until)
            pinned = (f"drain{version}", pair + mark)
            elements[pinned] = _Wanted(b"", comment, until)
        if state.binding is not None:
            binding = state.binding
            comment, until = _comment(binding), binding.expires_ns
            mark, port = self._anchors[binding.anchor]
            elements[f"steer{version}", pair] = _Wanted(mark, comment, until)
            elements[f"return{version}", pair + port] = _Wanted(b"", comment, until)
            class_id = self._config.qos_classes.get(binding.qos_profile)
            if class_id is not None:
                elements[f"qos{version}", pair] = _Wanted(u32(class_id), comment, until)
        return elements

    def _commit(self, states: dict[Flow, _FlowState]) -> None:
        """Send the difference between what is and what should be as one batch."""
        now = self._clock()
        gone: list[ElementName] = []
        changes: list[_Change] = []
        for flow, state in states.items():
            before = self._elements(flow, self._flows.get(flow, _NO_LEASE))
            before = {name: is_ for name, is_ in before.items() if is_.deadline_ns > now}
            after = self._elements(flow, state)
            gone += before.keys() - after.keys()
            changes += [
                self._change(name, before.get(name), wanted)
                for name, wanted in after.items()
                if before.get(name) != wanted
            ]
        try:
            self._send(gone, changes)
        except (BatchError, OSError) as error:
            raise EnforcementError(str(error)) from error
        self._flows.update(states)

    def _change(self, name: ElementName, current: _Wanted | None, wanted: _Wanted) -> _Change:
        """Decide how an element becomes what is wanted; `current`: what it is, if it lives."""
        if current is None:
            return _Change(name, wanted, replaces=False)
        if (current.data, current.comment) != (wanted.data, wanted.comment):
            return _Change(name, wanted, replaces=True)
        if self._in_place_renewal:
            return _Change(name, wanted, replaces=False)
        found = read_element(self._socket, *name)
        counters = Counters(found.packets, found.bytes) if found and found.counted else None
        return _Change(name, wanted, replaces=True, counters=counters)

    def _send(self, gone: list[ElementName], changes: list[_Change]) -> None:
        """Send one batch. If it began to count too late to end in time, correct it at once."""
        changes.sort(key=lambda change: change.name[0])  # neighbours of one set share a request
        least_ms = GUARD_MS + len(changes) // ELEMENTS_PER_GUARD_MS
        for doublings in range(MAX_TRIES):
            guard_ms = least_ms << doublings
            computed_ns = self._clock()
            deletes = [Delete(*name) for name in gone]
            adds = []
            for change in changes:
                name, wanted = change.name, change.wanted
                timeout_ms = (wanted.deadline_ns - computed_ns) // NS_PER_MS - guard_ms
                if change.replaces or timeout_ms <= 0:
                    deletes.append(Delete(*name))
                if timeout_ms > 0:
                    adds.append(
                        Add(*name, timeout_ms, wanted.data, wanted.comment, change.counters)
                    )
            self._socket.commit([*deletes, *adds])
            if not changes or self._clock() - computed_ns <= guard_ms * NS_PER_MS:
                return
            gone = []
            changes = [self._change(c.name, c.wanted, c.wanted) for c in changes]
        self._socket.commit([Delete(*change.name) for change in changes])  # fail closed
        raise EnforcementError("this machine is too slow to time a lease")

    # Back from the kernel

    def _enforced(self, steer: Element, downlink: Element | None, size: int) -> Enforced:
        lease_id, epoch = _parse_comment(steer.comment)
        return Enforced(
            lease_id=lease_id,
            epoch=epoch,
            flow=Flow(ip_address(steer.key[:size]), ip_address(steer.key[size:])),
            anchor=self._config.anchor(steer.mark),
            remaining_ms=steer.remaining_ms,
            usage=Usage(
                uplink_packets=steer.packets,
                uplink_bytes=steer.bytes,
                downlink_packets=downlink.packets if downlink else 0,
                downlink_bytes=downlink.bytes if downlink else 0,
            ),
        )

    def _adopt(self) -> None:
        """Learn flows, epochs and drains from the live elements of an earlier process."""
        now = self._clock()
        ports = {ifname_key(anchor.interface): anchor.name for anchor in self._config.anchors}
        for family in FAMILIES:
            size = family.address_bytes
            found: dict[Flow, _FlowState] = {}
            for element in read_elements(self._socket, family.name("steer")):
                binding = _binding(element, size, self._config.anchor(element.mark), now)
                found[binding.flows[0]] = _FlowState(binding, (), binding.epoch)
            for element in read_elements(self._socket, family.name("return")):
                anchor = ports.get(element.key[2 * size :])
                if anchor is None:
                    continue
                binding = _binding(element, size, anchor, now)
                state = found.get(binding.flows[0], _NO_LEASE)
                if state.binding and state.binding.lease_id == binding.lease_id:
                    continue
                found[binding.flows[0]] = _FlowState(
                    state.binding,
                    (*state.draining, (binding, binding.expires_ns)),
                    max(state.epoch, binding.epoch),
                )
            self._flows.update(found)


def _binding(element: Element, size: int, anchor: str, now_ns: int) -> Binding:
    lease_id, epoch = _parse_comment(element.comment)
    return Binding(
        lease_id=lease_id,
        epoch=epoch,
        flows=(Flow(ip_address(element.key[:size]), ip_address(element.key[size : 2 * size])),),
        anchor=anchor,
        qos_profile="",
        expires_ns=now_ns + element.remaining_ms * NS_PER_MS,
    )


def _subject(operation: Install | Move | Renew | Revoke) -> Binding:
    return operation.new if isinstance(operation, Move) else operation.binding


def _comment(binding: Binding) -> bytes:
    return f"{binding.lease_id} {binding.epoch}".encode()


def _parse_comment(comment: bytes) -> tuple[str, int]:
    lease_id, _, epoch = comment.decode(errors="replace").rpartition(" ")
    return lease_id, int(epoch) if epoch.isdigit() else 0
