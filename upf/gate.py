"""The gate: lease-gated steering of one user plane function, enforced by its kernel.

For each flow (UE, service) the gate knows which elements its lease calls for (`flows`). An
operation says what the flow should be next; the difference is sent as one atomic batch. Every
element carries its lease's id and epoch, and a timeout that ends with the lease, whatever becomes
of this process.
"""

import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from pyroute2.netlink.nfnetlink.nftsocket import NFPROTO_INET

from controlplane.enforcement import (
    Binding,
    Enforced,
    EnforcementError,
    Install,
    Move,
    Operation,
    Reconciliation,
    Usage,
)
from upf import fastpath
from upf.config import GateConfig, GnbPort, QosPoint
from upf.elements import Addition
from upf.fastpath import EntryChange, FastPath, FastPathError, Ports, ports, unfit
from upf.flows import (
    NO_LEASE,
    FlowState,
    LeaseElements,
    flow_key,
    holding,
    next_state,
    subject,
)
from upf.lease_classes import LeaseClasses
from upf.leases import adopted_flows, enforced_leases
from upf.messages import SIGNATURE, batch
from upf.nft_socket import BatchError, NftSocket
from upf.paths import Paths
from upf.ran import Ran
from upf.readback import drop_counters, read_elements, table_comments
from upf.schema import VERSION, Schema
from upf.tables import FAMILIES, Table
from upf.timed import GUARD_MS, NS_PER_MS, TimedElements, Wanted
from upf.usage import read_usage

log = logging.getLogger(__name__)

ElementsOf = Callable[[bytes, FlowState], list[Wanted]]

MAX_FLOWS = 1_000  # in a batch of a reconciliation
# A kernel timeout this close to what the journal says is the same deadline.
SAME_DEADLINE_MS = 20


def remove(netns_path: str) -> None:
    """Delete the gate in a namespace, if it is there: every lease closes at once."""
    fastpath.remove(netns_path)
    with contextlib.closing(NftSocket(netns_path, in_place_renewal=False)) as handle:
        if there := table_comments(handle):
            handle.commit_messages(batch([Table(family).remove() for family in there]))


