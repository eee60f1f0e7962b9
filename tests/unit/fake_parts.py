"""What a control plane needs around it, as tests want it: store, outbox, user plane, anchors."""

import json
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from pathlib import Path

from fake_time import FakeClock, Gate

from controlplane.clock import NS_PER_MS
from controlplane.delivery import Delivery
from controlplane.enforcement import (
    Binding,
    EndDrain,
    Enforced,
    EnforcementError,
    Flow,
    Hold,
    Install,
    Move,
    Operation,
    Parked,
    Reconciliation,
    Renew,
    Resume,
    Revoke,
    StaleEpochError,
    Usage,
)
from controlplane.parties import AnchorRefusedError
from controlplane.sqlite_store import SqliteStore
from controlplane.store import Notice, Sink, StoreError, Write


class _Spy:
    """What the stores of this file have in common: a gate, a trace, a disk that may be full."""

    trace: list[str]
    gate: Gate
    writes: list[list[str]]  # the types of entries of each
    full: bool

    def spy(self, trace: list[str]) -> None:
        self.trace, self.gate, self.writes, self.full = trace, Gate(), [], False
        self.fail_at: int | None = None  # of the writes from now on, the first is 1

    async def append(self, write: Write) -> None:
        await self.gate.pass_through(write)
        if self.fail_at is not None:
            self.fail_at -= 1
        if self.full or self.fail_at == 0:
            self.trace.append("disk full")
            raise StoreError("No space left on device")
        self.write(write)
        types = [json.loads(line)["type"] for line in write.lines]
        self.writes.append(types)
        told = [name for name in types if name != "Acknowledged"]  # comes when it comes
        if told:
            self.trace.append("write " + "+".join(told))

    def write(self, write: Write) -> None:
        raise NotImplementedError


class MemoryStore(_Spy):
    """Implements `store.Store`."""

    def __init__(self, trace: list[str]) -> None:
        self.lines: list[bytes] = []
        self.sinks: dict[str, Sink] = {}
        self.notices: list[Notice] = []
        self.spy(trace)

    def write(self, write: Write) -> None:
        self.lines += write.lines
        self.sinks |= {sink.session_id: sink for sink in write.sinks}
        self.notices += [n for n in write.notices if n.session_id in self.sinks]

    def replay(self) -> Iterator[bytes]:
        yield from self.lines

    def read(self, start: int, end: int) -> Iterator[bytes]:
        yield b"".join(line + b"\n" for line in self.lines[start:end])

    def with_sink(self) -> list[str]:
        return list(self.sinks)

    def sink(self, session_id: str) -> Sink | None:
        return self.sinks.get(session_id)

    def close(self) -> None:
        pass


class FileStore(_Spy, SqliteStore):
    """The real store, in the caller's thread."""

    def __init__(self, path: Path, trace: list[str]) -> None:
        SqliteStore.__init__(self, path)
        self.spy(trace)

    def write(self, write: Write) -> None:
        SqliteStore.write(self, write)


class FakeOutbox:
    """Implements `delivery.Outbox`: nothing is ever due."""

    async def due(self, now_unix_ns: int, limit: int) -> Sequence[Delivery]:
        return []

    async def done(self, ids: Sequence[int]) -> None: ...

    async def retry(self, delivery_id: int, attempts: int, not_before_unix_ns: int) -> None: ...

    async def give_up(self, delivery_id: int, why: str) -> None: ...

    async def give_up_sink(self, sink: str, why: str) -> None: ...


