"""First-packet paging: a UE with a subscription just sends."""

from fakes import World, intent, scenario
from test_relocation import TWO_SERVICES

from controlplane.enforcement import Flow
from controlplane.lease import EndReason, Lease, State
from controlplane.metrics import Transaction
from controlplane.parties import Subscription
from controlplane.policy import Policy

CHAT = Subscription("chat", intent(duration_ms=1_000))


def flows(world: World, ue: str = "ue1", aisi: str = "chat") -> tuple[Flow, ...]:
    subscriber = world.controller.subscribers[ue]
    service = world.catalogue.service(aisi)
    return service.flows(subscriber.address4, subscriber.address6)


def leases(world: World) -> list[Lease]:
    every = [*world.ledger.sessions(ue="ue1"), *world.ledger.lingering("ue1")]
    return [lease for session in every for lease in world.ledger.leases_of(session)]


@scenario(subscription=CHAT)
async def test_a_first_packet_is_paged_for_once(world: World) -> None:
    ipv4, ipv6 = flows(world)
    for flow in (ipv4, ipv6, ipv4):
        world.first_packets.sends(flow)
    await world.sleep(10)
    assert world.states() == {"edge1@1": State.COMMITTED}
    terms = leases(world)[0].terms
    assert (terms.cause, terms.aisi, terms.intent) == ("FIRST_PACKET", "chat", CHAT.intent)
    assert world.first_packets.refused == []
    # What came while the lease was on its way needs nothing more.
    world.first_packets.sends(ipv4)
    await world.sleep(10)
    assert len(leases(world)) == 1
    assert not world.verdict().problems


@scenario(subscription=CHAT)
async def test_one_that_comes_as_a_lease_ends_gets_the_next(world: World) -> None:
    """The kernel ends a lease a moment before the log says so."""
    world.first_packets.sends(flows(world)[0])
    await world.sleep(999)
    world.first_packets.sends(flows(world)[0])
    await world.sleep(20)
    assert world.states() == {"edge1@1": EndReason.EXPIRED, "edge1@2": State.COMMITTED}
    assert not world.verdict().problems


@scenario(subscription=CHAT, tenants={"default": Policy(max_sessions=0)})
async def test_policy_holds_for_first_packets(world: World) -> None:
    world.first_packets.sends(flows(world)[1])
    await world.sleep(10)
    assert leases(world) == []
    backoff_ms = world.controller.settings.refused_ms
    assert world.first_packets.refused == [(flows(world), backoff_ms)]
    exposed = world.plane.metrics.exposition()[0].decode()
    kind = Transaction.FIRST_PACKET.value
    assert f'kind="{kind}",outcome="SESSION_QUOTA_EXCEEDED"}} 1.0' in exposed


@scenario(subscription=CHAT, tenants={"default": Policy(pages_per_s=0.5, pages_burst=1)})
async def test_who_is_too_fast_is_told_when_to_come_back(world: World) -> None:
    for ue in ("ue1", "ue2"):
        world.first_packets.sends(flows(world, ue)[0])
        await world.sleep(10)
    [(refused, backoff_ms)] = world.first_packets.refused
    assert refused == flows(world, "ue2")
    assert 0 < backoff_ms <= 2_000


@scenario(subscription=CHAT)
async def test_nobody_pages_for_what_nobody_subscribed(world: World) -> None:
    world.first_packets.sends(flows(world, aisi="ears")[0])
    await world.sleep(10)
    assert (leases(world), world.first_packets.refused) == ([], [])


@scenario(subscription=CHAT, catalogue_text=TWO_SERVICES)
async def test_only_the_service_that_was_sent_to_is_paged_for(world: World) -> None:
    """Another service of the same task would be ready, and is no answer."""
    world.gateway.unready |= {"edge1", "edge2"}
    world.first_packets.sends(flows(world)[0])
    await world.sleep(10)
    assert world.first_packets.refused == [
        (flows(world), world.controller.settings.refused_ms),
    ]
    assert (await world.page()).lease.terms.aisi == "write"  # what who asks by intent gets