class Gate:
    """The user plane on nftables; `upf.local` shows it to the control plane as an Enforcer."""

    def __init__(
        self,
        netns_path: str,
        config: GateConfig,
        *,
        in_place_renewal: bool,
        fast_path: bool = False,
        points: Sequence[QosPoint] = (),
        gnbs: Sequence[GnbPort] = (),
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """Open the gate's table in a namespace, making it if it is not there.

        A table made by the same version for the same configuration is adopted with its live
        leases. Any other of that name is replaced: its leases close, and `reconcile` opens again
        what the journal knows. `in_place_renewal`: whether adding an element that exists renews
        its timeout (Linux 6.12 and later); otherwise it is deleted and added in one batch.
        `fast_path`: leased datagrams are forwarded at ingress (`upf.fastpath`), which the kernel
        must be able to (`Features.tc_bpf`). `points`: where leases' QoS classes stand in this
        namespace (`qos.install`); `gnbs`: those that are to be told of QoS flows, whose classes
        stand at their own points. Raises EnforcementError or QosError for interfaces that are not
        there.
        """
        self._config = config
        self._clock = clock
        self._socket = NftSocket(netns_path, in_place_renewal=in_place_renewal)
        self._timed = TimedElements(self._socket, in_place_renewal=in_place_renewal, clock=clock)
        self._flows: dict[bytes, FlowState] = {}  # by flow_key
        try:
            there = ports(netns_path, config) if fast_path else None
            if there is not None and (why := unfit(config, there)):
                log.warning("there is no fast path: %s", why)
                there = None
        except FastPathError as error:
            raise EnforcementError(str(error)) from error
        self.comment = comment = fingerprint(config, there)
        self._fast: FastPath | None = None
        found = table_comments(self._socket)
        adopted = found == {NFPROTO_INET: comment}
        if adopted and there is not None:
            self._fast = FastPath.adopt(netns_path, there, comment)
            adopted = self._fast is not None
        classes: dict[str, int] = {}
        if adopted:
            self._flows, classes = adopted_flows(self._socket, config, self._clock())
            self._forget_holds()
        else:
            fastpath.remove(netns_path)
            requests = [Table(family).remove() for family in found]
            requests += Schema(config).messages(comment)
            self._socket.commit_messages(batch(requests))
            if there is not None:
                try:
                    self._fast = FastPath.make(netns_path, config, there, comment)
                except FastPathError as error:
                    raise EnforcementError(str(error)) from error
        everywhere = [*points, *(point for gnb in gnbs for point in gnb.points)]
        self._classes = LeaseClasses(everywhere, classes)
        self._elements = LeaseElements(config, self._classes.class_of, there)
        if adopted and self._fast is not None:
            flows = self._flows.items()
            self._fast.settle([one for flow in flows for one in self._elements.fast(*flow)])
        self._rans = [
            Ran(
                gnb,
                config,
                self._elements.marking,
                in_place_renewal=in_place_renewal,
                clock=clock,
            )
            for gnb in gnbs
        ]
        self.paths: Paths | None = None
        if there is not None and self._fast is not None:
            self.paths = Paths(netns_path, config, there, self._fast)

    def close(self) -> None:
        """Let go of the gate. Leases live on in the kernel until they expire."""
        if self.paths is not None:
            self.paths.close()
        if self._fast is not None:
            self._fast.close()
        for ran in self._rans:
            ran.close()
        self._classes.close()
        self._socket.close()

    # Enforcer

    def apply(self, operations: Sequence[Operation]) -> None:
        """Apply all operations in one atomic batch (see Enforcer)."""
        now = self._clock()
        held = self._flows
        states: dict[bytes, FlowState] = {}
        for operation in operations:
            binding = subject(operation)
            self._check(operation, binding, now)
            for flow in binding.flows:
                key = flow_key(flow)
                state = states.get(key) or held.get(key, NO_LEASE)
                states[key] = next_state(operation, state, now)
        self._commit(states, now)

    def enforced(self) -> list[Enforced]:
        """Read every live lease back, by flow, with its usage in both directions."""
        return enforced_leases(self._socket, self._config, self._fast)

    def usage(self, bindings: Sequence[Binding]) -> dict[str, Usage]:
        """Return what the kernel has counted so far on these leases' own elements, by lease id.

        See `read_usage`. Raises EnforcementError.
        """
        try:
            return read_usage(self._socket, self._elements, self._fast, self._flows, bindings)
        except (BatchError, OSError) as error:
            raise EnforcementError(str(error)) from error

    def reconcile(self, live: Iterable[Binding]) -> Reconciliation:
        """Make the kernel hold exactly these bindings, with the time each has left."""
        held = {(flow_key(entry.flow), entry.lease_id): entry for entry in self.enforced()}
        adopted: set[str] = set()
        installed: set[str] = set()
        states: dict[bytes, FlowState] = {}
        kept: dict[str, Binding] = {}  # that have a QoS class
        known: set[bytes] = set()
        now = self._clock()
        for binding in live:
            left_ms = (binding.expires_ns - now) // NS_PER_MS
            for key in map(flow_key, binding.flows):
                known.add(key)
                entry = held.get((key, binding.lease_id))
                same = (
                    entry is not None
                    and (entry.anchor, entry.epoch) == (binding.anchor, binding.epoch)
                    and abs(entry.remaining_ms - left_ms) <= SAME_DEADLINE_MS
                )
                current = self._flows.get(key, NO_LEASE)
                is_ = current.binding
                same = same and is_ is not None and _marked_alike(is_, binding)
                state = holding(binding, current.draining, current.held_until_ns if same else 0)
                state = state._replace(epoch=max(binding.epoch, current.epoch))
                if same:
                    self._flows[key] = state
                    adopted.add(binding.lease_id)
                    if binding.qos.guaranteed:
                        kept[binding.lease_id] = binding
                else:
                    states[key] = state
                    installed.add(binding.lease_id)
        strangers = {lease_id for key, lease_id in held if key not in known}
        for key, state in self._flows.items():
            if key not in known and (state.binding or state.draining):
                states[key] = FlowState(None, (), state.epoch)
        keys = list(states)
        for start in range(0, len(keys), MAX_FLOWS):
            some = {key: states[key] for key in keys[start : start + MAX_FLOWS]}
            self._commit(some, self._clock())
        self._classes.make(kept.values())
        for ran in self._rans:
            try:
                ran.replace(self._flows)
            except (BatchError, OSError) as error:
                raise EnforcementError(str(error)) from error
        return Reconciliation(
            adopted=tuple(sorted(adopted - installed)),
            installed=tuple(sorted(installed)),
            removed=tuple(sorted(strangers)),
        )

    def follow_routes(self) -> None:
        """Let the fast path follow changes of the routes to UEs. Raises BatchError, OSError."""
        if self.paths is not None:
            self.paths.follow()

    def drops(self) -> dict[str, int]:
        """Packets dropped so far, by reason."""
        return drop_counters(self._socket)

    # Packets that wait

    def passes(self, key: bytes) -> bool:
        """Return whether the gate lets a flow's uplink through now."""
        state = self._flows.get(key)
        if state is None or state.binding is None or state.binding.anchor is None:
            return False
        return state.held_until_ns <= self._clock() < state.binding.expires_ns

    def open_holds(self, keys: Iterable[bytes]) -> None:
        """Take the holds of these flows from the kernel, and nothing else: as soon as can be.

        `end_holds` is to follow. Raises EnforcementError.
        """
        try:
            self._socket.commit([(self._elements.hold(key), key) for key in keys])
        except (BatchError, OSError) as error:
            raise EnforcementError(str(error)) from error

    def end_holds(self, keys: Iterable[bytes]) -> None:
        """Let the uplink of these flows go past the queue again. Raises EnforcementError."""
        now, held = self._clock(), self._flows
        self._commit(
            {
                key: held[key]._replace(held_until_ns=0)
                for key in keys
                if key in held and held[key].held_until_ns
            },
            now,
        )

    def turn_away(self, stem: str, keys: Iterable[bytes], for_ms: int) -> None:
        """Let the kernel drop what these flows send without a lease: `overflow` or `refused`.

        Raises EnforcementError.
        """
        elements: list[Addition] = [
            (family.name(stem), key, for_ms, b"", b"", None)
            for key in keys
            for family in FAMILIES
            if len(key) == 2 * family.address_bytes
        ]
        try:
            self._socket.commit(elements)
        except (BatchError, OSError) as error:
            raise EnforcementError(str(error)) from error

    def _forget_holds(self) -> None:
        """Let go what an earlier process held: its packets went with it."""
        names = [family.name("hold") for family in FAMILIES]
        self._socket.commit(
            [(name, element.key) for name in names for element in read_elements(self._socket, name)]
        )

    # From flow states to elements

    def _check(self, operation: Operation, binding: Binding, now_ns: int) -> None:
        self._elements.check(operation)
        over = binding.expires_ns - now_ns <= GUARD_MS * NS_PER_MS
        if over and isinstance(operation, (Install, Move)):
            raise EnforcementError(f"lease {binding.lease_id} is over before the gate could open")

    def _commit(self, states: dict[bytes, FlowState], now_ns: int) -> None:
        """Bring flows to these states: classes, then gNBs, then the gate, each in one batch.

        Entries of the fast path that end or change go before the gate's batch, and come after it.

        Raises EnforcementError, and changes nothing in the gate.
        """
        held = self._flows
        ended: set[str] = set()
        begun: list[tuple[Binding, Binding | None]] = []
        for key, state in states.items():
            old, new = held.get(key, NO_LEASE).binding, state.binding
            if old is not None and old.qos.guaranteed:
                ended.add(old.lease_id)
            if new is not None and new.qos.guaranteed:
                begun.append((new, old))
        opened = self._classes.open(begun) if begun else []
        entries: EntryChange | None = None
        try:
            self._tell_gnbs(held, states, now_ns)
            if self._fast is not None:
                entries = self._fast.begin(self._pairs(states, self._elements.fast))
                states = self._carrying(states, entries)
            self._timed.change(self._pairs(states, self._elements.of), now_ns)
        except (BatchError, OSError, EnforcementError) as error:
            if entries is not None and not isinstance(error, EnforcementError):
                entries.undo()  # else the gate has failed closed, and is not to be gone around
            with contextlib.suppress(BatchError, OSError, EnforcementError):
                self._tell_gnbs(states, {key: held.get(key, NO_LEASE) for key in states}, now_ns)
            self._classes.forget(opened)
            raise EnforcementError(str(error)) from error
        if entries is not None:
            entries.complete()
        held.update(states)
        if ended:
            self._classes.forget(ended - {binding.lease_id for binding, _ in begun})

    def _pairs(
        self, states: Mapping[bytes, FlowState], elements_of: ElementsOf
    ) -> Iterator[tuple[list[Wanted], list[Wanted]]]:
        """Yield what flows have now, and what they should have in these states."""
        for key, state in states.items():
            current = self._flows.get(key, NO_LEASE)
            empty = current.binding is None and not current.draining
            yield [] if empty else elements_of(key, current), elements_of(key, state)

    def _carrying(
        self, states: Mapping[bytes, FlowState], entries: EntryChange
    ) -> dict[bytes, FlowState]:
        """Note in flows whose hold begins what the fast path had counted: it takes its entry."""
        carrying = dict(states)
        for key, state in states.items() if entries.taken else ():
            if state.held_until_ns:
                taken = entries.taken.get(self._elements.fast_uplink(key))
                if taken is not None:
                    carrying[key] = state._replace(carried=taken[1])
        return carrying

    def _tell_gnbs(
        self, before: Mapping[bytes, FlowState], after: Mapping[bytes, FlowState], now_ns: int
    ) -> None:
        for ran in self._rans:
            try:
                ran.change(before, after, now_ns)
            except (BatchError, OSError) as error:
                if any(state.binding is not None for state in after.values()):
                    raise
                # To close the gate comes first; there it ends at its deadline.
                log.error("a gNB was not told that leases end: %s", error)


def _marked_alike(one: Binding, other: Binding) -> bool:
    """Return whether a lease's packets are in the same class, with the same DSCP."""
    is_, wanted = one.qos, other.qos
    return (one.lease_id, is_.guaranteed, is_.dscp) == (
        other.lease_id,
        wanted.guaranteed,
        wanted.dscp,
    ) and (is_.guaranteed or not is_.dscp or is_.five_qi == wanted.five_qi)


def fingerprint(config: GateConfig, there: Ports | None) -> str:
    """Return what tells these tables from those of another version or configuration."""
    digest = hashlib.sha256(repr((VERSION, config, there)).encode()).hexdigest()[:16]
    return f"{SIGNATURE} {VERSION} {digest}"
