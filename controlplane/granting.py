"""Granting: what was asked for at one candidate becomes a lease, in two phases.

PREPARE reserves an anchor's slot and bandwidth on the path, or neither; COMMIT grants the lease.
An anchor that says in its heartbeats that it is ready needs no asking: both phases are one write
then. A request whose profile may pre-empt (ARP, TS 23.501, 5.7.2.2) takes what it lacks from leases
of lower priority.
"""

from collections.abc import Sequence

from controlplane import lease
from controlplane.admission import Holder
from controlplane.answers import Grant, Refusal
from controlplane.clock import NS_PER_MS
from controlplane.committer import Change
from controlplane.controller import Controller
from controlplane.enforcement import Install
from controlplane.lease import EndReason, State, Terms
from controlplane.ledger import Session, demand
from controlplane.policy import Arp
from controlplane.resolver import Resolution
from controlplane.store import Sink
from controlplane.values import value

PREEMPTION = "preemption:"  # a lock


@value(frozen=True, slots=True, kw_only=True)
class SinkRequest:
    """Where notices about a session shall go; the credential is JSON, and a secret."""

    uri: str
    credential: str | None


@value(frozen=True, slots=True)
class Ask:
    """What is asked for at one candidate."""

    terms: Terms
    ready: bool | None  # what the anchor has said; None: it must be asked
    duration_ms: int
    expires_ns: int | None  # given, or `duration_ms` from now
    sink: SinkRequest | None
    choice: Resolution

    def expires(self, now_ns: int) -> int:
        """Return when the lease shall end."""
        if self.expires_ns is not None:
            return self.expires_ns
        return now_ns + self.duration_ms * NS_PER_MS

    def sink_of_session(self) -> Sink | None:
        """Return where notices shall go."""
        if self.sink is None:
            return None
        return Sink(self.terms.session_id, self.sink.uri, self.sink.credential)


class NotReadyError(Exception):
    """An anchor did not say that it is ready."""


class Granter:
    """Grants what fits, and what may take the place of others."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    async def grant(self, asked: Ask, requested_ns: int) -> Grant:
        """Grant what is reserved. Raises Refusal, or NotReadyError; nothing is reserved then."""
        controller, terms = self._controller, asked.terms
        prepared = controller.prepare(terms)
        held, events = prepared.lease, prepared.events
        try:
            if not asked.ready:
                if not await controller.ready_when_prepared(prepared):
                    await controller.abort(held)
                    raise NotReadyError
                events = ()
            prepared_ns = controller.clock.now_ns()
            try:
                granted = controller.commit(held, asked.expires(prepared_ns))
            except Refusal:
                await controller.abort(held)
                raise
            install = Install(granted.lease.binding())
            # With the COMMIT: what is rolled back leaves no sink behind.
            change = Change([*events, *granted.events], [install], asked.sink_of_session())
            done = await controller.enforce(terms.session_id, change)
        finally:
            controller.unreserve(terms)
        return controller.answer(granted.lease, asked.choice, requested_ns, prepared_ns, done)

    async def preempt(self, asked: Ask, arp: Arp, requested_ns: int) -> Grant | None:
        """Grant with the capacity of others; None if there are none whose capacity would do.

        One at a time: what the one before takes must have ended before the next one counts.
        """
        async with self._controller.locks.hold(PREEMPTION):
            victims = self._victims(asked.terms, arp)
            if victims is None:
                return None
            return await self._grant_over(victims, asked, requested_ns)

    async def _grant_over(self, victims: Sequence[Session], asked: Ask, requested_ns: int) -> Grant:
        """Grant in place of leases of lower priority, whose locks nobody holds: one write.

        They hold what they have until they have ended: the pools are overdrawn meanwhile, so that
        nobody else takes it.
        """
        controller, terms, now_ns = self._controller, asked.terms, self._controller.clock.now_ns()
        ledger = controller.ledger
        async with controller.locks.hold(*(session.ue for session in victims)):
            revoke = lease.Revoke(EndReason.PREEMPTED)
            closing = controller.closing(
                lease.step(held, revoke, now_ns)
                for session in victims
                for held in ledger.leases_of(session)
                if held.state in (State.COMMITTED, State.DRAINING)
            )
            ledger.pools.hold(terms.lease_id, terms.session_id, demand(terms))
            ledger.expect(terms)
            try:
                prepared = controller.prepare(terms)
                granted = controller.commit(prepared.lease, asked.expires(now_ns))
                change = Change(
                    [*closing.events, *prepared.events, *granted.events],
                    [*closing.operations, Install(granted.lease.binding())],
                    asked.sink_of_session(),
                )
                done = await controller.enforce(terms.session_id, change)
            finally:
                controller.unreserve(terms)
        return controller.answer(granted.lease, asked.choice, requested_ns, now_ns, done)

    def _victims(self, terms: Terms, arp: Arp) -> list[Session] | None:
        """Return whose capacity would do, of those that nothing else happens to; None: nobody's.

        Empty: there is enough as things are.
        """
        controller = self._controller
        ledger = controller.ledger
        holders = [
            Holder(
                lease_id=held.terms.lease_id,
                session_id=held.terms.session_id,
                priority_level=held.terms.priority_level,
                vulnerable=held.terms.preemptible,
            )
            for held in ledger.live()
            if held.state is State.COMMITTED and not controller.locks.held(held.terms.ue)
        ]
        found = ledger.pools.victims(demand(terms), terms.session_id, arp.priority_level, holders)
        if found is None:
            return None
        ids = dict.fromkeys(ledger.lease(lease_id).terms.session_id for lease_id in found)
        return [session for session_id in ids if (session := ledger.session(session_id))]

    async def ready(self, terms: Terms) -> bool:
        """Ask the anchor of a lease to be whether it is ready."""
        assert terms.anchor is not None
        return await self._controller.ready(terms.anchor, terms.aisi)
