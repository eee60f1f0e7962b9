"""Paging: what is promised, journalled, enforced and answered, in which order, and to whom not."""

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import jwt
import pytest
from fake_parts import FileStore
from fakes import (
    CELLS,
    KEYS,
    MBPS,
    PREPARE_MS,
    TASK,
    UES,
    World,
    all_of,
    cancelled,
    lease_id,
    scenario,
    session_id,
    until,
)

from controlplane import aist
from controlplane.admission import Rates, Resource
from controlplane.answers import Grant, Refusal
from controlplane.clock import NS_PER_MS, NS_PER_S
from controlplane.enforcement import EnforcementError, Install, Operation
from controlplane.granting import SinkRequest
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
  - {name: QOS_G, guaranteed_downlink_bps: 4000000, guaranteed_uplink_bps: 1000000}
services: [{aisi: chat, task: text-generation, model: m, address4: 198.18.0.1,
            address6: "fd00:a151::1"}]
anchors:
  - {name: edge1, region: n, trust_tier: 0, slots: 9, cost: 0, n6_downlink_bps: 5000000,
     hosts: [{aisi: chat, service_time_ms: 1}]}
  - {name: edge2, region: n, trust_tier: 0, slots: 9, cost: 1, n6_uplink_bps: 2500000,
     hosts: [{aisi: chat, service_time_ms: 1}]}
