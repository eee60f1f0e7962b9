"""Upkeep: what happens without being asked for, when it is due and not before."""

import asyncio

import pytest
from fakes import (
    MBPS,
    UES,
    World,
    all_of,
    cancelled,
    lease_id,
    scenario,
    session_id,
    until,
)

from controlplane.admission import Rates, Resource
from controlplane.answers import Grant, Refusal
from controlplane.catalogue import Anchor
from controlplane.clock import NS_PER_MS
from controlplane.fleet import AnchorFailed, FleetError
from controlplane.lease import EndReason, State
from controlplane.policy import Policy
from controlplane.resolver import AnchorState
from controlplane.store import StoreError
from controlplane.triggers import TriggerSettings

ONE_SERVICE = """
qos_profiles:
  - {name: QOS_E}
  - {name: QOS_G, five_qi: 4, guaranteed_downlink_bps: 4000000, guaranteed_uplink_bps: 1000000}
  - {name: QOS_H, five_qi: 4, guaranteed_downlink_bps: 3000000, priority_level: 3}
services:
  - {aisi: chat, task: text-generation, model: m, address4: 198.18.0.1, address6: "fd00:a151::1"}
  - {aisi: ears, task: automatic-speech-recognition, model: m, address4: 198.18.0.2,
     address6: "fd00:a151::2"}
anchors:
  - {name: edge1, region: north, trust_tier: 3, slots: 600, cost: 0,
     hosts: [{aisi: chat, service_time_ms: 10}, {aisi: ears, service_time_ms: 10}]}
  - {name: edge2, region: south, trust_tier: 2, slots: 600, cost: 1,
     path_rtt_ms_from: {gnb1: 30, gnb2: 0}, path_rtt_ms: 30,
     hosts: [{aisi: chat, service_time_ms: 10}]}
"""
HOSTS_CHAT = [{"aisi": "chat", "serviceTimeMs": 1.0}]


def anchor_of(world: World, grant: Grant) -> str | None:
    held = world.ledger.committed(world.controller.session(session_id(grant)))
    return None if held is None else held.terms.anchor


# Anchors


@scenario()
async def test_failure_is_found_within_the_budget_and_sessions_go_on_elsewhere(
    world: World,
) -> None:
    grant = await world.page()
    beating = asyncio.create_task(world.heartbeats("edge1"))
    await world.sleep(1_000)
    assert anchor_of(world, grant) == "edge1"
    last = world.clock.now
    await cancelled(beating)
    await world.sleep(300)
    [failed] = [e for e in world.entries() if e["type"] == "AnchorFailed"]
    assert "silent for" in failed["why"]
    assert anchor_of(world, grant) == "edge2"
    moved = world.ledger.committed(world.controller.session(session_id(grant)))
    assert moved is not None
    since_ms = (world.enforcer._since[moved.terms.lease_id] - last) / NS_PER_MS
    assert since_ms <= 250 + 10
    [refusal] = await all_of(world.relocate(grant, "edge1"))
    assert refusal.cause == "NO_CANDIDATE"
    await world.heartbeat("edge1")
    assert world.ledger.fleet.state("edge1") is AnchorState.UP
    await world.relocate(grant, "edge1")
    assert not world.verdict().problems


@scenario()
async def test_an_anchor_that_was_started_anew_has_lost_its_sessions(world: World) -> None:
    grant = await world.page()
    await world.heartbeat("edge1")
    await world.heartbeat("edge1", boot_id="second")
    await world.sleep(10)
    assert anchor_of(world, grant) == "edge2"
    assert world.states()["edge1@1"] == EndReason.ANCHOR_FAILED
    assert world.ledger.fleet.state("edge1") is AnchorState.UP
    assert not world.verdict().problems


@scenario(catalogue_text=ONE_SERVICE)
async def test_where_nothing_else_fits_a_session_ends_and_is_told_why(world: World) -> None:
    await world.page(task="automatic-speech-recognition")
    await world.heartbeat("edge1")
    await world.sleep(400)
    assert world.reasons() == {EndReason.ANCHOR_FAILED: 1}
    assert not world.enforcer.steering()
    world.check_pools()
    assert not world.verdict().problems


@scenario(catalogue_text=ONE_SERVICE)
async def test_who_drains_is_left_make_before_break_and_by_whom_nothing_fits_stays(
    world: World,
) -> None:
    moves = await world.page()
    stays = await world.page(task="automatic-speech-recognition")
    await world.drain("edge1")
    await world.sleep(10)
    assert (anchor_of(world, moves), anchor_of(world, stays)) == ("edge2", "edge1")
    assert world.ledger.lease(lease_id(moves)).state is State.DRAINING
    [refusal] = await all_of(world.page("ue2", task="automatic-speech-recognition"))
    assert {e.anchor: e.constraint for e in refusal.excluded} == {"edge1": "state"}
    assert not world.verdict().problems


