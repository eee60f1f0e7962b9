"""Relocation: a session moves to another anchor, and its UE notices nothing.

Make-before-break: PREPARE at the target, see it ready, COMMIT the next epoch and start to drain the
old lease (one write), flip (one kernel batch). If anything fails before the flip, nothing changes
for the UE. If the source has died there is nothing to keep: the session is anchored anew, which is
recovery and is called so. If no anchor of its service is left, the intent is paged for anew.
"""

import asyncio
from collections.abc import Awaitable
from contextlib import suppress

from controlplane import lease
from controlplane.answers import Grant, Refusal
from controlplane.catalogue import Strategy
from controlplane.clock import NS_PER_MS
from controlplane.committer import Change
from controlplane.controller import Controller
from controlplane.enforcement import (
    EnforcementError,
    Hold,
    Install,
    Move,
    Resume,
    Revoke,
)
from controlplane.facts import UplinkHeld, UplinkResumed
from controlplane.lease import Effect, EndReason, Lease, Outcome, State
from controlplane.ledger import Session
from controlplane.measured import KIND_OF_TRIGGER
from controlplane.metrics import Transaction
from controlplane.paging import Pager
from controlplane.parties import AnchorRefusedError
from controlplane.policy import Arp
from controlplane.resolver import Candidate, Resolution
from controlplane.triggers import Trigger, should_move

MOVED = "SESSION_MOVED"  # the cause of a refusal
BETTER = "better"  # as a target: only to where it is better
READY_POLL_S = 0.01  # between asking a target that is waited for


