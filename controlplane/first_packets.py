"""First-packet paging: a UE with a subscription just sends, and is paged for.

The user plane parks what a subscription sends without a lease and says so, once. The subscription's
own intent is paged for then, under the same policy and quotas as any page. A lease lets the packets
go on; a refusal drops them and is not tried again for a while.
"""

import asyncio
import logging

from controlplane.answers import Refusal
from controlplane.catalogue import Service
from controlplane.clock import NS_PER_MS
from controlplane.controller import Controller
from controlplane.enforcement import EnforcementError, FirstPackets, Flow
from controlplane.paging import Page, Pager
from controlplane.parties import Subscriber, Subscription
from controlplane.store import StoreError

# A lease ends in the kernel a little before the log says so: wait for that, and for no longer.
ENDING_NS = 50 * NS_PER_MS
ENDING_POLL_S = 0.005
ENDING_TRIES = 40

log = logging.getLogger(__name__)


class FirstPacketPager:
    """Pages for subscriptions. Call `wait` before the user plane closes."""

    def __init__(self, controller: Controller, pager: Pager, user_plane: FirstPackets) -> None:
        self._controller = controller
        self._pager = pager
        self._user_plane = user_plane
        self._paging: dict[tuple[str, str], asyncio.Task[None]] = {}  # by UE and AISI
        self._by_flow: dict[Flow, tuple[Subscriber, Subscription, Service]] = {}
        for subscriber in controller.subscribers.values():
            for subscription in subscriber.subscriptions:
                service = controller.catalogue.service(subscription.aisi)
                for flow in service.flows(subscriber.address4, subscriber.address6):
                    self._by_flow[flow] = (subscriber, subscription, service)

    def start(self) -> None:
        """Listen to the user plane, from the running event loop."""
        self._user_plane.on_first_packet(self.page)

    def page(self, flow: Flow) -> None:
        """Page for a flow, unless that is being done; what has no subscription expires."""
        found = self._by_flow.get(flow)
        if found is None:
            return
        subscriber, subscription, service = found
        pair = (subscriber.ue, service.aisi)
        if pair not in self._paging:
            work = self._page(subscriber, subscription, service)
            task = self._paging[pair] = asyncio.create_task(work, name="first-packet")
            task.add_done_callback(lambda _: self._paging.pop(pair, None))

    async def wait(self) -> None:
        """Return when all that was begun is done."""
        self._user_plane.on_first_packet(lambda flow: None)
        while self._paging:
            await asyncio.wait(list(self._paging.values()))

    async def _page(
        self, subscriber: Subscriber, subscription: Subscription, service: Service
    ) -> None:
        page = Page(
            tenant=subscriber.tenant,
            ue=subscriber.ue,
            intent=subscription.intent,
            aisi=service.aisi,
        )
        try:
            if await self._unleased(page.ue, service.aisi):
                await self._pager.page(page)
        except Refusal as refusal:
            backoff_ms = self._controller.settings.refused_ms
            if refusal.retry_after_s is not None:
                backoff_ms = max(1, round(refusal.retry_after_s * 1_000))
            log.info("first packet of %s to %s refused: %s", page.ue, page.aisi, refusal.cause)
            flows = service.flows(subscriber.address4, subscriber.address6)
            try:
                await self._user_plane.refuse(flows, backoff_ms)
            except EnforcementError as error:
                log.warning("%s", error)  # the packets expire
        except StoreError as error:
            log.error("%s", error)  # nothing is granted; the packets expire

    async def _unleased(self, ue: str, aisi: str) -> bool:
        """Return whether a UE has no lease for a service, once what is ending has ended."""
        controller = self._controller
        for _ in range(ENDING_TRIES):
            session = controller.ledger.session_of(ue, aisi)
            if session is None:
                return True
            held = controller.ledger.committed(session)
            if held is not None and held.deadline_ns > controller.clock.now_ns() + ENDING_NS:
                return False  # its packets go on
            await asyncio.sleep(ENDING_POLL_S)
        return True
