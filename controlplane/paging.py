"""AI-paging: from an intent to an enforced lease.

DISCOVER and RESOLVE rank what can serve the intent; each candidate in turn is reserved and granted
(`granting`), the first whose anchor has room and is ready. Where capacity alone is short, a request
whose profile may pre-empt takes it from others.
"""

import hashlib
from dataclasses import replace

from controlplane.answers import Grant, Refusal
from controlplane.catalogue import Anchor, QosProfile, Service, profile_for
from controlplane.controller import Controller
from controlplane.enforcement import Flow
from controlplane.granting import Ask, Granter, NotReadyError, SinkRequest
from controlplane.intent import Intent, shared
from controlplane.lease import State
from controlplane.ledger import Session
from controlplane.metrics import Transaction
from controlplane.policy import (
    RateLimiter,
    Tenant,
    check_anchor,
    check_request,
    effective_arp,
)
from controlplane.ranking import Ranking
from controlplane.resolver import Candidate, Exclusion, Resolution, resolve
from controlplane.values import value

PAGE = "PAGE"  # the cause of a session's first lease, somebody having asked for it
FIRST_PACKET = "FIRST_PACKET"  # its cause where the UE just sent
NO_CHOICE = Resolution((), (), ())


@value(frozen=True, slots=True, kw_only=True)
class Page:
    """A request by intent."""

    tenant: str
    ue: str
    intent: Intent
    key: str | None = None  # idempotency key, as given
    sink: SinkRequest | None = None
    aisi: str | None = None  # only this service, and nobody asked: the UE sent to it


@value(frozen=True, slots=True, kw_only=True)
class QosRequest:
    """A request for QoS alone: the application knows its server (CAMARA Quality-on-Demand)."""

    tenant: str
    ue: str
    aisi: str  # stands for the server in epochs and evidence
    flows: tuple[Flow, ...]
    profile: str
    duration_ms: int
    request: str  # canonical JSON of what was asked, without credentials
    key: str | None = None
    sink: SinkRequest | None = None