"""
SINK = SinkRequest(uri="https://app.example/notices", credential=None)
BIG = Rates(10**9, 10**9)


def why(refusal: Refusal) -> dict[str, str]:
    return {exclusion.anchor: exclusion.constraint for exclusion in refusal.excluded}


def granted(outcomes: Sequence[object]) -> list[Grant]:
    assert all(isinstance(one, Grant | Refusal) for one in outcomes), outcomes
    return [one for one in outcomes if isinstance(one, Grant)]


def causes(outcomes: Sequence[object]) -> Counter[str]:
    return Counter(one.cause for one in outcomes if isinstance(one, Refusal))


# What is granted


@scenario()
async def test_a_page_is_answered_with_a_lease_that_is_enforced(world: World) -> None:
    grant = await world.page()
    terms = grant.lease.terms
    assert (terms.ue, terms.aisi, terms.anchor, terms.epoch) == ("ue1", "chat", "edge1", 1)
    assert (terms.cause, terms.tenant, terms.cell) == ("PAGE", "default", "gnb1")
    assert grant.lease.state is State.COMMITTED
    expires_ns = world.clock.now + 60_000 * NS_PER_MS
    assert world.enforcer.steering() == {terms.lease_id: expires_ns}
    assert world.enforcer.anchors() == {
        "10.45.0.1>198.18.0.1": "edge1",
        "fd00:45::1>fd00:a151::1": "edge1",
    }
    ranked = [candidate.anchor.name for candidate in grant.resolution.candidates]
    assert ranked == ["edge1", "edge2", "cloud"]
    assert grant.token is not None
    claims: dict[str, Any] = jwt.decode(
        grant.token,
        KEYS.signing.public,
        algorithms=["EdDSA"],
        audience="chat",
        options={"verify_exp": False, "verify_nbf": False, "require": aist.REQUIRED_CLAIMS},
    )
    assert (claims["sub"], claims["scope"]) == ("ue1", TASK)
    assert claims["addresses"] == ["10.45.0.1", "fd00:45::1"]
    assert (claims["lease"], claims["epoch"]) == (terms.lease_id, 1)
    assert 0 <= world.clock.to_unix_ns(expires_ns) - claims["exp"] * NS_PER_S < NS_PER_S


@scenario()
async def test_evidence_before_the_kernel_and_the_kernel_before_the_answer(world: World) -> None:
    def on_disk(operations: Sequence[Operation]) -> None:
        last = world.entries()[-1]
        assert isinstance(operations[0], Install)
        assert (last["type"], last["lease_id"]) == ("Committed", operations[0].binding.lease_id)

    world.enforcer.before = on_disk
    world.trace.clear()
    await world.page()
    world.trace.append("answer")
    assert world.trace == ["write Prepared", "ask edge1", "write Committed", "Install", "answer"]


@scenario()
async def test_an_anchor_that_says_it_is_ready_is_not_asked(world: World) -> None:
    await world.heartbeat("edge1")
    world.trace.clear()
    await world.page()
    assert world.trace == ["write Prepared+Committed", "Install"]


@scenario()
async def test_each_step_is_timed_when_it_was_done(world: World) -> None:
    started = world.clock.now
    world.gateway.meanwhile = lambda: world.clock.advance(7)
    world.enforcer.before = lambda operations: world.clock.advance(5)
    line = (await world.page()).timeline
    assert line is not None
    assert line.requested_ns == started
    assert line.prepared_ns == line.committed_ns == started + 7 * NS_PER_MS
    assert line.enforced_ns == started + 12 * NS_PER_MS


# What is refused


@pytest.mark.parametrize(
    ("ue", "members", "cause"),
    [
        ("stranger", {}, "UE_UNKNOWN"),
        ("ue1", {"task": "image-segmentation"}, "TASK_UNKNOWN"),
        ("ue1", {"qosProfile": "GOLD"}, "QOS_PROFILE_UNKNOWN"),
        ("ue1", {"requiredRates": {"uplinkBps": 10**12}}, "QOS_PROFILE_UNKNOWN"),
        ("ue1", {"qosProfile": "QOS_OFF"}, "QOS_PROFILE_INACTIVE"),
        ("ue1", {"qosProfile": "QOS_G", "duration_ms": 4_999}, "DURATION_OUT_OF_RANGE"),
        ("ue1", {"qosProfile": "QOS_G", "duration_ms": 120_001}, "DURATION_OUT_OF_RANGE"),
        ("ue1", {"tenant": "nobody"}, "TENANT_UNKNOWN"),
    ],
)
@scenario()
async def test_what_does_not_exist_is_named(
    world: World, ue: str, members: dict[str, Any], cause: str
) -> None:
    with pytest.raises(Refusal) as refusal:
        await world.page(ue, **members)
    assert refusal.value.cause == cause
    assert not world.entries()
    world.check_pools()


@scenario()
async def test_a_refusal_names_what_excluded_each_candidate(world: World) -> None:
    world.gateway.unready = {"edge1"}
    await world.page("ue2")
    await world.page("ue3")  # edge2 is full
    with pytest.raises(Refusal) as refusal:
        await world.page(minTrustTier=2)
    assert refusal.value.cause == "NO_CANDIDATE"
    assert why(refusal.value) == {"edge1": "readiness", "edge2": "capacity", "cloud": "trustTier"}
    assert world.slots() == {"edge2": 2}  # what was reserved at edge1 is free again
    assert not world.ledger.session_of("ue1", "chat")


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


# One session for each UE and service


@scenario()
async def test_one_session_for_each_ue_and_service(world: World) -> None:
    grant = await world.page()
    with pytest.raises(Refusal, match="already has a session"):
        await world.page()
    await world.relocate(grant)
    await world.sleep(1_000)  # one of its leases is over, the session is not
    with pytest.raises(Refusal, match="already has a session"):
        await world.page()
    await world.page(task="automatic-speech-recognition")  # another service
    await world.page("ue2")  # another UE


@scenario()
async def test_the_same_page_twice_at_once_is_one_session(world: World) -> None:
    outcomes = await all_of(world.page(), world.page())
    assert len(granted(outcomes)) == 1
    assert causes(outcomes) == {"SESSION_EXISTS": 1}
    assert sum(world.slots().values()) == 1


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


# Quotas


@scenario(tenants={"clinic": Policy(max_sessions=3)}, catalogue_text=NARROW)
async def test_a_quota_of_sessions_holds_for_requests_at_once(world: World) -> None:
    outcomes = await all_of(*(world.page(ue, tenant="clinic") for ue in UES))
    assert len(granted(outcomes)) == 3
    assert causes(outcomes) == {"SESSION_QUOTA_EXCEEDED": 5}
    await world.release(granted(outcomes)[0])
    await world.page("ue8", tenant="clinic")
    world.check_pools()


@scenario(tenants={"clinic": Policy(max_sessions=1)})
async def test_a_quota_counts_once_what_falls_through_to_another_anchor(world: World) -> None:
    world.gateway.unready = {"edge1", "edge2"}
    assert (await world.page(tenant="clinic")).lease.terms.anchor == "cloud"
    world.check_pools()


@scenario(tenants={"clinic": Policy(max_sessions=2)})
async def test_what_was_refused_or_failed_counts_for_no_quota(world: World) -> None:
    world.gateway.unready = {"edge1", "edge2", "cloud"}
    assert causes(await all_of(world.page(tenant="clinic"))) == {"NO_CANDIDATE": 1}
    world.gateway.unready = set()
    world.store.full = True
    [error] = await all_of(world.page(tenant="clinic"))
    assert isinstance(error, StoreError)
    world.store.full = False
    world.enforcer.refuse = lambda operations: True
    assert causes(await all_of(world.page(tenant="clinic"))) == {"ENFORCEMENT_FAILED": 1}
    world.enforcer.refuse = lambda operations: False
    outcomes = await all_of(world.page("ue1", tenant="clinic"), world.page("ue2", tenant="clinic"))
    assert len(granted(outcomes)) == 2
    world.check_pools()


@scenario(tenants={"clinic": Policy(max_downlink_bps=8 * MBPS)}, cells={"gnb1": BIG})
async def test_a_quota_of_bandwidth_is_for_all_sessions_together(world: World) -> None:
    asks = (world.qos(ue, tenant="clinic") for ue in UES[:4])
    outcomes = await all_of(*asks)
    assert len(granted(outcomes)) == 2
    assert causes(outcomes) == {"BANDWIDTH_QUOTA_EXCEEDED": 2}


@scenario(
    tenants={"clinic": Policy(pages_per_s=2, pages_burst=3, max_lease_ms=30_000)},
    catalogue_text=NARROW,
)
async def test_a_tenant_that_asks_too_often_is_told_when_to_ask_again(world: World) -> None:
    asks = [world.page(ue, tenant="clinic", duration_ms=30_000) for ue in UES[:5]]
    outcomes = await all_of(*asks)
    assert causes(outcomes) == {"RATE_LIMITED": 2}
    refusal = outcomes[-1]
    assert refusal.retry_after_s == 0.5
    await world.page("ue6")  # another tenant's
    await world.sleep(500)
    with pytest.raises(Refusal) as caught:
        await world.page("ue7", tenant="clinic", duration_ms=30_001)
    assert caught.value.cause == "LEASE_QUOTA_EXCEEDED"
    await world.sleep(500)
    await world.page("ue7", tenant="clinic", duration_ms=30_000)


@pytest.mark.parametrize(
    ("policy", "cause"),
    [
        (Policy(tasks=("translation",)), "TASK_NOT_ALLOWED"),
        (Policy(qos_profiles=("QOS_G",)), "QOS_PROFILE_NOT_ALLOWED"),
        (Policy(regions=("east",)), "NO_CANDIDATE"),
    ],
)
def test_a_policy_says_what_it_does_not_allow(policy: Policy, cause: str) -> None:
    async def run() -> None:
        [refusal] = await all_of(world.page(tenant="clinic"))
        assert refusal.cause == cause
        if policy.regions:
            assert set(why(refusal).values()) == {"tenantRegion"}

    with World(tenants={"clinic": policy}) as world:
        world.run(run())


# Idempotency keys


@scenario()
async def test_the_same_request_under_a_key_is_granted_once(world: World) -> None:
    first = await world.page(key="k")
    entries = world.entries()
    again = await world.page(key="k")
    assert (again.lease, again.timeline) == (first.lease, None)
    assert again.token is not None
    assert world.entries() == entries
    with pytest.raises(Refusal) as refusal:
        await world.page(key="k", duration_ms=59_000)
    assert refusal.value.cause == "KEY_REUSED"
    with pytest.raises(Refusal) as refusal:
        await world.page("ue2", key="k")
    assert refusal.value.cause == "KEY_REUSED"
    other = await world.page("ue2", key="k", tenant="operator")  # keys are each tenant's own
    assert session_id(other) != session_id(first)


@scenario()
async def test_the_same_request_while_the_first_is_under_way_waits_for_it(world: World) -> None:
    world.gateway.gate.shut = True
    asks = [asyncio.create_task(world.page(key="k")) for _ in range(3)]
    await until(lambda: world.gateway.gate.waiting)
    world.gateway.gate.open()
    grants = await asyncio.gather(*asks)
    assert len({lease_id(grant) for grant in grants}) == 1
    assert [grant.timeline is None for grant in grants] == [False, True, True]


@scenario()
async def test_a_key_is_known_after_a_restart(world: World) -> None:
    first = await world.page(key="k")
    await world.restart()
    again = await world.page(key="k")
    assert lease_id(again) == lease_id(first)
    assert len(world.enforcer.applied) == 1


@scenario()
async def test_a_request_that_was_refused_may_be_made_again_under_its_key(world: World) -> None:
    world.gateway.unready = {"edge1", "edge2", "cloud"}
    assert causes(await all_of(world.page(key="k"))) == {"NO_CANDIDATE": 1}
    world.gateway.unready = set()
    world.enforcer.refuse = lambda operations: True
    assert causes(await all_of(world.page(key="k"))) == {"ENFORCEMENT_FAILED": 1}
    world.enforcer.refuse = lambda operations: False
    grant = await world.page(key="k")
    assert grant.timeline is not None
    assert grant.lease.state is State.COMMITTED


@scenario()
async def test_a_key_stands_for_the_session_as_it_is_now(world: World) -> None:
    first = await world.page(key="k")
    world.gateway.unready = {"edge2", "cloud"}
    [refusal] = await all_of(world.relocate(first))
    assert refusal.cause == "ANCHOR_NOT_READY"
    assert (await world.page(key="k")).lease == first.lease  # not the one that was rolled back
    world.gateway.unready = set()
    moved = await world.relocate(first)
    again = await world.page(key="k")
    assert (again.lease, again.token is not None) == (moved.lease, True)
    await world.release(first)
    ended = await world.page(key="k")
    assert (ended.lease.end_reason, ended.token) == (EndReason.RELEASED, None)


@scenario()
async def test_a_key_outlives_the_attempts_that_came_to_nothing(world: World) -> None:
    world.gateway.unready = {"edge1"}
    first = await world.page(key="k", duration_ms=3_000_000)
    await world.sleep(700_000)  # what was rolled back is forgotten
    assert lease_id(await world.page(key="k", duration_ms=3_000_000)) == lease_id(first)


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


# QoS alone


@scenario()
async def test_qos_alone_is_a_lease_without_an_anchor(world: World) -> None:
    world.trace.clear()
    grant = await world.qos()
    terms = grant.lease.terms
    assert (terms.anchor, terms.intent, grant.token) == (None, None, None)
    assert (terms.downlink_bps, terms.uplink_bps) == (4 * MBPS, MBPS)
    assert world.trace == ["write Prepared+Committed", "Install"]
    assert world.enforcer.anchors() == {"10.45.0.1>203.0.113.9": None}
    assert not world.slots()
    assert world.ledger.pools.used(Resource.CELL_DOWNLINK, "gnb1") == 4 * MBPS
    [refusal] = await all_of(world.relocate(grant))
    assert refusal.cause == "NOT_ANCHORED"
    await world.release(grant)
    assert world.ledger.pools.used(Resource.CELL_DOWNLINK, "gnb1") == 0
    assert world.ends()[-1]["usage"]["downlink_packets"] == 0
    assert not world.verdict().problems


@scenario(cells=CELLS)
async def test_qos_alone_shares_the_cell_and_yields_by_priority(world: World) -> None:
    first = await world.qos("ue1")
    await world.page("ue2", qosProfile="QOS_G")
    [refusal] = await all_of(world.qos("ue3"))
    assert refusal.cause == "NO_BANDWIDTH"
    assert str(refusal) == "cellDownlink of gnb1: 4,000,000 bit/s asked, 2,000,000 free"
    await world.qos("ue3", "QOS_P")
    assert world.reasons()[EndReason.PREEMPTED] == 1
    assert world.ledger.pools.used(Resource.CELL_DOWNLINK, "gnb1") == 8 * MBPS
    [again] = await all_of(world.qos("ue4", "QOS_P"))
    assert isinstance(again, Grant)
    [refusal] = await all_of(world.qos("ue5", "QOS_P"))
    assert refusal.cause == "NO_BANDWIDTH"
    assert world.ledger.lease(lease_id(first)).end_reason is EndReason.PREEMPTED
    assert not world.verdict().problems


@scenario()
async def test_qos_alone_under_a_key(world: World) -> None:
    first = await world.qos(key="k")
    assert lease_id(await world.qos(key="k")) == lease_id(first)
    assert causes(await all_of(world.qos(key="k", server="203.0.113.8"))) == {"KEY_REUSED": 1}
    assert causes(await all_of(world.page(key="k"))) == {"KEY_REUSED": 1}
    assert causes(await all_of(world.qos())) == {"SESSION_EXISTS": 1}


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
