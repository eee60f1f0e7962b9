"""The controller: the steps that every AI-Paging transaction is made of.

Each change goes the same way: the lease's state machine decides, the committer makes it durable,
brings it about in the kernel, and only then is the caller told. Transactions of one UE follow one
another; those of different UEs share a write and a kernel batch. The transactions themselves are in
`paging` and `relocation`; what happens by itself, in `upkeep`.
"""

import asyncio
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from controlplane import lease
from controlplane.admission import Shortage
from controlplane.answers import Grant, Refusal, Timeline
from controlplane.catalogue import Catalogue, QosProfile
from controlplane.clock import NS_PER_MS, NS_PER_S, Clock
from controlplane.committer import Change, Committer, Done
from controlplane.enforcement import (
    Address,
    EndDrain,
    EnforcementError,
    Enforcer,
    Flow,
    Operation,
    Renew,
    Revoke,
)
from controlplane.intent import Intent
from controlplane.lease import Effect, EndReason, Lease, LeaseError, Outcome, State, Terms
from controlplane.ledger import Ledger, Session, demand
from controlplane.locks import Locks
from controlplane.measured import Measured
from controlplane.metrics import Transaction
from controlplane.parties import AnchorGateway, AnchorRefusedError, Subscriber, TokenIssuer
from controlplane.policy import Arp, Tenant, Tenants
from controlplane.resolver import Resolution


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Time limits of the controller."""

    prepare_ms: int = 2_000
    drain_ms: int = 10_000
    flip_drain_ms: int = 100  # of a service that flips: what the old anchor has sent still passes
    buffer_ms: int = 2_000  # the longest a service that buffers waits for its target
    refused_ms: int = 5_000  # how long a first packet that was refused is not paged for again
    # An experimental arm: shows what breaking before making costs. Never set it for users.
    allow_break_before_make: bool = False


class Controller:
    """The shared steps, over one user plane. Not thread-safe: one event loop owns it."""

    def __init__(
        self,
        *,
        catalogue: Catalogue,
        subscribers: Iterable[Subscriber],
        tenants: Tenants,
        ledger: Ledger,
        committer: Committer,
        enforcer: Enforcer,
        gateway: AnchorGateway,
        issuer: TokenIssuer,
        clock: Clock,
        measured: Measured,
        settings: Settings,
    ) -> None:
        self.catalogue = catalogue
        self.tenants = tenants.by_name()
        self.ledger = ledger
        self.committer = committer
        self.enforcer = enforcer
        self.gateway = gateway
        self.issuer = issuer
        self.clock = clock
        self.measured = measured
        self.settings = settings
        self.locks = Locks()
        self.subscribers = {subscriber.ue: subscriber for subscriber in subscribers}
        # What whoever keeps deadlines wants to know: that there is something to do, what was
        # granted, and that an anchor refused a connection.
        self.changed: Callable[[], None] = lambda: None
        self.granted: Callable[[Lease], None] = lambda held: None
        self.refused: Callable[[str, str], None] = lambda anchor, why: None
        self._kernel_disagrees = False

    # What is

    def session(self, session_id: str) -> Session:
        """Return a session. Raises Refusal if there is none, or none any more."""
        session = self.ledger.session(session_id)
        if session is None:
            raise Refusal("SESSION_UNKNOWN", f"there is no session {session_id}")
        return session

    def committed(self, session_id: str) -> Lease:
        """Return the lease that a session has now. Raises Refusal."""
        held = self.ledger.committed(self.session(session_id))
        if held is None or held.deadline_ns <= self.clock.now_ns():
            raise Refusal("SESSION_ENDED", f"session {session_id} has no live lease")
        return held

    def subscriber(self, ue: str) -> Subscriber:
        """Return a UE. Raises Refusal."""
        subscriber = self.subscribers.get(ue)
        if subscriber is None:
            raise Refusal("UE_UNKNOWN", f"{ue} is not a UE of this network")
        return subscriber

    def cell(self, ue: str) -> str | None:
        """Return the cell that a UE is in, as far as it is known."""
        return self.ledger.cells.get(ue) or self.subscriber(ue).cell

    def tenant(self, name: str) -> Tenant:
        """Return a tenant with its present policy. Raises Refusal."""
        tenant = self.tenants.get(name)
        if tenant is None:
            raise Refusal("TENANT_UNKNOWN", f"there is no tenant {name}")
        policy = self.ledger.policies.get(name)
        return tenant if policy is None else tenant.model_copy(update={"policy": policy})

    def ue_by_address(self) -> dict[Address, str]:
        """Return which UE each address was given to."""
        return {
            address: subscriber.ue
            for subscriber in self.subscribers.values()
            for address in (subscriber.address4, subscriber.address6)
        }

    # Transactions on a session that need no resolution

    async def extend(self, session_id: str, additional_ms: int, *, capped: bool = False) -> Lease:
        """Let a session's lease end later. Raises Refusal if its profile does not allow so much.

        The whole duration counts, from the first COMMIT on (CAMARA Quality-on-Demand, extend).
        `capped`: what is too much is cut to what the profile allows.
        """
        work = self._extend(session_id, additional_ms, capped)
        return await self.measured.run(Transaction.EXTEND, work, session_id=session_id)

    async def release(self, session_id: str) -> None:
        """End a session and everything it opened."""
        work = self._release(session_id)
        await self.measured.run(Transaction.RELEASE, work, session_id=session_id)

    async def _extend(self, session_id: str, additional_ms: int, capped: bool) -> Lease:
        async with self.locks.hold(self.session(session_id).ue):
            held, session = self.committed(session_id), self.session(session_id)
            assert session.started_ns is not None
            profile = self.catalogue.profile(held.terms.qos_profile)
            expires_ns = held.deadline_ns + additional_ms * NS_PER_MS
            if capped:
                latest_ns = session.started_ns + profile.max_duration_s * NS_PER_S
                expires_ns = min(expires_ns, latest_ns)
                if expires_ns <= held.deadline_ns:
                    return held
            duration_ms = (expires_ns - session.started_ns) // NS_PER_MS
            self.check_duration(profile, duration_ms)
            self.check_lease(self.tenant(session.tenant), duration_ms)
            try:
                renewed = lease.step(held, lease.Renew(expires_ns), self.clock.now_ns())
            except LeaseError as error:
                raise Refusal("NOT_EXTENDED", str(error)) from error
            change = Change(renewed.events, [Renew(renewed.lease.binding())])
            await self.enforce(session_id, change)
            return renewed.lease

    async def _release(self, session_id: str) -> None:
        session = self.session(session_id)
        async with self.locks.hold(session.ue):
            held = self.committed(session_id)
            draining = self.ledger.in_state(session, State.DRAINING)
            await self.end([*draining, held], lease.Release())

    async def take_back(self, session: Session, reason: EndReason) -> None:
        """End a session for a reason of the network's, if it is still live; its lock is held."""
        live = [
            held
            for held in self.ledger.leases_of(session)
            if held.state in (State.COMMITTED, State.DRAINING)
        ]
        if live:
            await self.end(live, lease.Revoke(reason))

    # Steps

    def terms(
        self,
        *,
        cause: str,
        tenant: str,
        subscriber: Subscriber,
        aisi: str,
        anchor: str | None,
        flows: tuple[Flow, ...],
        profile: QosProfile,
        arp: Arp,
        session_id: str | None = None,
        intent: Intent | None = None,
        request: str | None = None,
        key: str | None = None,
    ) -> Terms:
        """Write the terms of a new lease; without `session_id`, of a new session."""
        unique = os.urandom(24).hex()
        return Terms(
            lease_id=unique[:16],
            session_id=session_id or _uuid4(unique[16:]),
            cause=cause,
            tenant=tenant,
            ue=subscriber.ue,
            aisi=aisi,
            anchor=anchor,
            flows=flows,
            epoch=self.ledger.next_epoch(subscriber.ue, aisi),
            qos_profile=profile.name,
            cell=self.cell(subscriber.ue),
            downlink_bps=profile.guaranteed_downlink_bps,
            uplink_bps=profile.guaranteed_uplink_bps,
            priority_level=arp.priority_level,
            preemptible=arp.preemption_vulnerability,
            five_qi=profile.five_qi,
            max_downlink_bps=profile.max_downlink_bps,
            max_uplink_bps=profile.max_uplink_bps,
            intent=intent,
            request=request,
            key=key,
        )

    async def ready(self, anchor: str, aisi: str) -> bool:
        """Ask an anchor whether it is ready; one that refuses the connection is suspected."""
        try:
            return await self.gateway.ready(anchor, aisi)
        except AnchorRefusedError as error:
            self.refused(anchor, str(error))
            return False

    async def ready_when_prepared(self, prepared: Outcome) -> bool:
        """Make a preparation durable, ask its anchor meanwhile; return whether that is ready.

        To ask commits the anchor to nothing, so that it need not wait for the disk. Raises as the
        committer's `submit` does.
        """
        terms = prepared.lease.terms
        assert terms.anchor is not None
        asking = asyncio.create_task(self.ready(terms.anchor, terms.aisi))
        try:
            await self.committer.submit(Change(prepared.events))
            return await asking
        finally:
            asking.cancel()

    def reserve(self, terms: Terms) -> Shortage | None:
        """Reserve all that a lease needs, or nothing and say what is short."""
        ledger = self.ledger
        shortage = ledger.pools.try_reserve(terms.lease_id, terms.session_id, demand(terms))
        if shortage is None:
            ledger.expect(terms)
        return shortage

    def unreserve(self, terms: Terms) -> None:
        """Give back what was reserved for a lease that did not come about."""
        if self.ledger.find_lease(terms.lease_id) is None:
            self.ledger.pools.release(terms.lease_id)
            self.ledger.expect_no_more(terms)

    def prepare(self, terms: Terms, *, longer_ms: int = 0) -> Outcome:
        """Begin a lease; what it needs is reserved."""
        until_ns = self.clock.now_ns() + (self.settings.prepare_ms + longer_ms) * NS_PER_MS
        return lease.prepare(terms, until_ns)

    def commit(self, prepared: Lease, expires_ns: int) -> Outcome:
        """COMMIT a prepared lease. Raises Refusal if its time limit has passed."""
        try:
            return lease.step(prepared, lease.Commit(expires_ns), self.clock.now_ns())
        except LeaseError as error:
            raise Refusal("PREPARE_TIMED_OUT", str(error)) from error

    async def enforce(self, session_id: str, change: Change) -> Done:
        """Submit what opens or alters a session. If the kernel refuses, it ends. Raises Refusal."""
        try:
            return await self.committer.submit(change)
        except EnforcementError as error:
            await self._fail(session_id)
            raise Refusal("ENFORCEMENT_FAILED", str(error)) from error

    def answer(
        self, held: Lease, choice: Resolution, requested_ns: int, prepared_ns: int, done: Done
    ) -> Grant:
        """Make the grant of a new lease known, and return the answer to who asked for it."""
        self.granted(held)
        return Grant(
            lease=held,
            token=None if held.terms.anchor is None else self.issuer.issue(held),
            resolution=choice,
            timeline=Timeline(
                requested_ns=requested_ns,
                prepared_ns=prepared_ns,
                committed_ns=done.durable_ns,
                enforced_ns=done.enforced_ns,
            ),
        )

    async def end(self, leases: Sequence[Lease], command: lease.Command) -> None:
        """Step leases towards their end: one change."""
        now_ns = self.clock.now_ns()
        outcomes = [lease.step(held, command, now_ns) for held in leases]
        await self.submit(self.closing(outcomes))

    async def submit(self, change: Change) -> Done:
        """Submit a change; what the kernel refused of it the next round of upkeep repairs.

        Raises as the committer's `submit` does.
        """
        try:
            return await self.committer.submit(change)
        except EnforcementError:
            self.disagree()
            raise

    @staticmethod
    def closing(outcomes: Iterable[Outcome]) -> Change:
        """Return the change that outcomes which only end leases call for."""
        events: list[lease.Event] = []
        operations: list[Operation] = []
        for outcome in outcomes:
            events += outcome.events
            if Effect.CLOSE in outcome.effects:
                operations.append(Revoke(outcome.lease.binding()))
            if Effect.END_DRAIN in outcome.effects:
                operations.append(EndDrain(outcome.lease.binding()))
        return Change(events, operations)

    async def abort(self, prepared: Lease) -> None:
        """Roll a preparation back, unless its time limit already did."""
        held = self.ledger.find_lease(prepared.terms.lease_id)
        if held is not None and held.state is State.PREPARED:
            await self.end([held], lease.Abort())

    @staticmethod
    def check_duration(profile: QosProfile, duration_ms: int) -> None:
        """Raise Refusal unless a profile allows a session of this length in all."""
        # A minimum of 1 s is none: CAMARA cannot say less, and our leases may be shorter.
        least_ms = profile.min_duration_s * 1_000 if profile.min_duration_s > 1 else 0
        most_ms = profile.max_duration_s * 1_000
        if not least_ms <= duration_ms <= most_ms:
            raise Refusal(
                "DURATION_OUT_OF_RANGE",
                f"sessions of profile {profile.name} last {least_ms:,} to {most_ms:,} ms in all; "
                f"this would be {duration_ms:,} ms",
            )

    @staticmethod
    def check_lease(tenant: Tenant, duration_ms: int) -> None:
        """Raise Refusal unless a tenant may have sessions of this length in all."""
        most_ms = tenant.policy.max_lease_ms
        if most_ms is not None and duration_ms > most_ms:
            raise Refusal(
                "LEASE_QUOTA_EXCEEDED", f"it would be {duration_ms:,} ms; {most_ms:,} are allowed"
            )

    # Repair

    async def repair(self) -> None:
        """If the kernel refused something: make it agree with the ledger."""
        if self._kernel_disagrees:
            self._kernel_disagrees = False
            try:
                await self.committer.reconcile()
            except EnforcementError:
                self._kernel_disagrees = True
                raise

    def disagree(self) -> None:
        """Say that the kernel may not be as the ledger: the next round of upkeep repairs it."""
        self._kernel_disagrees = True
        self.changed()

    async def _fail(self, session_id: str) -> None:
        """End a session that the kernel was not brought to; repair what else it refused."""
        session = self.ledger.session(session_id)
        held = () if session is None else self.ledger.leases_of(session)
        leases = [lease_ for lease_ in held if lease_.state is not State.ENDED]
        try:
            with suppress(EnforcementError):  # then the kernel's own timeouts close it
                await self.end(leases, lease.Fail())
        finally:
            self.disagree()


def _uuid4(digits: str) -> str:
    """Return 32 random hexadecimal digits as a UUID of version 4 (RFC 9562)."""
    variant = "89ab"[int(digits[16], 16) % 4]
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:]}"