class FakeEnforcer:
    """A user plane that keeps its promises as the kernel does: by flow, atomic, with deadlines.

    Like the kernel it survives the controller. `refuse` is asked about each batch; `down`: it
    refuses everything. Each applied batch is in `applied` and `trace`. Each lease carries a packet
    per ms, both ways.
    """

    def __init__(self, clock: FakeClock, trace: list[str]) -> None:
        self._clock = clock
        self._trace = trace
        self._steer: dict[Flow, Binding] = {}
        self._drain: dict[Flow, dict[str, tuple[Binding, int]]] = {}  # lease -> until
        self._epoch: dict[Flow, int] = {}
        self._since: dict[str, int] = {}  # by lease id, when its elements were made
        self.held: dict[str, int] = {}  # by lease id, until when
        self.gate = Gate()
        self.applied: list[tuple[Operation, ...]] = []
        self.batches = 0  # tried
        self.down = False
        self.refuse: Callable[[Sequence[Operation]], bool] = lambda operations: False
        self.before: Callable[[Sequence[Operation]], None] = lambda operations: None

    # What a test looks at: lease -> deadline, of those that still run

    def bindings(self) -> dict[str, Binding]:
        live = [b for b in self._steer.values() if b.expires_ns > self._clock.now]
        assert all(self._steer.get(flow) == b for b in live for flow in b.flows), "half a lease"
        return {binding.lease_id: binding for binding in live}

    def steering(self) -> dict[str, int]:
        return {lease_id: b.expires_ns for lease_id, b in self.bindings().items()}

    def anchors(self) -> dict[str, str | None]:
        """Which anchor each UE address is steered to, by `ue>service`."""
        return {
            f"{flow.ue}>{flow.service}": binding.anchor
            for flow, binding in self._steer.items()
            if binding.expires_ns > self._clock.now
        }

    def drains(self) -> dict[str, int]:
        return {
            lease_id: until
            for drains in self._drain.values()
            for lease_id, (_, until) in drains.items()
            if until > self._clock.now
        }

    # Enforcer

    async def apply(self, operations: Sequence[Operation]) -> None:
        if not operations:
            return
        await self.gate.pass_through(operations)
        self.batches += 1
        self.before(operations)
        if self.down or self.refuse(operations):
            self._trace.append("refused")
            raise EnforcementError("the kernel said no")
        kept = dict(self._steer), {f: dict(d) for f, d in self._drain.items()}, dict(self._epoch)
        try:
            for operation in operations:
                self._one(operation)
        except EnforcementError:
            self._steer, self._drain, self._epoch = kept
            raise
        self.applied.append(tuple(operations))
        self._trace.append("+".join(type(operation).__name__ for operation in operations))

    async def enforced(self) -> list[Enforced]:
        usage = await self.usage(list(self._steer.values()))
        return [
            Enforced(
                lease_id=binding.lease_id,
                epoch=binding.epoch,
                flow=flow,
                anchor=binding.anchor,
                remaining_ms=(binding.expires_ns - self._clock.now) // NS_PER_MS,
                usage=usage[binding.lease_id],
            )
            for flow, binding in self._steer.items()
            if binding.expires_ns > self._clock.now
        ]

    async def usage(self, bindings: Sequence[Binding]) -> dict[str, Usage]:
        if self.down:
            raise EnforcementError("the kernel does not answer")
        steering, draining = self.steering(), self.drains()
        found = {}
        for binding in bindings:
            lease_id = binding.lease_id
            packets = (self._clock.now - self._since.get(lease_id, 0)) // NS_PER_MS
            uplink = packets if lease_id in steering else 0
            if lease_id in steering or lease_id in draining:
                found[lease_id] = Usage(
                    uplink_packets=uplink,
                    uplink_bytes=100 * uplink,
                    downlink_packets=packets,
                    downlink_bytes=1_000 * packets,
                )
        return found

    async def reconcile(self, live: Iterable[Binding]) -> Reconciliation:
        if self.down:
            raise EnforcementError("the kernel does not answer")
        wanted: dict[Flow, Binding] = {}
        for binding in live:
            for flow in binding.flows:
                assert flow not in wanted, f"two leases for {flow}"
                assert binding.epoch >= self._epoch.get(flow, 0), "an epoch went back"
                wanted[flow] = binding
                self._epoch[flow] = binding.epoch
        before, after = self.bindings(), {b.lease_id: b for b in wanted.values()}
        for lease_id in after.keys() - before.keys():
            self._since[lease_id] = self._clock.now
        self._steer = wanted
        self._drain = {flow: drains for flow, drains in self._drain.items() if flow in wanted}
        self._trace.append("reconcile")
        adopted = {lease_id for lease_id in after if before.get(lease_id) == after[lease_id]}
        return Reconciliation(
            adopted=tuple(sorted(adopted)),
            installed=tuple(sorted(after.keys() - adopted)),
            removed=tuple(sorted(before.keys() - after.keys())),
        )

    async def drops(self) -> dict[str, int]:
        return {"no_lease_uplink": 3}

    def _one(self, operation: Operation) -> None:
        match operation:
            case Install(new) | Move(new, _, _):
                if new.expires_ns <= self._clock.now:
                    raise EnforcementError(f"lease {new.lease_id} is over")
                self._since.setdefault(new.lease_id, self._clock.now)
                for flow in new.flows:
                    if isinstance(operation, Move):
                        self._fence(new, flow, at_least=self._epoch.get(flow, 0) + 1)
                        assert self._steer[flow] == operation.old, "moved from where it was not"
                        assert operation.drain_until_ns <= operation.old.expires_ns
                        drains = self._drain.setdefault(flow, {})
                        drains[operation.old.lease_id] = operation.old, operation.drain_until_ns
                    else:
                        self._fence(new, flow, at_least=self._epoch.get(flow, 0))
                    self._steer[flow] = new
                    self._epoch[flow] = new.epoch
            case Renew(new):
                for flow in new.flows:
                    self._fence(new, flow, at_least=self._epoch.get(flow, 0))
                    assert self._steer[flow].lease_id == new.lease_id
                    self._steer[flow] = new
            case Revoke(binding):
                for flow in binding.flows:
                    self._fence(binding, flow, at_least=self._epoch.get(flow, 0))
                    self._steer.pop(flow, None)
                    self._drain.pop(flow, None)
            case EndDrain(old):
                for flow in old.flows:
                    self._drain.get(flow, {}).pop(old.lease_id, None)
            case Hold(binding, until_ns):
                assert self._steer[binding.flows[0]] == binding, "held what does not steer"
                assert until_ns <= binding.expires_ns
                self.held[binding.lease_id] = until_ns
            case Resume(binding):
                del self.held[binding.lease_id]

    def _fence(self, binding: Binding, flow: Flow, *, at_least: int) -> None:
        if binding.epoch < at_least:
            raise StaleEpochError(f"epoch {binding.epoch}, the kernel is at {at_least}")


