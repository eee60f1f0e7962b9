"""The controller: the AI-Paging transactions, from intent to enforced lease.

Each change goes the same way: the lease's state machine decides, the ledger makes it durable, the
enforcer carries it out in the kernel, and only then is the caller told.
"""

import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from controlplane import aist, lease
from controlplane.catalogue import Anchor, Catalogue
from controlplane.clock import NS_PER_MS, Clock
from controlplane.enforcement import (
    Address,
    EndDrain,
    EnforcementError,
    Enforcer,
    Install,
    Move,
    Operation,
    Reconciliation,
    Renew,
    Revoke,
)
from controlplane.intent import Intent
from controlplane.lease import Effect, Lease, LeaseError, Outcome, State, Terms
from controlplane.ledger import Ledger, Session
from controlplane.resolver import Candidate, Exclusion, Resolution, resolve


@dataclass(frozen=True, slots=True)
class Subscriber:
    """A UE the network knows: its identity and the addresses it was given."""

    ue: str
    address4: IPv4Address
    address6: IPv6Address


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """Instants of one transaction, Unix ns: each is taken when the step was done."""

    requested_unix_ns: int
    prepared_unix_ns: int
    committed_unix_ns: int  # durable in the evidence log
    enforced_unix_ns: int  # acknowledged by the kernel


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """The answer to an intent or a relocation."""

    lease: Lease
    token: str
    resolution: Resolution
    timeline: Timeline


class Refusal(Exception):
    """A request that cannot be granted; `cause` is for programs, the message for people."""

    def __init__(self, cause: str, why: str, excluded: Sequence[Exclusion] = ()) -> None:
        self.cause = cause
        self.excluded = tuple(excluded)
        super().__init__(why)


class AnchorGateway(Protocol):
    """How the control plane talks to anchors."""

    async def ready(self, anchor: str, aisi: str) -> bool:
        """Ask an anchor whether it can take a session with a service now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Time limits of the controller."""

    prepare_ms: int = 2_000
    drain_ms: int = 10_000
    # An experimental arm: shows what breaking before making costs. Never set it for users.
    allow_break_before_make: bool = False


