"""Group commit: what was decided meanwhile becomes durable in one write and real in one batch.

    decide --> submit --> [ closing counts | one durable write | fold | kernel batch ] --> answer
               submit -->/                                                         \\--> answer

The order is the point: evidence, then kernel, then answer. While a write is on its way to the disk
the next decisions gather. The kernel's acknowledgements are journalled with the next write, or
soon after.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from controlplane.clock import Clock
from controlplane.codec import Record
from controlplane.enforcement import (
    Binding,
    EnforcementError,
    Enforcer,
    Install,
    Move,
    Operation,
    Reconciliation,
    Usage,
)
from controlplane.evidence import EvidenceLog
from controlplane.facts import Acknowledged
from controlplane.lease import Ended, Lease, State
from controlplane.ledger import Ledger
from controlplane.metrics import Metrics
from controlplane.store import Notice, Sink, Store, StoreError
from controlplane.values import value

MAX_CHANGES = 256  # of one write and one kernel batch
ACKNOWLEDGE_S = 0.02  # at most so long an acknowledgement waits for a write to go with

log = logging.getLogger(__name__)


@value(frozen=True, slots=True)
class Change:
    """What one decision changes: its events, then its operations, all or nothing."""

    events: Sequence[Record]
    operations: Sequence[Operation] = ()
    sink: Sink | None = None


@value(frozen=True, slots=True)
class Done:
    """When it was durable, and when the kernel had acknowledged it; CLOCK_MONOTONIC ns."""

    durable_ns: int
    enforced_ns: int


@dataclass(slots=True)
class Load:
    """How full the batches are and where their time goes; sums since the start."""

    batches: int = 0
    changes: int = 0
    entries: int = 0
    encode_ns: int = 0
    write_ns: int = 0
    kernel_ns: int = 0


@dataclass(slots=True)
class _Waiting:
    change: Change
    done: asyncio.Future[Done]
    refused: EnforcementError | None = None
    events: list[Record] = field(default_factory=list)  # with closing counts
    settled: bool = False

    def settle(self, outcome: Done | Exception) -> None:
        """Say what became of it."""
        self.settled = True
        if self.done.done():  # its caller was cancelled
            return
        if isinstance(outcome, Done):
            self.done.set_result(outcome)
        else:
            self.done.set_exception(outcome)


@value(frozen=True, slots=True)
class _Counts:
    usage: Usage | None
    at_ns: int


_NO_COUNTS = _Counts(None, 0)
Told = Callable[[Sequence[Record], int, Iterable[str]], Sequence[Notice]]
Observer = Callable[[Sequence[Record], int, bool], None]


class Committer:
    """The one writer to log, ledger and kernel. `run` must be running for `submit` to return."""

    def __init__(
        self,
        log: EvidenceLog,
        ledger: Ledger,
        enforcer: Enforcer,
        clock: Clock,
        metrics: Metrics,
        tell: Told = lambda events, first, sinks: (),
        observe: Observer = lambda events, first, noticed: None,
    ) -> None:
        """`tell`: the notices that events call for, written with them; see `telling.Teller`.

        `observe` is shown the events of a write once they are durable and folded, with the index
        of the first; and whether notices were written.
        """
        self.load = Load()
        self._log = log
        self._ledger = ledger
        self._enforcer = enforcer
        self._clock = clock
        self._metrics = metrics
        self._tell = tell
        self._observe = observe
        self._waiting: list[_Waiting] = []
        self._acknowledged: list[Acknowledged] = []
        self._sampled: dict[str, _Counts] = {}  # by lease id, until it ends
        self._carried: dict[str, Usage] = {}  # of superseded leases when they were, until they end
        self._wake = asyncio.Event()
        self._turn = asyncio.Lock()  # of whoever changes the kernel
        self._stopping = False
        self._failed: StoreError | None = None

    @property
    def store(self) -> Store:
        """Where it writes; for reading."""
        return self._log.store

    async def submit(self, change: Change) -> Done:
        """Return when the change is durable and the kernel has acknowledged.

        Raises StoreError: nothing of it happened. Raises EnforcementError: it is durable, and the
        kernel refused its operations, all of them.
        """
        if self._failed is not None:
            raise self._failed
        waiting = _Waiting(change, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._wake.set()
        try:
            return await waiting.done
        except asyncio.CancelledError:
            # The change goes on. Whoever holds locks for it holds them until it has taken effect:
            # nobody else may decide about the same lease meanwhile.
            while not waiting.settled:
                waiting.done = asyncio.get_running_loop().create_future()
                with suppress(asyncio.CancelledError, StoreError, EnforcementError):
                    await waiting.done
            if waiting.refused is None:
                raise
            # What is durable and not enforced must be ended; cancelled again while that goes on.
            if (task := asyncio.current_task()) is not None:
                task.uncancel()
                task.cancel()
            raise waiting.refused from None

    async def sample(self, leases: Sequence[Lease]) -> None:
        """Read the counts of leases that are about to expire, while the kernel has them."""
        now_ns = self._clock.now_ns()  # counted then or later, never earlier
        usage = await self._enforcer.usage([lease.binding() for lease in leases])
        for lease in leases:
            lease_id = lease.terms.lease_id
            held = self._ledger.find_lease(lease_id)
            if lease_id in usage and held is not None and held.state is not State.ENDED:
                self._sampled[lease_id] = _Counts(self._whole(held, usage[lease_id]), now_ns)

    async def reconcile(self) -> Reconciliation:
        """Make the kernel hold exactly what the ledger says, between two batches."""
        async with self._turn:
            return await self._enforcer.reconcile(
                [held.binding() for held in self._ledger.live() if held.state is State.COMMITTED]
            )

    async def run(self) -> None:
        """Commit until `stop`; what was submitted before that is committed first.

        Not to be cancelled: a write that is on its way would be durable and unknown here. If it
        fails by a fault of its own nothing more is granted: every `submit` raises StoreError.
        """
        try:
            while not self._stopping or self._waiting or self._acknowledged:
                await self._gathered()
                async with self._turn:
                    await self._commit()
        except BaseException as error:
            log.critical("the committer has failed: nothing more is granted", exc_info=error)
            self._failed = StoreError(f"the committer has failed: {error!r}")
            for waiting in self._waiting:
                waiting.settle(self._failed)
            raise
        self._failed = StoreError("the committer has stopped")

    def stop(self) -> None:
        """Let `run` return once there is nothing to write."""
        self._stopping = True
        self._wake.set()

    async def _gathered(self) -> None:
        """Return when there is something to write, or nothing will come."""
        while not self._waiting and not self._stopping:
            self._wake.clear()
            try:
                async with asyncio.timeout(ACKNOWLEDGE_S if self._acknowledged else None):
                    await self._wake.wait()
            except TimeoutError:
                return

    async def _commit(self) -> None:
        batch, self._waiting = self._waiting[:MAX_CHANGES], self._waiting[MAX_CHANGES:]
        if not batch and not self._acknowledged:
            return
        try:
            await self._write(batch)
            durable_ns = self._clock.now_ns()
            await self._enforce(batch)
        except StoreError as error:
            log.error("%s", error)
            for waiting in batch:
                waiting.settle(error)
            if self._stopping:
                self._acknowledged = []  # as if it had been killed here
            elif not batch:
                await asyncio.sleep(ACKNOWLEDGE_S)
            return
        except BaseException as error:
            for waiting in batch:
                waiting.settle(StoreError(f"the committer has failed: {error!r}"))
            raise
        enforced_ns = self._clock.now_ns()
        for waiting in batch:
            waiting.settle(waiting.refused or Done(durable_ns, enforced_ns))

    async def _write(self, batch: list[_Waiting]) -> None:
        started_ns = time.monotonic_ns()
        await self._count(batch)
        acknowledged = self._acknowledged
        events: list[Record] = [*acknowledged]
        for waiting in batch:
            events += waiting.events
        first = self._log.size
        sinks = [waiting.change.sink for waiting in batch if waiting.change.sink is not None]
        notices = self._tell(events, first, [sink.session_id for sink in sinks])
        encoded_ns = time.monotonic_ns()
        now_ns = self._clock.now_ns()  # what the entries bear, and a replay will tell
        await self._log.append(events, notices, sinks, now_ns)
        written_ns = time.monotonic_ns()
        self._acknowledged = []
        for event in events:
            self._ledger.fold(event, now_ns)
            if isinstance(event, Ended):
                self._sampled.pop(event.lease_id, None)
                self._carried.pop(event.lease_id, None)
        self._observe(events, first, bool(notices))
        self._metrics.journal_batch(len(events), written_ns - encoded_ns)
        load = self.load
        load.batches += 1
        load.changes += len(batch)
        load.entries += len(events)
        load.encode_ns += encoded_ns - started_ns
        load.write_ns += written_ns - encoded_ns

    async def _count(self, batch: list[_Waiting]) -> None:
        """Put closing counts into the ends of leases that the kernel may know."""
        closing: dict[str, Lease] = {}
        for waiting in batch:
            for event in waiting.change.events:
                if isinstance(event, Ended):
                    lease = self._ledger.lease(event.lease_id)
                    if lease.state is not State.PREPARED:
                        closing[event.lease_id] = lease
        usage = {}
        now_ns = self._clock.now_ns()
        if closing:
            with suppress(EnforcementError):
                usage = await self._enforcer.usage([lease.binding() for lease in closing.values()])
        for waiting in batch:
            waiting.events = list(waiting.change.events)
            if not closing:
                continue
            for number, event in enumerate(waiting.events):
                if isinstance(event, Ended) and event.lease_id in closing:
                    counts = self._sampled.get(event.lease_id, _NO_COUNTS)
                    if event.lease_id in usage:
                        whole = self._whole(closing[event.lease_id], usage[event.lease_id])
                        counts = _Counts(whole, now_ns)
                    waiting.events[number] = replace(
                        event, usage=counts.usage, counted_ns=counts.at_ns
                    )

    async def _carry(self, operations: Sequence[Operation]) -> None:
        """Keep the uplink counts of leases that are superseded: the flip takes their elements."""
        old = [operation.old for operation in operations if isinstance(operation, Move)]
        if old:
            now_ns = self._clock.now_ns()
            with suppress(EnforcementError):
                for lease_id, counted in (await self._enforcer.usage(old)).items():
                    self._carried[lease_id] = counted
                    self._sampled[lease_id] = _Counts(counted, now_ns)  # if none can be read later

    def _whole(self, lease: Lease, counted: Usage) -> Usage | None:
        """Return a lease's whole usage; None if its uplink was counted by an earlier process."""
        if lease.state is not State.DRAINING:
            return counted
        carried = self._carried.get(lease.terms.lease_id)
        if carried is None:
            return None
        return replace(
            counted, uplink_packets=carried.uplink_packets, uplink_bytes=carried.uplink_bytes
        )

    async def _enforce(self, batch: list[_Waiting]) -> None:
        """One kernel batch for all; if it is refused, one for each, to find out whose fault."""
        todo = [waiting for waiting in batch if waiting.change.operations]
        if not todo:
            return
        started_ns = time.monotonic_ns()
        operations = [op for waiting in todo for op in waiting.change.operations]
        await self._carry(operations)
        try:
            await self._enforcer.apply(operations)
        except EnforcementError:
            for waiting in todo:
                try:
                    await self._enforcer.apply(waiting.change.operations)
                except EnforcementError as error:
                    waiting.refused = error
        now_ns = self._clock.now_ns()
        opened = [
            binding.lease_id
            for waiting in todo
            if waiting.refused is None
            for binding in map(_opened, waiting.change.operations)
            if binding is not None and binding.expires_ns > now_ns
        ]
        if opened:
            self._acknowledged.append(Acknowledged(tuple(opened), now_ns))
        took_ns = time.monotonic_ns() - started_ns
        self.load.kernel_ns += took_ns
        self._metrics.kernel_batch(len(operations), took_ns)


def _opened(operation: Operation) -> Binding | None:
    """Return what an operation opens the user plane for."""
    match operation:
        case Install(new) | Move(new, _, _):
            return new
        case _:
            return None