class FakeFirstPackets:
    """Where first packets wait; `sends` is a packet of a flow without a lease."""

    def __init__(self) -> None:
        self.sends: Callable[[Flow], None] = lambda flow: None
        self.refused: list[tuple[tuple[Flow, ...], int]] = []  # flows, ms

    def on_first_packet(self, report: Callable[[Flow], None]) -> None:
        self.sends = report

    async def refuse(self, flows: Sequence[Flow], backoff_ms: int) -> None:
        self.refused.append((tuple(flows), backoff_ms))

    async def parked(self) -> Parked:
        return Parked()


class FakeGateway:
    """Anchors that are ready unless told otherwise; `meanwhile` happens while one is asked."""

    def __init__(self, trace: list[str]) -> None:
        self._trace = trace
        self.gate = Gate()
        self.unready: set[str] = set()
        self.dead: set[str] = set()
        self.asked: list[tuple[str, str]] = []
        self.meanwhile: Callable[[], Awaitable[object] | None] = lambda: None

    async def ready(self, anchor: str, aisi: str) -> bool:
        self.asked.append((anchor, aisi))
        self._trace.append(f"ask {anchor}")
        answer = await self.gate.pass_through(anchor)
        happening = self.meanwhile()
        if happening is not None:
            await happening
        if anchor in self.dead:
            raise AnchorRefusedError(f"{anchor} refuses connections")
        return anchor not in self.unready if answer is None else bool(answer)
