"""Granting: two phases, both or neither; never more than there is; and who yields to whom."""

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from contextlib import closing

import pytest
from fake_parts import FileStore
from fakes import (
    MBPS,
    PREPARE_MS,
    SINK,
    UES,
    World,
    all_of,
    cancelled,
    causes,
    granted,
    lease_id,
    scenario,
    session_id,
    until,
    why,
)

from controlplane.admission import Rates, Resource
from controlplane.answers import Refusal
from controlplane.enforcement import EnforcementError, Install, Operation
from controlplane.lease import EndReason, State
from controlplane.policy import Arp, Policy
from controlplane.store import StoreError

ROOM_FOR_ONE = """
qos_profiles:
  - {name: QOS_E}
  - {name: QOS_P, priority_level: 2, preemption_capability: true}
services: [{aisi: chat, task: text-generation, model: m, address4: 198.18.0.1,
            address6: "fd00:a151::1"}]
anchors:
  - {name: edge1, region: n, trust_tier: 0, slots: 2, cost: 0,
     hosts: [{aisi: chat, service_time_ms: 1}]}
  - {name: edge2, region: n, trust_tier: 0, slots: 1, cost: 9,
     hosts: [{aisi: chat, service_time_ms: 1}]}
"""
NARROW = """
qos_profiles:
  - {name: QOS_E}
  - {name: QOS_G, five_qi: 4, guaranteed_downlink_bps: 4000000, guaranteed_uplink_bps: 1000000}
services: [{aisi: chat, task: text-generation, model: m, address4: 198.18.0.1,
            address6: "fd00:a151::1"}]
anchors:
  - {name: edge1, region: n, trust_tier: 0, slots: 9, cost: 0, n6_downlink_bps: 5000000,
     hosts: [{aisi: chat, service_time_ms: 1}]}
  - {name: edge2, region: n, trust_tier: 0, slots: 9, cost: 1, n6_uplink_bps: 2500000,
     hosts: [{aisi: chat, service_time_ms: 1}]}
"""
BIG = Rates(10**9, 10**9)


# Ready, in time, or not at all


@scenario()
async def test_an_anchor_that_is_not_ready_makes_way_for_the_next(world: World) -> None:
    world.gateway.unready = {"edge1"}
    grant = await world.page(sink=SINK)
    assert grant.lease.terms.anchor == "edge2"
    assert [(e.anchor, e.constraint) for e in grant.resolution.excluded] == [("edge1", "readiness")]
    assert world.states() == {"edge1@1": EndReason.ABORTED, "edge2@2": State.COMMITTED}
    assert world.slots() == {"edge2": 1}
    assert len(world.enforcer.applied) == 1
    assert world.store.with_sink() == [session_id(grant)]  # what was rolled back left none


@scenario()
async def test_an_answer_that_comes_too_late_is_no_answer(world: World) -> None:
    world.gateway.meanwhile = lambda: world.clock.advance(PREPARE_MS)
    with pytest.raises(Refusal) as refusal:
        await world.page()
    assert refusal.value.cause == "PREPARE_TIMED_OUT"
    assert not world.slots()
    assert not world.enforcer.applied


@scenario()
async def test_a_page_that_is_abandoned_frees_what_it_holds_in_time(world: World) -> None:
    world.gateway.gate.shut = True
    paging = asyncio.create_task(world.page())
    await until(lambda: world.gateway.asked)
    await cancelled(paging)
    assert world.slots() == {"edge1": 1}
    await world.sleep(PREPARE_MS + 1)
    assert world.states() == {"edge1@1": EndReason.PREPARE_TIMED_OUT}
    assert not world.slots()
    world.check_pools()


@scenario()
async def test_a_page_abandoned_in_its_write_keeps_others_out_until_it_is_known(
    world: World,
) -> None:
    """The write goes on; whoever decided about this UE meanwhile would know nothing of it."""
    await world.heartbeat("edge1")
    world.store.gate.shut = True
    paging = asyncio.create_task(world.page())
    await until(lambda: world.store.gate.waiting)
    paging.cancel()
    again = asyncio.create_task(world.page())
    await until(lambda: world.controller.locks.held("ue1"))
    world.store.gate.open()
    [first, second] = await asyncio.gather(paging, again, return_exceptions=True)
    assert isinstance(first, asyncio.CancelledError)
    assert isinstance(second, Refusal)
    assert second.cause == "SESSION_EXISTS"
    assert world.states() == {"edge1@1": State.COMMITTED}
    world.check_pools()


# Both or neither, and never more than there is


