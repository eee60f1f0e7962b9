"""Puts a control plane together and keeps it running.

`Service` replays the evidence log and connects the parts; while it is `running` tasks commit, keep
deadlines, and deliver notices.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from controlplane import aist
from controlplane.access_tokens import TokenService
from controlplane.addresses import text_of
from controlplane.admission import Pools, Rates
from controlplane.catalogue import Catalogue
from controlplane.checkpoint import Signer
from controlplane.clock import NS_PER_S, Clock
from controlplane.codec import Record
from controlplane.committer import Committer
from controlplane.controller import Controller, Settings
from controlplane.delivery import Dispatcher, Outbox
from controlplane.enforcement import Address, Enforcer, FirstPackets
from controlplane.event_stream import Broadcaster
from controlplane.evidence import EvidenceLog
from controlplane.first_packets import FirstPacketPager
from controlplane.fleet import Fleet
from controlplane.keys import KeyRing
from controlplane.lease import Lease, Terms
from controlplane.ledger import Ledger
from controlplane.measured import Measured
from controlplane.metrics import Levels, Metrics
from controlplane.northbound.plane import ControlPlane
from controlplane.paging import Pager
from controlplane.parties import AnchorGateway, Subscriber
from controlplane.policy import Tenants
from controlplane.relocation import Relocator
from controlplane.restart import recover
from controlplane.revocations import Revocations
from controlplane.sink_http import sink_client
from controlplane.store import Store
from controlplane.telling import Teller, replayed, stream_event
from controlplane.triggers import Triggers, TriggerSettings
from controlplane.upkeep import Keeper

MAX_SLEEP_S = 3_600.0
ACCESS_TOKEN_AUDIENCE = "ai-paging-api"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """What the control plane is told of the network around it."""

    subscribers: Sequence[Subscriber]
    cells: Mapping[str, Rates]  # gNB -> what may be guaranteed there
    attachment_points: Sequence[str]  # anchors that the user plane can reach, by name
    anchor_addresses: Mapping[Address, str]  # anchors' own addresses


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a control plane behaves."""

    settings: Settings = field(default_factory=Settings)
    triggers: TriggerSettings = field(default_factory=TriggerSettings)
    failure_detection_ms: int = 200
    key_rotation_s: int = 86_400
    api_root: str = "http://localhost"
    allow_http_sinks: bool = False


class _Issuer:
    """Signs AISTs with the newest key."""

    def __init__(self, keys: KeyRing, clock: Clock) -> None:
        self._keys = keys
        self._clock = clock

    def issue(self, held: Lease) -> str:
        terms, unix = held.terms, self._clock.to_unix_ns
        assert terms.intent is not None
        return aist.issue(
            self._keys.signing,
            ue=terms.ue,
            addresses=[text_of(flow.ue) for flow in terms.flows],
            aisi=terms.aisi,
            lease_id=terms.lease_id,
            epoch=terms.epoch,
            task=terms.intent.task,
            now_unix_ns=unix(self._clock.now_ns()),
            lease_expires_unix_ns=unix(held.deadline_ns),
        )