@scenario(catalogue_text=ONE_SERVICE)
async def test_what_is_granted_at_an_anchor_that_began_to_drain_meanwhile_leaves_it(
    world: World,
) -> None:
    world.gateway.gate.shut = True
    paging = asyncio.create_task(world.page())
    await until(lambda: world.gateway.gate.waiting)
    await world.drain("edge1")
    world.gateway.gate.open()
    grant = await paging
    assert grant.lease.terms.anchor == "edge1"
    await world.sleep(10)
    assert anchor_of(world, grant) == "edge2"


@scenario(catalogue_text=ONE_SERVICE)
async def test_an_anchor_that_is_withdrawn_is_left(world: World) -> None:
    grant = await world.page()
    await world.keeper.record(world.ledger.fleet.deregister("edge1"))
    await world.sleep(10)
    assert anchor_of(world, grant) == "edge2"
    with pytest.raises(FleetError, match="no anchor"):
        world.ledger.fleet.drain("edge1")
    edge3 = Anchor.model_validate(
        {
            **{"name": "edge3", "region": "n", "trustTier": 5, "slots": 1, "cost": 0.0},
            "hosts": HOSTS_CHAT,
        }
    )
    await world.keeper.record(world.ledger.fleet.register(edge3, "operator"))
    moved = await world.relocate(grant, "edge3")
    assert moved.lease.terms.anchor == "edge3"
    await world.restart()
    assert anchor_of(world, grant) == "edge3"
    world.check_pools()


@scenario(catalogue_text=ONE_SERVICE, triggers=TriggerSettings(dwell_ms=10_000))
async def test_an_overloaded_anchor_is_left_by_some(world: World) -> None:
    grants = [await world.page(ue) for ue in UES]
    for _ in range(12):
        await world.heartbeat("edge1", load=0.95)
        await world.heartbeat("edge2", load=0.1)
        await world.sleep(50)
    moved = [grant for grant in grants if anchor_of(world, grant) == "edge2"]
    assert len(moved) == 1  # a tenth of them in a period, but one at least
    held = world.ledger.committed(world.controller.session(session_id(moved[0])))
    assert held is not None
    assert held.terms.cause == "LOAD"
    assert world.reasons()[State.DRAINING] + world.reasons()[EndReason.RELOCATED] == 1


# Mobility


@scenario(catalogue_text=ONE_SERVICE)
async def test_a_ue_that_has_moved_is_followed_to_a_better_anchor(world: World) -> None:
    for name in ("edge1", "edge2"):
        await world.heartbeat(name, load=0.35 if name == "edge1" else 0.0)
    grant = await world.page()
    assert grant.lease.terms.anchor == "edge1"
    await world.keeper.moved("ue1", "gnb2")
    await world.sleep(10)
    assert anchor_of(world, grant) == "edge2"
    held = world.ledger.committed(world.controller.session(session_id(grant)))
    assert held is not None
    assert (held.terms.cause, held.terms.cell) == ("HANDOVER", "gnb2")
    entries = world.entries()
    await world.keeper.moved("ue1", "gnb2")  # it is there already
    assert world.entries() == entries
    [unknown] = await all_of(world.keeper.moved("ue1", "gnb9"))
    assert unknown.cause == "CELL_UNKNOWN"
    await world.restart()
    assert world.controller.cell("ue1") == "gnb2"


@scenario(catalogue_text=ONE_SERVICE)
async def test_what_a_session_holds_moves_with_its_ue(world: World) -> None:
    await world.page(qosProfile="QOS_G")
    await world.keeper.moved("ue1", "gnb2")
    used = world.ledger.pools.used
    assert used(Resource.CELL_DOWNLINK, "gnb1") == 0
    assert used(Resource.CELL_DOWNLINK, "gnb2") == 4 * MBPS
    [refusal] = await all_of(world.keeper.moved("stranger", "gnb2"))
    assert refusal.cause == "UE_UNKNOWN"
    await world.sleep(60_001)
    assert used(Resource.CELL_DOWNLINK, "gnb2") == 0


@scenario(catalogue_text=ONE_SERVICE)
async def test_a_cell_without_room_ends_the_session_not_the_handover(world: World) -> None:
    """gnb2 guarantees 5 Mbit/s in all: for one of the two, and the more important one."""
    plain = await world.page(qosProfile="QOS_G")
    important = await world.page(task="automatic-speech-recognition", qosProfile="QOS_H")
    free = await world.page("ue2")
    await world.keeper.moved("ue1", "gnb2")
    await world.keeper.moved("ue2", "gnb2")
    assert world.ledger.lease(lease_id(plain)).end_reason is EndReason.CELL_FULL
    assert world.ledger.lease(lease_id(important)).state is State.COMMITTED
    assert anchor_of(world, free) is not None
    assert world.ledger.pools.used(Resource.CELL_DOWNLINK, "gnb2") == 3 * MBPS
    assert lease_id(plain) not in world.enforcer.steering()
    assert world.controller.cell("ue1") == "gnb2"
    world.check_pools()
    assert not world.verdict().problems