class Relocator:
    """Moves sessions."""

    def __init__(self, controller: Controller, pager: Pager) -> None:
        self._controller = controller
        self._pager = pager

    async def relocate(
        self,
        session_id: str,
        target: str | None = None,
        *,
        trigger: Trigger = Trigger.REQUEST,
        break_before_make: bool = False,
    ) -> Grant:
        """Move a session to `target`; to the best other anchor (None), or only if it is BETTER.

        Raises Refusal; the session is as it was then, unless the kernel refused.
        """
        if break_before_make and not self._controller.settings.allow_break_before_make:
            raise Refusal("NOT_ALLOWED", "break-before-make exists for experiments only")
        work = self._relocate(session_id, target, trigger, break_before_make, None)
        return await self._measured(trigger, work, session_id)

    async def recover(self, held: Lease) -> Grant:
        """Anchor a session anew whose lease is at a dead anchor.

        Raises Refusal if nothing can serve it, or it has another lease by now.
        """
        return await self._measured(Trigger.FAILURE, self._recover(held), held.terms.session_id)

    async def leave(self, held: Lease, trigger: Trigger, otherwise: EndReason | None) -> None:
        """Move a session away from where it must not stay: relocate, or page anew.

        Where neither works it ends for the reason `otherwise`; None: it stays while it can.
        Nothing happens if it has another lease by now. Raises Refusal.
        """
        session_id = held.terms.session_id
        try:
            work = self._relocate(session_id, None, trigger, False, held)
            await self._measured(trigger, work, session_id)
        except Refusal as refusal:
            if refusal.cause in (MOVED, "SESSION_ENDED", "SESSION_UNKNOWN", "ENFORCEMENT_FAILED"):
                return
            async with self._controller.locks.hold(held.terms.ue):
                session = self._still(held)
                await self._page_again(session, otherwise, trigger)

    async def _measured(self, trigger: Trigger, work: Awaitable[Grant], session_id: str) -> Grant:
        kind = KIND_OF_TRIGGER.get(trigger, Transaction.RELOCATION_PLANNED)
        return await self._controller.measured.run(kind, work, session_id=session_id)

    def _still(self, held: Lease) -> Session:
        """Return the session of a lease that is still the one it has. Raises Refusal."""
        now = self._controller.committed(held.terms.session_id)
        if now.terms.lease_id != held.terms.lease_id:
            raise Refusal(MOVED, f"the session has moved to {now.terms.anchor} meanwhile")
        return self._controller.session(held.terms.session_id)

    async def _relocate(
        self,
        session_id: str,
        target: str | None,
        trigger: Trigger,
        break_before_make: bool,
        only_from: Lease | None,
    ) -> Grant:
        controller = self._controller
        requested_ns = controller.clock.now_ns()
        async with controller.locks.hold(controller.session(session_id).ue):
            if only_from is not None:
                self._still(only_from)
            source = controller.committed(session_id)
            resolution, candidates = self._targets(source, target)
            refusals = []
            for candidate in candidates:
                prepared = self._prepare(source, candidate, trigger)
                shortage = controller.reserve(prepared.lease.terms)
                if shortage is not None:
                    refusals.append(Refusal("NO_CANDIDATE", str(shortage), resolution.excluded))
                    continue
                try:
                    return await self._move(
                        source, prepared, resolution, requested_ns, break_before_make
                    )
                except Refusal as refusal:
                    if refusal.cause != "ANCHOR_NOT_READY" or break_before_make:
                        raise
                    refusals.append(refusal)
            raise refusals[-1]

    async def _recover(self, dead: Lease) -> Grant:
        controller, trigger = self._controller, Trigger.FAILURE
        requested_ns = controller.clock.now_ns()
        async with controller.locks.hold(dead.terms.ue):
            session = self._still(dead)
            source = controller.committed(session.session_id)
            try:
                resolution, candidates = self._targets(source, None)
            except Refusal:
                return await self._page_again(session, EndReason.ANCHOR_FAILED, trigger)
            for candidate in candidates:
                prepared = self._prepare(source, candidate, trigger)
                terms = prepared.lease.terms
                if controller.reserve(terms) is not None:
                    continue
                try:
                    if not (
                        candidate.ready or await controller.ready(candidate.anchor.name, terms.aisi)
                    ):
                        continue
                    prepared_ns = controller.clock.now_ns()
                    granted = controller.commit(prepared.lease, source.deadline_ns)
                    ended = [
                        lease.step(held, lease.Revoke(EndReason.ANCHOR_FAILED), prepared_ns)
                        for held in controller.ledger.leases_of(session)
                        if held.state in (State.COMMITTED, State.DRAINING)
                    ]
                    closing = controller.closing(ended)
                    change = Change(
                        [*prepared.events, *granted.events, *closing.events],
                        [Revoke(source.binding()), Install(granted.lease.binding())],
                    )
                    done = await controller.enforce(session.session_id, change)
                finally:
                    controller.unreserve(terms)
                return controller.answer(granted.lease, resolution, requested_ns, prepared_ns, done)
            return await self._page_again(session, EndReason.ANCHOR_FAILED, trigger)

    # Steps

    def _targets(self, source: Lease, target: str | None) -> tuple[Resolution, list[Candidate]]:
        controller, terms = self._controller, source.terms
        if terms.anchor is None or terms.intent is None:
            raise Refusal("NOT_ANCHORED", "a session for QoS alone is at no anchor")
        if target == terms.anchor:
            raise Refusal("ALREADY_THERE", f"the session is at {target}")
        tenant, cell = controller.tenant(terms.tenant), controller.cell(terms.ue)
        if target == BETTER:
            found = self._pager.resolve(
                tenant, terms.intent, cell, only_aisi=terms.aisi, leaving=terms.anchor
            )
            here = next((c for c in found.candidates if c.anchor.name == terms.anchor), None)
            others = [c for c in found.candidates if c.anchor.name != terms.anchor]
            better = [
                c for c in others if should_move(None if here is None else here.score, c.score)
            ]
            if not better:
                raise Refusal(
                    "NO_BETTER_ANCHOR",
                    f"no anchor is better than {terms.anchor} by enough",
                    found.excluded,
                )
            return found, better
        found = self._pager.resolve(
            tenant, terms.intent, cell, only_aisi=terms.aisi, not_anchor=terms.anchor
        )
        fitting = [c for c in found.candidates if target in (None, c.anchor.name)]
        if not fitting and self._strategy(terms.aisi) is Strategy.BUFFER:
            found = self._pager.resolve(
                *(tenant, terms.intent, cell),
                only_aisi=terms.aisi,
                not_anchor=terms.anchor,
                unready=True,
            )
            fitting = [c for c in found.candidates if target in (None, c.anchor.name)]
        if not fitting:
            raise Refusal(
                "NO_CANDIDATE",
                f"{target or 'no other anchor'} cannot take {terms.aisi}",
                found.excluded,
            )
        return found, fitting

    def _prepare(self, source: Lease, candidate: Candidate, trigger: Trigger) -> Outcome:
        controller, terms = self._controller, source.terms
        return controller.prepare(
            controller.terms(
                cause=trigger.value,
                tenant=terms.tenant,
                subscriber=controller.subscriber(terms.ue),
                aisi=terms.aisi,
                anchor=candidate.anchor.name,
                flows=terms.flows,
                profile=controller.catalogue.profile(terms.qos_profile),
                arp=Arp(
                    priority_level=terms.priority_level,
                    preemption_vulnerability=terms.preemptible,
                ),
                session_id=terms.session_id,
                intent=terms.intent,
                key=terms.key,
            ),
            longer_ms=controller.settings.buffer_ms
            if self._strategy(terms.aisi) is Strategy.BUFFER
            else 0,
        )

    def _strategy(self, aisi: str) -> Strategy:
        return self._controller.catalogue.service(aisi).relocation

    async def _move(
        self,
        source: Lease,
        prepared: Outcome,
        resolution: Resolution,
        requested_ns: int,
        break_before_make: bool,
    ) -> Grant:
        """Move to where it is reserved."""
        controller, terms = self._controller, prepared.lease.terms
        assert terms.anchor is not None
        try:
            if break_before_make:
                session = controller.session(terms.session_id)
                draining = controller.ledger.in_state(session, State.DRAINING)
                await controller.end([*draining, source], lease.Revoke())
            if self._strategy(terms.aisi) is Strategy.BUFFER and not break_before_make:
                await controller.committer.submit(Change(prepared.events))
                ready = await self._ready_or_held(source, terms.anchor)
            else:
                ready = await controller.ready_when_prepared(prepared)
            if not ready:
                await controller.abort(prepared.lease)
                raise Refusal("ANCHOR_NOT_READY", f"{terms.anchor} is not ready")
            prepared_ns = controller.clock.now_ns()
            try:
                if source.deadline_ns <= prepared_ns:
                    raise Refusal("SESSION_ENDED", "it expired while the target got ready")
                granted = controller.commit(prepared.lease, source.deadline_ns)
                change = self._flip(granted, source, prepared_ns, break_before_make)
            except Refusal:
                await controller.abort(prepared.lease)
                raise
            done = await controller.enforce(terms.session_id, change)
        finally:
            controller.unreserve(terms)
        return controller.answer(granted.lease, resolution, requested_ns, prepared_ns, done)

    async def _ready_or_held(self, source: Lease, target: str) -> bool:
        """Return whether a target is ready; while it is not, the uplink is held, for a while.

        If it is not in time, what was held goes on to where it was going.
        """
        controller, aisi, lease_id = self._controller, source.terms.aisi, source.terms.lease_id

        async def ready() -> bool:
            try:
                return await controller.gateway.ready(target, aisi)
            except AnchorRefusedError:  # not up yet, which is no failure
                return False

        if await ready():
            return True
        until_ns = controller.clock.now_ns() + controller.settings.buffer_ms * NS_PER_MS
        until_ns = min(until_ns, source.deadline_ns)
        try:
            held = Change([UplinkHeld(lease_id, until_ns)], [Hold(source.binding(), until_ns)])
            await controller.committer.submit(held)
        except EnforcementError:  # not by this user plane
            return False
        while controller.clock.now_ns() < until_ns:
            await asyncio.sleep(READY_POLL_S)
            if await ready():
                return True
        with suppress(EnforcementError):  # then it ends by itself
            resumed = Change([UplinkResumed(lease_id)], [Resume(source.binding())])
            await controller.committer.submit(resumed)
        return False

    def _flip(
        self, granted: Outcome, source: Lease, now_ns: int, break_before_make: bool
    ) -> Change:
        if break_before_make:
            return Change(granted.events, [Install(granted.lease.binding())])
        settings = self._controller.settings
        flips = self._strategy(source.terms.aisi) is Strategy.FLIP
        drain_ms = settings.flip_drain_ms if flips else settings.drain_ms
        drain_until_ns = now_ns + drain_ms * NS_PER_MS
        drained = lease.step(source, lease.Supersede(drain_until_ns), now_ns)
        assert Effect.DRAIN in drained.effects
        flip = Move(granted.lease.binding(), source.binding(), drained.lease.deadline_ns)
        return Change([*granted.events, *drained.events], [flip])

    async def _page_again(
        self, session: Session, otherwise: EndReason | None, trigger: Trigger
    ) -> Grant:
        """Page for a session's intent anew; end the session if that, or nothing, serves it."""
        controller = self._controller
        try:
            grant = await self._pager.page_again(session, trigger.value)
        except Refusal:
            if otherwise is not None:
                await controller.take_back(session, otherwise)
            raise
        await controller.take_back(session, EndReason.REPAGED)
        return grant
