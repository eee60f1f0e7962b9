"""Paging: what is promised, journalled, enforced and answered, in which order, and to whom not."""

import asyncio
from collections.abc import Sequence
from typing import Any

import jwt
import pytest
from catalogues import CATALOGUE
from fakes import (
    CELLS,
    KEYS,
    MBPS,
    TASK,
    UES,
    World,
    all_of,
    causes,
    granted,
    lease_id,
    scenario,
    session_id,
    until,
    why,
)

from controlplane import aist
from controlplane.admission import Rates, Resource
from controlplane.answers import Grant, Refusal
from controlplane.clock import NS_PER_MS, NS_PER_S
from controlplane.enforcement import Install, Operation
from controlplane.lease import EndReason, State
from controlplane.policy import Policy
from controlplane.store import StoreError

ROOMY = CATALOGUE.replace("slots: 2", "slots: 9")
BIG = Rates(10**9, 10**9)


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
    assert world.trace == ["ask edge1", "write Prepared", "write Committed", "Install", "answer"]


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


# Quotas


@scenario(tenants={"clinic": Policy(max_sessions=3)}, catalogue_text=ROOMY)
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
    catalogue_text=ROOMY,
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