class Pager:
    """Grants sessions."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._granter = Granter(controller)
        self._limiter = RateLimiter()
        self._ranking = Ranking(controller.catalogue)

    async def page(self, page: Page) -> Grant:
        """Resolve an intent and grant a lease. Raises Refusal."""
        kind = Transaction.PAGE if page.aisi is None else Transaction.FIRST_PACKET
        return await self._controller.measured.run(
            kind, self._page_once(page), ue=page.ue, tenant=page.tenant
        )

    async def qos(self, request: QosRequest) -> Grant:
        """Grant QoS alone. Raises Refusal."""
        return await self._controller.measured.run(
            Transaction.PAGE, self._qos(request), ue=request.ue, tenant=request.tenant
        )

    async def _page_once(self, page: Page) -> Grant:
        requested_ns = self._controller.clock.now_ns()
        key = hashed_key(page.tenant, page.key) if page.key is not None else None
        names = (page.ue,) if key is None else (page.ue, f"key:{key}")
        async with self._controller.locks.hold(*names):
            if key is not None and (known := self._controller.ledger.session_of_key(key)):
                return self._again(known, page.ue, page.intent, None)
            return await self._page(page, key, requested_ns)

    async def page_again(self, session: Session, cause: str) -> Grant:
        """Page anew for the intent of a session that no anchor can serve any more. Raises Refusal.

        The lock of its UE is held. The answer is of another service, and ends when the session
        would have.
        """
        controller = self._controller
        last = controller.committed(session.session_id)
        assert last.terms.intent is not None
        kept = controller.committer.store.sink(session.session_id)
        page = Page(
            tenant=session.tenant,
            ue=session.ue,
            intent=last.terms.intent,
            sink=None if kept is None else SinkRequest(uri=kept.uri, credential=kept.credential),
        )
        again = _Again(cause, last.deadline_ns, session.aisi)
        return await self._page(page, None, controller.clock.now_ns(), again)

    async def _qos(self, request: QosRequest) -> Grant:
        controller = self._controller
        requested_ns = controller.clock.now_ns()
        key = hashed_key(request.tenant, request.key) if request.key is not None else None
        names = (request.ue,) if key is None else (request.ue, f"key:{key}")
        async with controller.locks.hold(*names):
            if key is not None and (known := controller.ledger.session_of_key(key)):
                return self._again(known, request.ue, None, request.request)
            subscriber = controller.subscriber(request.ue)
            profile = self._profile(request.profile)
            tenant = self._admitted(request.tenant, None, profile, request.duration_ms)
            arp = effective_arp(profile, tenant)
            wanted = set(request.flows)
            ended = controller.ledger.lingering(request.ue)
            for session in (
                *controller.ledger.sessions(ue=request.ue),
                *(s for s in ended if s.tenant == request.tenant),
            ):
                if wanted & set(controller.ledger.leases_of(session)[-1].terms.flows):
                    raise Refusal("SESSION_EXISTS", f"{request.ue} has a session for such a flow")
            terms = controller.terms(
                cause=PAGE,
                tenant=tenant.name,
                subscriber=subscriber,
                aisi=request.aisi,
                anchor=None,
                flows=request.flows,
                profile=profile,
                arp=arp,
                request=request.request,
                key=key,
            )
            asked = Ask(terms, True, request.duration_ms, None, request.sink, NO_CHOICE)
            shortage = controller.reserve(terms)
            if shortage is None:
                return await self._granter.grant(asked, requested_ns)
            granted = None
            if arp.preemption_capability:
                granted = await self._granter.preempt(asked, arp, requested_ns)
            if granted is None:
                raise Refusal("NO_BANDWIDTH", str(shortage))
            return granted

    # Before anything is reserved

    def _again(self, known: Session, ue: str, intent: Intent | None, request: str | None) -> Grant:
        """Answer a request that was granted before."""
        controller = self._controller
        ledger = controller.ledger
        held = ledger.committed(known) or ledger.leases_of(known)[-1]
        if (held.terms.ue, held.terms.intent, held.terms.request) != (ue, intent, request):
            raise Refusal("KEY_REUSED", "another request was made under this idempotency key")
        token = None
        if held.state is State.COMMITTED and held.terms.anchor is not None:
            token = controller.issuer.issue(held)
        return Grant(lease=held, token=token, resolution=NO_CHOICE, timeline=None)

    def _profile(self, name: str) -> QosProfile:
        try:
            return self._controller.catalogue.profile(name)
        except KeyError:
            raise Refusal("QOS_PROFILE_UNKNOWN", f"there is no QoS profile {name}") from None

    def _admitted(
        self, tenant_name: str, intent: Intent | None, profile: QosProfile, duration_ms: int
    ) -> Tenant:
        """Return the tenant if its policy allows the request, whatever serves it."""
        controller = self._controller
        tenant = controller.tenant(tenant_name)
        if profile.status != "ACTIVE":
            raise Refusal("QOS_PROFILE_INACTIVE", f"QoS profile {profile.name} is not offered now")
        wait_s = self._limiter.admit(tenant, controller.clock.now_ns())
        if wait_s is not None:
            raise Refusal("RATE_LIMITED", f"{tenant.name} asks too often", retry_after_s=wait_s)
        self._check_request(tenant, intent, profile)
        controller.check_lease(tenant, duration_ms)
        controller.check_duration(profile, duration_ms)
        return tenant

    def _check_request(self, tenant: Tenant, intent: Intent | None, profile: QosProfile) -> None:
        """Raise Refusal unless a tenant may have one more session like this."""
        held = self._controller.ledger.held_by(tenant.name)
        breach = check_request(
            tenant.policy,
            task=None if intent is None else intent.task,
            qos_profile=profile.name,
            live_sessions=held.sessions,
            downlink_bps=held.downlink_bps + profile.guaranteed_downlink_bps,
            uplink_bps=held.uplink_bps + profile.guaranteed_uplink_bps,
        )
        if breach is not None:
            raise Refusal(breach.what, breach.detail)

    # The transaction

    async def _page(
        self,
        page: Page,
        key: str | None,
        requested_ns: int,
        again: "_Again | None" = None,
    ) -> Grant:
        controller, intent = self._controller, shared(page.intent)
        subscriber = controller.subscriber(page.ue)
        catalogue = controller.catalogue
        if not catalogue.services_for(intent.task):
            raise Refusal("TASK_UNKNOWN", f"no service does {intent.task}")
        profile = profile_for(catalogue, intent)
        if profile is None:
            named = intent.qos_profile or "with the rates required"
            raise Refusal("QOS_PROFILE_UNKNOWN", f"there is no QoS profile {named}")
        if again is None:
            tenant = self._admitted(page.tenant, intent, profile, intent.duration_ms)
        else:
            tenant = controller.tenant(page.tenant)
        arp = effective_arp(profile, tenant)
        cell = controller.cell(page.ue)
        resolution = self.resolve(tenant, intent, cell, only_aisi=page.aisi)
        cause = PAGE if page.aisi is None else FIRST_PACKET
        excluded = list(resolution.excluded)

        def ask(candidate: Candidate) -> Ask:
            service = candidate.service
            if controller.ledger.session_of(page.ue, service.aisi):
                raise Refusal(
                    "SESSION_EXISTS", f"{page.ue} already has a session with {service.aisi}"
                )
            terms = controller.terms(
                cause=cause if again is None else again.cause,
                tenant=tenant.name,
                subscriber=subscriber,
                aisi=service.aisi,
                anchor=candidate.anchor.name,
                flows=service.flows(subscriber.address4, subscriber.address6),
                profile=profile,
                arp=arp,
                intent=intent,
                key=key,
            )
            expires_ns = None if again is None else again.expires_ns
            choice = resolution
            if len(excluded) > len(resolution.excluded):
                choice = replace(resolution, excluded=tuple(excluded))
            return Ask(terms, candidate.ready, intent.duration_ms, expires_ns, page.sink, choice)

        def serves(candidate: Candidate) -> bool:
            return again is None or candidate.service.aisi != again.not_aisi

        def within_quota() -> None:
            if again is None:
                self._check_request(controller.tenant(page.tenant), intent, profile)

        for candidate in filter(serves, resolution.candidates):
            asked = ask(candidate)
            shortage = controller.reserve(asked.terms)
            if shortage is not None:
                excluded.append(_excluded(candidate, "capacity", str(shortage)))
                continue
            try:
                return await self._granter.grant(asked, requested_ns)
            except NotReadyError:
                excluded.append(_excluded(candidate, "readiness", "did not say it is ready"))
                within_quota()  # others have been served meanwhile
        if arp.preemption_capability:
            for candidate in filter(serves, (*resolution.candidates, *resolution.full)):
                asked = ask(candidate)
                if not (asked.ready or await self._granter.ready(asked.terms)):
                    continue
                within_quota()
                granted = await self._granter.preempt(asked, arp, requested_ns)
                if granted is not None:
                    return granted
        raise Refusal("NO_CANDIDATE", f"no anchor satisfies the intent for {intent.task}", excluded)

    def resolve(
        self,
        tenant: Tenant,
        intent: Intent,
        cell: str | None,
        *,
        only_aisi: str | None = None,
        not_anchor: str | None = None,
        leaving: str | None = None,
        unready: bool = False,
    ) -> Resolution:
        """Rank what can serve an intent now, under a tenant's policy; or soon, if `unready`.

        `leaving`: an anchor that is compared with others as if the session were at neither.
        """
        ledger = self._controller.ledger
        slots_used = ledger.pools.slots_used()
        if leaving is not None:
            slots_used = {**slots_used, leaving: slots_used.get(leaving, 1) - 1}

        def of_policy(service: Service, anchor: Anchor) -> tuple[str, str] | None:
            return check_anchor(tenant.policy, anchor)

        return resolve(
            self._controller.catalogue,
            intent,
            ledger.fleet.views(slots_used),
            only_aisi=only_aisi,
            not_anchor=not_anchor,
            unready=unready,
            cell=cell,
            extra=of_policy,
            rank=self._ranking,
        )


@value(frozen=True, slots=True)
class _Again:
    """What is different when a session is paged for anew."""

    cause: str
    expires_ns: int
    not_aisi: str


def hashed_key(tenant: str, key: str) -> str:
    """Return an idempotency key as it is kept: hashed with its tenant."""
    return hashlib.sha256(f"{tenant}\0{key}".encode()).hexdigest()[:32]


def _excluded(candidate: Candidate, constraint: str, detail: str) -> Exclusion:
    return Exclusion(candidate.service.aisi, candidate.anchor.name, constraint, detail)