class Controller:
    """Runs the transactions of one user plane function. Not thread-safe: one event loop owns it."""

    def __init__(
        self,
        *,
        catalogue: Catalogue,
        subscribers: Sequence[Subscriber],
        ledger: Ledger,
        enforcer: Enforcer,
        gateway: AnchorGateway,
        key: Ed25519PrivateKey,
        clock: Clock,
        settings: Settings,
    ) -> None:
        self.catalogue = catalogue
        self.ledger = ledger
        self.enforcer = enforcer
        self._gateway = gateway
        self._key = key
        self._clock = clock
        self._settings = settings
        self._by_ue = {subscriber.ue: subscriber for subscriber in subscribers}
        self._relocating: set[str] = set()
        self._kernel_disagrees = False

    def recover(self) -> Reconciliation:
        """After a restart: roll back what was only prepared, end what is overdue, reconcile."""
        now = self._clock.now_ns()
        steering: dict[str, Lease] = {}  # by session
        outcomes = []
        for held in self.ledger.live():
            command: lease.Command = lease.Tick()
            if held.state is State.PREPARED:
                command = lease.Abort()
            elif (
                held.state is State.COMMITTED
                and steering.setdefault(held.terms.session_id, held) is not held
            ):  # the crash cut its flip off from the older lease's drain: it was never enforced
                command = lease.Fail()
            outcomes.append(lease.step(held, command, now))
        self.ledger.record(event for outcome in outcomes for event in outcome.events)
        return self._reconcile()

    # Transactions

    async def page(self, ue: str, intent: Intent) -> Grant:
        """Resolve an intent and grant a lease. Raises Refusal."""
        requested_ns = self._clock.now_ns()
        subscriber = self._by_ue.get(ue)
        if subscriber is None:
            raise Refusal("UE_UNKNOWN", f"{ue} is not a UE of this network")
        if all(service.task != intent.task for service in self.catalogue.services):
            raise Refusal("TASK_UNKNOWN", f"no service does {intent.task}")
        if intent.qos_profile not in self.catalogue.qos_shares():
            raise Refusal("QOS_PROFILE_UNKNOWN", f"there is no QoS profile {intent.qos_profile}")
        resolution = resolve(self.catalogue, intent, self.ledger.slots_used())
        excluded = list(resolution.excluded)
        for candidate in resolution.candidates:
            aisi = candidate.service.aisi
            if self.ledger.session_of(ue, aisi):
                raise Refusal("SESSION_EXISTS", f"{ue} already has a session with {aisi}")
            if self.ledger.slots_used().get(candidate.anchor.name, 0) >= candidate.anchor.slots:
                excluded.append(_taken_meanwhile(candidate))
                continue
            prepared = self._prepare(subscriber, candidate, intent, secrets.token_hex(8))
            prepared_ns = self._clock.now_ns()
            if not await self._gateway.ready(candidate.anchor.name, candidate.service.aisi):
                self._abort(prepared)
                excluded.append(_not_ready(candidate))
                continue
            expires_ns = self._clock.now_ns() + intent.duration_ms * NS_PER_MS
            granted, committed_ns = self._open(prepared, expires_ns)
            resolution = replace(resolution, excluded=tuple(excluded))
            return self._grant(granted, resolution, (requested_ns, prepared_ns, committed_ns))
        raise Refusal("NO_CANDIDATE", f"no anchor satisfies the intent for {intent.task}", excluded)

    async def relocate(
        self, session_id: str, target: str | None, *, break_before_make: bool = False
    ) -> Grant:
        """Move a session to another anchor (`target`, or the best) without interruption.

        Make-before-break: prepare the target, see it ready, commit the next epoch, flip in one
        batch, drain the source. If anything fails before the flip, nothing changes for the UE.
        """
        requested_ns = self._clock.now_ns()
        if break_before_make and not self._settings.allow_break_before_make:
            raise Refusal("NOT_ALLOWED", "break-before-make exists for experiments only")
        if session_id in self._relocating:
            raise Refusal("BUSY", f"session {session_id} is being relocated")
        source = self._committed(session_id)
        candidate, resolution = self._target(source, target)
        self._relocating.add(session_id)
        try:
            if break_before_make:
                self._end(source, command=lease.Revoke())
            subscriber = self._by_ue[source.terms.ue]
            prepared = self._prepare(subscriber, candidate, source.terms.intent, session_id)
            prepared_ns = self._clock.now_ns()
            if not await self._gateway.ready(candidate.anchor.name, candidate.service.aisi):
                self._abort(prepared)
                raise Refusal("ANCHOR_NOT_READY", f"{candidate.anchor.name} is not ready")
            if break_before_make:
                granted, committed_ns = self._open(prepared, source.deadline_ns)
            else:
                granted, committed_ns = self._flip(prepared, source)
            return self._grant(granted, resolution, (requested_ns, prepared_ns, committed_ns))
        finally:
            self._relocating.discard(session_id)

    def renew(self, session_id: str, duration_ms: int) -> Lease:
        """Let a session's lease end `duration_ms` from now, if that is later than it would."""
        held = self._committed(session_id)
        expires_ns = self._clock.now_ns() + duration_ms * NS_PER_MS
        try:
            renewed = lease.step(held, lease.Renew(expires_ns), self._clock.now_ns())
        except LeaseError as error:
            raise Refusal("NOT_RENEWED", str(error)) from error
        self.ledger.record(renewed.events)
        self._enforce([Renew(renewed.lease.binding())], session_id)
        return renewed.lease

    def release(self, session_id: str) -> None:
        """End a session and everything it opened."""
        held = self._committed(session_id)
        self._end(*self.ledger.draining(session_id), held, command=lease.Release())

    def tick(self) -> int | None:
        """End what is overdue; return the next deadline (monotonic ns), None if nothing is live."""
        if self._kernel_disagrees:
            self._reconcile()
        now = self._clock.now_ns()
        overdue = [held for held in self.ledger.live() if held.deadline_ns <= now]
        self._end(*overdue, command=lease.Tick())
        return min((held.deadline_ns for held in self.ledger.live()), default=None)

    def session(self, session_id: str) -> Session:
        """Return a session. Raises Refusal if there never was one."""
        session = self.ledger.session(session_id)
        if session is None:
            raise Refusal("SESSION_UNKNOWN", f"there is no session {session_id}")
        return session

    def ue_by_address(self) -> dict[Address, str]:
        """Return which UE each address was given to."""
        return {
            address: subscriber.ue
            for subscriber in self._by_ue.values()
            for address in (subscriber.address4, subscriber.address6)
        }

    def now_ns(self) -> int:
        """Return the present of this controller's clock."""
        return self._clock.now_ns()

    def to_unix_ns(self, monotonic_ns: int) -> int:
        """Return the Unix time of an instant of this controller's clock."""
        return self._clock.to_unix_ns(monotonic_ns)

    # Steps

    def _prepare(
        self, subscriber: Subscriber, candidate: Candidate, intent: Intent, session_id: str
    ) -> Lease:
        """Reserve a slot at the candidate's anchor, for a limited time."""
        service = candidate.service
        terms = Terms(
            lease_id=secrets.token_hex(8),
            session_id=session_id,
            ue=subscriber.ue,
            aisi=service.aisi,
            anchor=candidate.anchor.name,
            flows=service.flows(subscriber.address4, subscriber.address6),
            epoch=self.ledger.next_epoch(subscriber.ue, service.aisi),
            intent=intent,
        )
        until_ns = self._clock.now_ns() + self._settings.prepare_ms * NS_PER_MS
        outcome = lease.prepare(terms, until_ns)
        self.ledger.record(outcome.events)
        return outcome.lease

    def _abort(self, prepared: Lease) -> None:
        """Roll a preparation back, unless its time limit already did."""
        if self.ledger.lease(prepared.terms.lease_id).state is State.PREPARED:
            self._end(prepared, command=lease.Abort())

    def _open(self, prepared: Lease, expires_ns: int) -> tuple[Lease, int]:
        """COMMIT a prepared lease and open its user plane."""
        granted = self._commit(prepared, expires_ns)
        self.ledger.record(granted.events)
        committed_ns = self._clock.now_ns()
        self._enforce([Install(granted.lease.binding())], prepared.terms.session_id)
        return granted.lease, committed_ns

    def _flip(self, prepared: Lease, source: Lease) -> tuple[Lease, int]:
        """COMMIT the new lease and start draining the old one: one write, one batch."""
        source = self.ledger.lease(source.terms.lease_id)
        now = self._clock.now_ns()
        drain_until_ns = now + self._settings.drain_ms * NS_PER_MS
        try:
            drained = lease.step(source, lease.Supersede(drain_until_ns), now)
        except LeaseError as error:  # released, expired or revoked while the target got ready
            self._abort(prepared)
            raise Refusal("SESSION_ENDED", str(error)) from error
        granted = self._commit(prepared, source.deadline_ns)
        self.ledger.record([*granted.events, *drained.events])
        committed_ns = self._clock.now_ns()
        flip = Move(granted.lease.binding(), source.binding(), drained.lease.deadline_ns)
        self._enforce([flip], prepared.terms.session_id)
        return granted.lease, committed_ns

    def _commit(self, prepared: Lease, expires_ns: int) -> Outcome:
        held = self.ledger.lease(prepared.terms.lease_id)
        try:
            return lease.step(held, lease.Commit(expires_ns), self._clock.now_ns())
        except LeaseError as error:
            self._abort(prepared)
            raise Refusal("PREPARE_TIMED_OUT", str(error)) from error

    def _end(self, *leases: Lease, command: lease.Command) -> None:
        """Step leases towards their end: one write, one batch."""
        now = self._clock.now_ns()
        outcomes = [(held, lease.step(held, command, now)) for held in leases]
        self.ledger.record(event for _, outcome in outcomes for event in outcome.events)
        operations: list[Operation] = []
        for held, outcome in outcomes:
            if Effect.CLOSE in outcome.effects:
                operations.append(Revoke(held.binding()))
            if Effect.END_DRAIN in outcome.effects:
                operations.append(EndDrain(held.binding()))
        self._apply(operations)

    def _enforce(self, operations: Sequence[Operation], session_id: str) -> None:
        """Change the user plane. If it refuses, the session ends: nobody holds a lease in vain."""
        try:
            self._apply(operations)
        except EnforcementError as error:
            leases = [h for h in self.ledger.live() if h.terms.session_id == session_id]
            with suppress(EnforcementError):  # then the kernel's own timeouts close it
                self._end(*leases, command=lease.Fail())
            raise Refusal("ENFORCEMENT_FAILED", str(error)) from error

    def _apply(self, operations: Sequence[Operation]) -> None:
        try:
            self.enforcer.apply(operations)
        except EnforcementError:
            self._kernel_disagrees = True  # the next tick makes it agree with the ledger
            raise

    def _reconcile(self) -> Reconciliation:
        committed = [held for held in self.ledger.live() if held.state is State.COMMITTED]
        reconciliation = self.enforcer.reconcile([held.binding() for held in committed])
        self._kernel_disagrees = False
        return reconciliation

    def _committed(self, session_id: str) -> Lease:
        self.session(session_id)
        held = self.ledger.committed(session_id)
        if held is None or held.deadline_ns <= self._clock.now_ns():
            raise Refusal("SESSION_ENDED", f"session {session_id} has no live lease")
        return held

    def _target(self, source: Lease, target: str | None) -> tuple[Candidate, Resolution]:
        resolution = resolve(
            self.catalogue,
            source.terms.intent,
            self.ledger.slots_used(),
            only_aisi=source.terms.aisi,
            not_anchor=source.terms.anchor,
        )
        for candidate in resolution.candidates:
            if target in (None, candidate.anchor.name):
                return candidate, resolution
        if target == source.terms.anchor:
            raise Refusal("ALREADY_THERE", f"the session is at {target}")
        raise Refusal(
            "NO_CANDIDATE",
            f"{target or 'no other anchor'} cannot take {source.terms.aisi}",
            resolution.excluded,
        )

    def _grant(self, held: Lease, resolution: Resolution, steps: tuple[int, int, int]) -> Grant:
        enforced_ns = self._clock.now_ns()
        unix = self._clock.to_unix_ns
        token = aist.issue(
            self._key,
            ue=held.terms.ue,
            addresses=[str(flow.ue) for flow in held.terms.flows],
            aisi=held.terms.aisi,
            lease_id=held.terms.lease_id,
            epoch=held.terms.epoch,
            task=held.terms.intent.task,
            now_unix_ns=unix(self._clock.now_ns()),
            lease_expires_unix_ns=unix(held.deadline_ns),
        )
        timeline = Timeline(
            requested_unix_ns=unix(steps[0]),
            prepared_unix_ns=unix(steps[1]),
            committed_unix_ns=unix(steps[2]),
            enforced_unix_ns=unix(enforced_ns),
        )
        return Grant(lease=held, token=token, resolution=resolution, timeline=timeline)


def _taken_meanwhile(candidate: Candidate) -> Exclusion:
    """While a better candidate was asked, others took the last slot."""
    anchor: Anchor = candidate.anchor
    detail = f"all {anchor.slots} slots are taken"
    return Exclusion(candidate.service.aisi, anchor.name, "capacity", detail)


def _not_ready(candidate: Candidate) -> Exclusion:
    anchor: Anchor = candidate.anchor
    return Exclusion(candidate.service.aisi, anchor.name, "readiness", "did not say it is ready")