@scenario(catalogue_text=ONE_SERVICE)
async def test_handover_and_page_at_once_do_not_take_the_same_room(world: World) -> None:
    await world.keeper.moved("ue2", "gnb2")
    await world.page(qosProfile="QOS_G")
    world.store.gate.shut = True
    moving = asyncio.create_task(world.keeper.moved("ue1", "gnb2"))
    await until(lambda: world.store.gate.waiting)
    paging = asyncio.create_task(world.page("ue2", qosProfile="QOS_G"))
    for _ in range(20):
        await asyncio.sleep(0)
    world.store.gate.open()
    outcomes = await asyncio.gather(moving, paging, return_exceptions=True)
    assert isinstance(outcomes[1], Refusal)
    assert world.ledger.pools.used(Resource.CELL_DOWNLINK, "gnb2") == 4 * MBPS
    world.check_pools()


@scenario(catalogue_text=ONE_SERVICE)
async def test_a_handover_that_cannot_be_written_leaves_all_as_it_was(world: World) -> None:
    grant = await world.page(qosProfile="QOS_G")
    world.store.full = True
    [error] = await all_of(world.keeper.moved("ue1", "gnb2"))
    assert isinstance(error, StoreError)
    world.store.full = False
    assert world.controller.cell("ue1") == "gnb1"
    used = world.ledger.pools.used
    assert used(Resource.CELL_DOWNLINK, "gnb1") == 4 * MBPS
    assert used(Resource.CELL_DOWNLINK, "gnb2") == 0
    assert anchor_of(world, grant) == "edge1"


@scenario(catalogue_text=ONE_SERVICE)
async def test_what_the_kernel_refused_at_a_handover_is_repaired(world: World) -> None:
    await world.page(qosProfile="QOS_G")
    await world.page(task="automatic-speech-recognition", qosProfile="QOS_H")
    world.enforcer.down = True
    await all_of(world.keeper.moved("ue1", "gnb2"))
    world.enforcer.down = False
    await world.sleep(200)
    assert len(world.enforcer.steering()) == 1
    assert world.controller.cell("ue1") == "gnb2"


# Policy


@scenario(catalogue_text=ONE_SERVICE, tenants={"clinic": Policy()}, cells={"gnb1": Rates()})
async def test_a_new_policy_moves_what_it_does_not_allow_here_and_ends_the_rest(
    world: World,
) -> None:
    moves = await world.page(tenant="clinic")
    ends = await world.page(tenant="clinic", task="automatic-speech-recognition")
    other = await world.page("ue2")
    await world.keeper.set_policy("clinic", Policy(regions=("south",)))
    await world.sleep(10)
    assert anchor_of(world, moves) == "edge2"
    assert world.ledger.lease(lease_id(ends)).end_reason is EndReason.POLICY
    assert anchor_of(world, other) == "edge1"
    await world.keeper.set_policy("clinic", Policy(tasks=()))
    await world.sleep(10)
    assert world.reasons()[EndReason.POLICY] == 3  # the drain of the one that moved, too
    await world.restart()
    [refusal] = await all_of(world.page("ue3", tenant="clinic"))
    assert refusal.cause == "TASK_NOT_ALLOWED"
    assert not world.verdict().problems


@scenario(catalogue_text=ONE_SERVICE, tenants={"clinic": Policy()})
async def test_a_policy_holds_for_what_was_under_way_when_it_came(world: World) -> None:
    world.gateway.gate.shut = True
    paging = asyncio.create_task(world.page(tenant="clinic"))
    await until(lambda: world.gateway.gate.waiting)
    await world.keeper.set_policy("clinic", Policy(tasks=()))
    world.gateway.gate.open()
    await paging
    await world.sleep(10)
    assert world.reasons() == {EndReason.POLICY: 1}


@scenario(catalogue_text=ONE_SERVICE)
async def test_a_failure_and_a_policy_at_once_move_a_session_once(world: World) -> None:
    grant = await world.page()
    died = AnchorFailed("edge1", "it is said to be dead")
    await all_of(
        world.keeper.record([died]),
        world.keeper.set_policy("default", Policy(regions=("south",))),
    )
    await world.sleep(50)
    assert anchor_of(world, grant) == "edge2"
    assert len(world.states()) == 2
    assert not world.verdict().problems