class Service:
    """A control plane: its parts, and the tasks that keep it going."""

    def __init__(
        self,
        *,
        catalogue: Catalogue,
        network: Network,
        tenants: Tenants,
        store: Store,
        outbox: Outbox,
        keys: KeyRing,
        evidence_key: Ed25519PrivateKey,
        enforcer: Enforcer,
        gateway: AnchorGateway,
        clock: Clock,
        options: Options,
        first_packets: FirstPackets | None = None,
    ) -> None:
        """Replay the store's evidence. Raises StoreError, FleetError, ValueError."""
        self._clock = clock
        self._keys = keys
        self._key_rotation_s = options.key_rotation_s
        self._log = EvidenceLog(store, clock)
        fleet = Fleet(
            catalogue.anchors, network.attachment_points, budget_ms=options.failure_detection_ms
        )
        self._ledger = Ledger(fleet, Pools(fleet.anchors, network.cells))
        self._revocations = Revocations(clock, self._ledger.leases_beside)
        for entry in self._log.replay():
            self._ledger.fold(entry.event, clock.from_unix_ns(entry.at_ns))
            self._revocations.observe(entry.event)
        self._ledger.forget(clock.now_ns())
        self._stream = Broadcaster(lambda after: replayed(self._log, self._ledger, after))
        self._metrics = Metrics()
        self._metrics.watch(self._levels)
        teller = Teller(self._ledger, clock, options.api_root, store.with_sink())
        self._committer = Committer(
            self._log,
            self._ledger,
            enforcer,
            clock,
            self._metrics,
            teller.notices,
            self._observe,
        )
        self._dispatcher = Dispatcher(outbox, sink_client(), lambda: keys.signing)
        controller = Controller(
            catalogue=catalogue,
            subscribers=network.subscribers,
            tenants=tenants,
            ledger=self._ledger,
            committer=self._committer,
            enforcer=enforcer,
            gateway=gateway,
            issuer=_Issuer(keys, clock),
            clock=clock,
            measured=Measured(self._metrics),
            settings=options.settings,
        )
        pager = Pager(controller)
        relocator = Relocator(controller, pager)
        self._first_packets = None
        if first_packets is not None:
            self._first_packets = FirstPacketPager(controller, pager, first_packets)
        self._keeper = Keeper(
            controller, relocator, Triggers(options.triggers), network.cells.keys()
        )
        self.plane = ControlPlane(
            controller=controller,
            pager=pager,
            relocator=relocator,
            keeper=self._keeper,
            log=self._log,
            signer=Signer.of_log(evidence_key),
            keys=keys,
            tokens=TokenService(
                keys, tenants.clients(), issuer=aist.ISSUER, audience=ACCESS_TOKEN_AUDIENCE
            ),
            revocations=self._revocations,
            stream=self._stream,
            metrics=self._metrics,
            anchor_by_address=network.anchor_addresses,
            first_packets=first_packets,
            allow_http_sinks=options.allow_http_sinks,
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[ControlPlane]:
        """Keep it going. On entry, log and kernel agree; on exit, all that was accepted is done."""
        committing = asyncio.create_task(self._committer.run(), name="committer")
        tasks: list[asyncio.Task[None]] = []
        try:
            reconciled = await recover(self.plane.controller)
            log.info("reconciled with the kernel: %s", reconciled)
            tasks.append(asyncio.create_task(self._keeper.run(), name="keeper"))
            tasks.append(asyncio.create_task(self._dispatcher.run(), name="dispatcher"))
            tasks.append(asyncio.create_task(self._rotate_keys(), name="keys"))
            if self._first_packets is not None:
                self._first_packets.start()
            yield self.plane
        finally:
            if self._first_packets is not None:
                await self._first_packets.wait()
            self._stream.close()
            for task in tasks:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
            self._committer.stop()
            await committing

    async def _rotate_keys(self) -> None:
        """Sign with a new key when the present one has signed for long enough."""
        while True:
            now_unix_ns = self._clock.to_unix_ns(self._clock.now_ns())
            due_unix_ns = self._keys.signing_since_unix_ns + self._key_rotation_s * NS_PER_S
            if due_unix_ns <= now_unix_ns:
                self._keys.rotate(now_unix_ns)
                self._keys.prune(now_unix_ns)
                due_unix_ns = now_unix_ns + self._key_rotation_s * NS_PER_S
            await asyncio.sleep(min((due_unix_ns - now_unix_ns) / NS_PER_S, MAX_SLEEP_S))

    def _levels(self) -> Levels:
        """Return what there is, for the metrics."""
        ledger = self._ledger
        states = Counter(held.state.value for held in ledger.live())
        anchors = Counter(status.state.value for status in ledger.fleet.statuses())
        return Levels(
            leases=states,
            sessions={"LIVE": ledger.live_sessions},
            anchors=anchors,
            dropped_packets=self.plane.drops,
            parked_packets=asdict(self.plane.parked),
            notices=asdict(self._dispatcher.counts),
        )

    def _observe(self, events: Sequence[Record], first: int, noticed: bool) -> None:
        """Tell whoever follows of events that are durable and folded."""
        at_unix_ns = self._clock.to_unix_ns(self._clock.now_ns())
        for index, event in enumerate(events, start=first):
            self._revocations.observe(event)
            if self._stream.readers:
                self._stream.publish(stream_event(event, index, at_unix_ns, self._terms_of))
        if noticed:
            self._dispatcher.wake()

    def _terms_of(self, lease_id: str) -> Terms | None:
        held = self._ledger.find_lease(lease_id)
        return None if held is None else held.terms
