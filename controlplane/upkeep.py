"""Upkeep: what happens without being asked for.

Leases end when they are due, their counts read while the kernel still has them; anchors that fall
silent are failed, and their sessions anchored anew; draining and overloaded anchors are left; a UE
that has moved is followed. `Keeper.run` is the one task that waits for time to pass; what it starts
are ordinary transactions.
"""

import asyncio
import logging
from collections.abc import Collection, Coroutine, Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from controlplane import lease
from controlplane.answers import Refusal
from controlplane.clock import NS_PER_MS, NS_PER_S
from controlplane.committer import Change
from controlplane.controller import Controller
from controlplane.enforcement import EnforcementError
from controlplane.facts import PolicySet, UeMoved
from controlplane.fleet import AnchorEvent, AnchorFailed, AnchorRegistered, Heartbeat
from controlplane.lease import EndReason, Lease, State
from controlplane.ledger import demand
from controlplane.parties import AnchorRefusedError
from controlplane.policy import Policy, check_anchor, check_request
from controlplane.relocation import BETTER, Relocator
from controlplane.resolver import AnchorState
from controlplane.store import StoreError
from controlplane.triggers import Trigger, Triggers

PROBE_NS = 1_000 * NS_PER_MS  # between questions to a failed anchor that sends no heartbeats
MAX_WAIT_S = 60.0
RETRY_S = 0.1
MAX_ENDING = 256  # leases that end in one change
MAX_MOVING = 64  # transactions that it has under way at a time
OPEN = (State.COMMITTED, State.DRAINING)

log = logging.getLogger(__name__)