@pytest.mark.parametrize("unready", [(), ("edge1",)], ids=["all ready", "first choice is not"])
@scenario(catalogue_text=ROOM_FOR_ONE)
async def test_concurrent_pages_never_take_more_slots_than_there_are(
    world: World, unready: tuple[str, ...]
) -> None:
    """Also where all fall through to the same second choice after they were resolved."""
    slots = {anchor.name: anchor.slots for anchor in world.catalogue.anchors}
    most: Counter[str] = Counter()

    def look() -> None:
        for anchor, used in world.slots().items():
            most[anchor] = max(most[anchor], used)

    world.gateway.unready = set(unready)
    world.gateway.meanwhile = look
    outcomes = await all_of(*map(world.page, UES))
    assert all(used <= slots[anchor] for anchor, used in most.items()), most
    taken = Counter(grant.lease.terms.anchor for grant in granted(outcomes))
    assert taken == world.slots() == ({"edge2": 1} if unready else {"edge1": 2, "edge2": 1})
    losers = [why(one)["edge2"] for one in outcomes if isinstance(one, Refusal)]
    assert losers == ["capacity"] * len(losers)


@scenario(catalogue_text=NARROW)
async def test_concurrent_pages_never_take_more_of_a_cell_than_there_is(world: World) -> None:
    outcomes = await all_of(*(world.page(ue, qosProfile="QOS_G") for ue in UES))
    pools = world.ledger.pools
    assert len(granted(outcomes)) == 2  # 10 Mbit/s for 4 Mbit/s each
    assert pools.used(Resource.CELL_DOWNLINK, "gnb1") == 8 * MBPS
    assert pools.used(Resource.CELL_UPLINK, "gnb1") == 2 * MBPS
    refused = [one for one in outcomes if isinstance(one, Refusal)]
    assert {why(one)["edge2"] for one in refused} == {"capacity"}
    assert "cellDownlink of gnb1" in refused[0].excluded[-1].detail
    assert world.slots() == {"edge1": 1, "edge2": 1}  # a slot without bandwidth is none


@scenario(catalogue_text=NARROW, cells={"gnb1": BIG})
async def test_concurrent_pages_never_take_more_of_n6_than_there_is(world: World) -> None:
    outcomes = await all_of(*(world.page(ue, qosProfile="QOS_G") for ue in UES))
    assert len(granted(outcomes)) == 3
    assert world.slots() == {"edge1": 1, "edge2": 2}  # 5 / 4 downlink, 2.5 / 1 uplink
    await world.page("ue8")  # best effort needs none
    for grant in granted(outcomes):
        await world.release(grant)
    world.check_pools()
    for where in ("edge1", "edge2"):
        assert world.ledger.pools.used(Resource.N6_DOWNLINK, where) == 0


# Pre-emption


@scenario(catalogue_text=ROOM_FOR_ONE)
async def test_the_more_important_takes_the_place_of_the_least_important(world: World) -> None:
    lows = [await world.page(ue, sink=SINK) for ue in ("ue1", "ue2", "ue3")]
    world.trace.clear()
    high = await world.page("ue4", qosProfile="QOS_P")
    assert high.lease.terms.anchor == "edge1"
    one_write = "write Ended+Prepared+Committed"
    assert world.trace == ["ask edge1", one_write, "Revoke+Install"]
    ended = [low for low in lows if world.ledger.lease(lease_id(low)).state is State.ENDED]
    [loser] = ended
    assert loser.lease.terms.anchor == "edge1"
    assert world.ledger.lease(lease_id(loser)).end_reason is EndReason.PREEMPTED
    assert sorted(world.enforcer.steering()) == sorted(
        [lease_id(high), *(lease_id(low) for low in lows if low is not loser)]
    )
    told = [json.loads(body) for body in notices(world)]
    mine = [n for n in told if n["data"]["sessionId"] == session_id(loser)]
    assert [n["type"].rpartition(".")[2] for n in mine[-2:]] == ["preempted", "qos-status-changed"]
    assert mine[-1]["data"]["statusInfo"] == "NETWORK_TERMINATED"
    assert {n["data"]["sessionId"] for n in told if "preempted" in n["type"]} == {session_id(loser)}
    world.check_pools()
    assert not world.verdict().problems


def notices(world: World) -> list[bytes]:
    assert isinstance(world.store, FileStore)
    with closing(world.store.connection.execute("SELECT body FROM outbox ORDER BY number")) as rows:
        return [row[0] for row in rows]


@scenario(catalogue_text=ROOM_FOR_ONE)
async def test_nobody_is_pre_empted_for_who_cannot_be_served_even_so(world: World) -> None:
    for ue in ("ue1", "ue2", "ue3"):
        await world.page(ue, qosProfile="QOS_P")
    entries = world.entries()
    with pytest.raises(Refusal) as refusal:
        await world.page("ue4", qosProfile="QOS_P")  # as important, not more
    assert refusal.value.cause == "NO_CANDIDATE"
    assert world.entries() == entries
    world.check_pools()