class Keeper:
    """Keeps deadlines, watches anchors, moves sessions."""

    def __init__(
        self,
        controller: Controller,
        relocator: Relocator,
        triggers: Triggers,
        cells: Collection[str],
    ) -> None:
        """`cells`: the gNBs there are."""
        self._controller = controller
        self._cells = cells
        self._relocator = relocator
        self._triggers = triggers
        self._changed = asyncio.Event()
        self._moving = asyncio.Semaphore(MAX_MOVING)
        self._tasks: set[asyncio.Task[None]] = set()
        self._probe_ns = 0  # when failed anchors are asked next
        # When every session is looked at next, because something for it was not done.
        self._look_ns: int | None = 0
        controller.changed = controller.ledger.deadlines.sooner = self._changed.set
        controller.granted = self._look
        controller.refused = self._refused

    async def run(self) -> None:
        """Keep on until cancelled."""
        try:
            while True:
                self._changed.clear()
                try:
                    wait_s = await self._round()
                except (StoreError, EnforcementError) as error:
                    log.error("upkeep: %s", error)
                    wait_s = RETRY_S
                except Exception:  # whatever it was, deadlines are kept
                    log.exception("upkeep failed, and goes on")
                    wait_s = RETRY_S
                with suppress(TimeoutError):
                    async with asyncio.timeout(max(wait_s, 0)):
                        await self._changed.wait()
        finally:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # What others report

    async def heartbeat(self, anchor: str, heartbeat: Heartbeat) -> None:
        """Take an anchor's heartbeat. Raises FleetError for one that nobody registered."""
        ledger, now_ns = self._controller.ledger, self._controller.clock.now_ns()
        monitored = ledger.fleet.next_check_ns is not None
        events = ledger.fleet.heartbeat(anchor, now_ns, heartbeat)
        if events:
            await self.record(events)
        for pressure in self._triggers.heartbeat(anchor, heartbeat, now_ns):
            sessions = [held.terms.session_id for held in self._leases_at(anchor)]
            for session_id in self._triggers.choose(pressure, sessions, now_ns):
                self._start(self._move(session_id, pressure.trigger))
        if not monitored:
            self._changed.set()

    async def record(self, events: Iterable[AnchorEvent]) -> None:
        """Make changes of the fleet durable, and do what they call for."""
        events = list(events)
        await self._controller.committer.submit(Change(events))
        for event in events:
            self._follow(event)
        self._changed.set()

    async def moved(self, ue: str, cell: str) -> None:
        """Take a mobility report: the UE is served by this gNB now. Raises Refusal.

        Sessions whose guaranteed rates the new cell has no room for end; the others follow the UE
        to better anchors, where there are any.
        """
        controller, ledger = self._controller, self._controller.ledger
        if controller.subscriber(ue).cell is not None and cell not in self._cells:
            raise Refusal("CELL_UNKNOWN", f"there is no gNB {cell}")
        async with controller.locks.hold(ue):
            if controller.cell(ue) == cell:
                return
            await self._hand_over(ue, cell)
        sessions = [session.session_id for session in ledger.sessions(ue=ue)]
        for session_id in self._triggers.handover(sessions, controller.clock.now_ns()):
            self._start(self._move(session_id, Trigger.HANDOVER))
        self._changed.set()

    async def _hand_over(self, ue: str, cell: str) -> None:
        """Move what a UE's sessions hold to another cell; those that have no room there end.

        The most important are served first. What they take is reserved until it is theirs.
        """
        controller, ledger = self._controller, self._controller.ledger
        now_ns = controller.clock.now_ns()
        outcomes: list[lease.Outcome] = []
        reserved: list[str] = []
        open_leases = [
            live
            for session in ledger.sessions(ue=ue)
            if (live := [held for held in ledger.leases_of(session) if held.state in OPEN])
        ]
        open_leases.sort(key=lambda live: live[-1].terms.priority_level)
        try:
            for live in open_leases:
                terms = live[-1].terms
                needs = replace(demand(terms), cell=cell, anchor=None)
                place = f"handover:{terms.session_id}"
                if ledger.pools.try_reserve(place, terms.session_id, needs) is None:
                    reserved.append(place)
                else:
                    revoke = lease.Revoke(EndReason.CELL_FULL)
                    outcomes += [lease.step(held, revoke, now_ns) for held in live]
            closing = controller.closing(outcomes)
            await controller.submit(
                Change([*closing.events, UeMoved(ue, cell)], closing.operations)
            )
        finally:
            for place in reserved:
                ledger.pools.release(place)

    async def set_policy(self, tenant: str, policy: Policy) -> None:
        """Give a tenant another policy; sessions that it does not allow are moved, or end."""
        await self._controller.committer.submit(Change([PolicySet(tenant, policy)]))
        for session in self._controller.ledger.sessions(tenant=tenant):
            held = self._controller.ledger.committed(session)
            if held is not None:
                self._look(held)

    # Rounds

    async def _round(self) -> float:
        """Do what is due; return how long there is nothing to do, s."""
        controller = self._controller
        ledger, clock = controller.ledger, controller.clock
        waits_ns = [int(MAX_WAIT_S * NS_PER_S)]
        try:
            await controller.repair()
        except EnforcementError as error:
            log.error("upkeep: %s", error)
            waits_ns.append(int(RETRY_S * NS_PER_S))
        now_ns = clock.now_ns()
        if self._look_ns is not None and self._look_ns <= now_ns:
            self._look_ns = None
            for held in ledger.live():
                self._look(held)
        failed = ledger.fleet.check(now_ns)
        if failed:
            await self.record(failed)
        now_ns = clock.now_ns()
        due = ledger.deadlines.due(now_ns)
        for held in due:
            ledger.deadlines.watch(held, now_ns)  # until it ends
        soon = [held for held in due if held.deadline_ns > now_ns]
        if soon:
            try:
                await controller.committer.sample(soon)
            except EnforcementError as error:
                log.error("upkeep: no counts: %s", error)
        over = [held for held in due if held.deadline_ns <= now_ns]
        if over:
            await self._expire(over)
        ledger.forget(clock.now_ns())
        for session_id in self._triggers.due(clock.now_ns()):
            self._start(self._move(session_id, Trigger.HANDOVER))
        to_probe = ledger.fleet.to_probe()
        if to_probe and clock.now_ns() >= self._probe_ns:
            self._probe_ns = clock.now_ns() + PROBE_NS
            for anchor in to_probe:
                self._start(self._probe(anchor))
        now_ns = clock.now_ns()
        if self._look_ns is not None:
            waits_ns.append(self._look_ns - now_ns)
        if (attention_ns := ledger.deadlines.next_ns()) is not None:
            waits_ns.append(attention_ns - now_ns)
        if (check_ns := ledger.fleet.next_check_ns) is not None:
            waits_ns.append(check_ns - now_ns)
        if (handover_ns := self._triggers.next_due_ns()) is not None:
            waits_ns.append(handover_ns - now_ns)
        if to_probe:
            waits_ns.append(self._probe_ns - now_ns)
        return min(waits_ns) / NS_PER_S

    async def _expire(self, leases: list[Lease]) -> None:
        """End leases that are due: the kernel has closed them by then, their slots become free."""
        ledger, locks = self._controller.ledger, self._controller.locks
        for start in range(0, len(leases), MAX_ENDING):
            # Where a transaction of the UE is under way, it is tried again soon.
            part = [
                held for held in leases[start : start + MAX_ENDING] if not locks.held(held.terms.ue)
            ]
            async with locks.hold(*(held.terms.ue for held in part)):
                now = [ledger.lease(held.terms.lease_id) for held in part]
                over = [held for held in now if held.state is not State.ENDED]
                if over:
                    await self._controller.end(over, lease.Tick())

    # Anchors

    def _refused(self, anchor: str, why: str) -> None:
        """Take it that nobody serves at an anchor."""
        now_ns = self._controller.clock.now_ns()
        events = self._controller.ledger.fleet.suspect(anchor, why, now_ns)
        if events:
            self._start(self.record(events))
        self._changed.set()

    async def _probe(self, anchor: str) -> None:
        """Ask a failed anchor whether it is there again."""
        controller = self._controller
        described = controller.ledger.fleet.anchor(anchor)
        if described is None:
            return
        with suppress(AnchorRefusedError):
            if await controller.gateway.ready(anchor, described.hosts[0].aisi):
                now_ns = controller.clock.now_ns()
                events = controller.ledger.fleet.answered(anchor, now_ns)
                if events:
                    await self.record(events)

    # Moves

    def _follow(self, event: AnchorEvent) -> None:
        """Start what a change of an anchor calls for."""
        trigger = self._triggers.of_event(event)
        if trigger is None:
            return
        assert not isinstance(event, AnchorRegistered)
        for held in self._leases_at(event.name):
            if isinstance(event, AnchorFailed):
                self._start(self._recover(held))
            else:
                self._start(self._relocator.leave(held, trigger, None))

    async def _recover(self, held: Lease) -> None:
        grant = await self._relocator.recover(held)
        self._triggers.moved(grant.lease.terms.session_id, self._controller.clock.now_ns())

    async def _move(self, session_id: str, trigger: Trigger) -> None:
        with suppress(Refusal):  # nowhere better: it stays
            await self._relocator.relocate(session_id, BETTER, trigger=trigger)
            self._triggers.moved(session_id, self._controller.clock.now_ns())

    async def _check_policy(self, held: Lease, policy: Policy) -> None:
        terms = held.terms
        session = self._controller.session(terms.session_id)
        if _forbidden(terms, policy):
            async with self._controller.locks.hold(terms.ue):
                await self._controller.take_back(session, EndReason.POLICY)
        else:
            await self._relocator.leave(held, Trigger.POLICY, EndReason.POLICY)

    def _look(self, held: Lease) -> None:
        """Start what must happen to a session that cannot stay where it is.

        To be asked of every new lease, too: what it was decided on may have changed meanwhile.
        """
        terms, ledger = held.terms, self._controller.ledger
        if held.state is not State.COMMITTED:
            return
        state = AnchorState.UP if terms.anchor is None else ledger.fleet.state(terms.anchor)
        policy = ledger.policies.get(terms.tenant)
        if state is AnchorState.DOWN:
            self._start(self._recover(held))
        elif policy is not None and (_forbidden(terms, policy) or self._misplaced(terms, policy)):
            self._start(self._check_policy(held, policy))
        elif state is not AnchorState.UP:  # it drains, or is offered no more
            self._start(self._relocator.leave(held, Trigger.DRAIN, None))

    def _misplaced(self, terms: lease.Terms, policy: Policy) -> bool:
        anchor = (
            None if terms.anchor is None else self._controller.ledger.fleet.anchor(terms.anchor)
        )
        return anchor is not None and check_anchor(policy, anchor) is not None

    def _leases_at(self, anchor: str) -> list[Lease]:
        return [
            held
            for held in self._controller.ledger.at_anchor(anchor)
            if held.state is State.COMMITTED
        ]

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(self._bounded(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _bounded(self, work: Coroutine[Any, Any, None]) -> None:
        async with self._moving:
            try:
                await work
            except Refusal as refusal:
                log.warning("upkeep: %s: %s", refusal.cause, refusal)
            except (StoreError, EnforcementError) as error:
                log.error("upkeep: %s", error)
                self._look_ns = self._controller.clock.now_ns() + PROBE_NS
                self._changed.set()


def _forbidden(terms: lease.Terms, policy: Policy) -> bool:
    """Whether a tenant may not have such a session any more."""
    task = None if terms.intent is None else terms.intent.task
    breach = check_request(policy, task=task, qos_profile=terms.qos_profile, live_sessions=0)
    return breach is not None