@scenario(catalogue_text=ROOM_FOR_ONE.partition("  - {name: edge2")[0])
async def test_two_that_pre_empt_at_once_take_one_each(world: World) -> None:
    lows = [await world.page(ue) for ue in ("ue1", "ue2")]
    outcomes = await all_of(*(world.page(ue, qosProfile="QOS_P") for ue in ("ue4", "ue5")))
    assert len(granted(outcomes)) == 2
    states = [world.ledger.lease(lease_id(low)).end_reason for low in lows]
    assert states.count(EndReason.PREEMPTED) == 2
    assert world.slots() == {"edge1": 2}
    world.check_pools()
    assert not world.verdict().problems


@scenario(catalogue_text=ROOM_FOR_ONE.replace("slots: 2", "slots: 1"))
async def test_who_is_in_a_transaction_of_its_own_is_not_pre_empted(world: World) -> None:
    first, second = await world.page("ue1"), await world.page("ue2")
    await world.controller.locks.acquire("ue1")
    high = await world.page("ue4", qosProfile="QOS_P")
    world.controller.locks.release("ue1")
    assert world.ledger.lease(lease_id(first)).state is State.COMMITTED
    assert world.ledger.lease(lease_id(second)).end_reason is EndReason.PREEMPTED
    assert high.lease.terms.anchor == second.lease.terms.anchor


@scenario(catalogue_text=ROOM_FOR_ONE)
async def test_if_pre_empting_fails_nobody_has_lost_anything(world: World) -> None:
    lows = [await world.page(ue) for ue in ("ue1", "ue2", "ue3")]
    await world.heartbeat("edge1")
    world.store.full = True
    [error] = await all_of(world.page("ue4", qosProfile="QOS_P"))
    assert isinstance(error, StoreError)
    world.store.full = False
    assert sorted(world.enforcer.steering()) == sorted(map(lease_id, lows))
    world.check_pools()
    assert causes(await all_of(world.page("ue5"))) == {"NO_CANDIDATE": 1}


@scenario(catalogue_text=ROOM_FOR_ONE)
async def test_if_the_kernel_refuses_the_pre_empted_do_not_go_on(world: World) -> None:
    lows = [await world.page(ue) for ue in ("ue1", "ue2", "ue3")]
    world.enforcer.refuse = lambda operations: any(isinstance(o, Install) for o in operations)
    [refusal] = await all_of(world.page("ue4", qosProfile="QOS_P"))
    assert refusal.cause == "ENFORCEMENT_FAILED"
    await world.sleep(0)
    ended = {lease_id(low) for low in lows} - world.enforcer.steering().keys()
    assert len(ended) == 1  # journal and kernel agree about the one that lost its place
    assert world.ledger.lease(ended.pop()).end_reason is EndReason.PREEMPTED
    assert len(world.enforcer.steering()) == 2
    world.check_pools()


@scenario(
    catalogue_text=ROOM_FOR_ONE,
    tenants={"clinic": Policy(arp=Arp(priority_level=1, preemption_capability=True))},
)
async def test_a_tenants_own_priority_takes_the_place_of_the_profiles(world: World) -> None:
    for ue in ("ue1", "ue2", "ue3"):
        await world.page(ue, qosProfile="QOS_P")
    grant = await world.page("ue4", tenant="clinic")
    assert (grant.lease.terms.priority_level, grant.lease.terms.anchor) == (1, "edge1")
    assert world.reasons()[EndReason.PREEMPTED] == 1


# Failures


@scenario()
async def test_if_the_kernel_refuses_a_page_nobody_holds_a_lease(world: World) -> None:
    def refuse(operations: Sequence[Operation]) -> bool:
        return isinstance(operations[0], Install)

    world.enforcer.refuse = refuse
    [refusal] = await all_of(world.page())
    assert refusal.cause == "ENFORCEMENT_FAILED"
    assert isinstance(refusal.__cause__, EnforcementError)
    assert not world.slots()
    assert not world.enforcer.steering()
    assert world.states() == {"edge1@1": EndReason.NOT_ENFORCED}
    world.enforcer.refuse = lambda operations: False
    await world.page()  # and the UE may ask again
    assert not world.verdict().problems


@pytest.mark.parametrize("at_write", [1, 2])
@scenario()
async def test_what_is_not_durable_is_not_enforced(world: World, at_write: int) -> None:
    world.store.fail_at = at_write
    with pytest.raises(StoreError, match="No space left"):
        await world.page()
    assert not world.enforcer.applied
    await world.sleep(PREPARE_MS + 1)
    assert not world.slots()
    world.check_pools()
    await world.page()
