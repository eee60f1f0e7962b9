"""What needs no resolution: extend, release, and a kernel or disk that refuses."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from fakes import (
    PREPARE_MS,
    World,
    all_of,
    lease_id,
    opens,
    scenario,
    session_id,
    until,
)

from controlplane.answers import Grant
from controlplane.clock import NS_PER_MS
from controlplane.enforcement import EnforcementError
from controlplane.lease import EndReason, State
from controlplane.policy import Policy
from controlplane.store import StoreError

# Extend


@scenario()
async def test_extension_is_durable_before_the_kernel_knows(world: World) -> None:
    grant = await world.page(duration_ms=10_000)
    await world.sleep(4_000)
    world.trace.clear()
    extended = await world.extend(grant, 5_000)
    assert world.trace == ["write Renewed", "Renew"]
    assert extended.deadline_ns == grant.lease.deadline_ns + 5_000 * NS_PER_MS
    assert world.enforcer.steering() == {lease_id(grant): extended.deadline_ns}
    await world.sleep(10_999)
    assert world.states() == {"edge1@1": State.COMMITTED}
    await world.sleep(10)
    assert world.states() == {"edge1@1": EndReason.EXPIRED}
    [refusal] = await all_of(world.extend(grant, 5_000))
    assert refusal.cause == "SESSION_ENDED"
    assert world.ends()[0]["usage"]["uplink_packets"] >= 14_960


@scenario()
async def test_a_session_lasts_no_longer_in_all_than_its_profile_allows(world: World) -> None:
    grant = await world.page(qosProfile="QOS_G", duration_ms=100_000)
    await world.sleep(50_000)
    [refusal] = await all_of(world.extend(grant, 20_001))
    assert refusal.cause == "DURATION_OUT_OF_RANGE"
    assert world.enforcer.steering() == {lease_id(grant): grant.lease.deadline_ns}
    await world.relocate(grant)  # does not begin anew
    extended = await world.extend(grant, 20_000)
    assert extended.deadline_ns == grant.lease.deadline_ns + 20_000 * NS_PER_MS
    await world.restart()
    [refusal] = await all_of(world.extend(grant, 1))
    assert refusal.cause == "DURATION_OUT_OF_RANGE"


@scenario()
async def test_an_extension_may_be_cut_to_what_is_allowed(world: World) -> None:
    grant = await world.page(qosProfile="QOS_G", duration_ms=100_000)
    session = session_id(grant)
    capped = await world.controller.extend(session, 50_000, capped=True)
    assert capped.deadline_ns == grant.lease.deadline_ns + 20_000 * NS_PER_MS
    entries = world.entries()
    assert await world.controller.extend(session, 50_000, capped=True) == capped
    assert world.entries() == entries


@scenario(tenants={"clinic": Policy(max_lease_ms=60_000)})
async def test_a_session_lasts_no_longer_in_all_than_its_tenant_may_have(world: World) -> None:
    grant = await world.page(tenant="clinic", duration_ms=50_000)
    await world.sleep(40_000)
    [refusal] = await all_of(world.extend(grant, 10_001))
    assert refusal.cause == "LEASE_QUOTA_EXCEEDED"
    await world.extend(grant, 10_000)


# Release


@scenario()
async def test_release_closes_everything_the_session_opened(world: World) -> None:
    grant = await world.page()
    await world.sleep(50)
    await world.relocate(grant)
    await world.sleep(50)
    world.trace.clear()
    await world.release(grant)
    assert world.trace == ["write Ended+Ended", "EndDrain+Revoke"]
    assert not world.enforcer.steering()
    assert not world.enforcer.drains()
    assert not world.slots()
    old, new = (end["usage"] for end in world.ends())
    assert (old["uplink_packets"], old["downlink_packets"]) == (50, 100)
    assert (new["uplink_packets"], new["downlink_packets"]) == (50, 50)
    [again] = await all_of(world.release(grant))
    assert again.cause == "SESSION_ENDED"
    [unknown] = await all_of(world.controller.release("none"))
    assert unknown.cause == "SESSION_UNKNOWN"
    assert (await world.page()).lease.terms.epoch == 3
    assert not world.verdict().problems


@scenario()
async def test_a_release_abandoned_in_its_write_is_no_second_end(world: World) -> None:
    grant = await world.page()
    world.store.gate.shut = True
    first = asyncio.create_task(world.release(grant))
    await until(lambda: world.store.gate.waiting)
    second = asyncio.create_task(world.release(grant))
    for _ in range(3):  # a caller that is impatient
        first.cancel()
        await asyncio.sleep(0)
    world.store.gate.open()
    await asyncio.gather(first, second, return_exceptions=True)
    assert len(world.ends()) == 1
    world.check_pools()
    await world.page()
    assert not world.verdict().problems


# The kernel or the disk refuses

Act = Callable[[World, Grant], Coroutine[Any, Any, object]]


def relocating(world: World, grant: Grant) -> Coroutine[Any, Any, object]:
    return world.relocate(grant)


def extending(world: World, grant: Grant) -> Coroutine[Any, Any, object]:
    return world.extend(grant, 1_000)


def releasing(world: World, grant: Grant) -> Coroutine[Any, Any, object]:
    return world.release(grant)


@pytest.mark.parametrize("act", [relocating, extending])
@scenario()
async def test_if_the_kernel_refuses_nobody_holds_a_lease(world: World, act: Act) -> None:
    grant = await world.page()
    world.enforcer.refuse = opens
    [refusal] = await all_of(act(world, grant))
    assert refusal.cause == "ENFORCEMENT_FAILED"
    assert not world.slots()
    assert not world.enforcer.steering()
    assert not world.enforcer.drains()
    assert set(world.states().values()) == {EndReason.NOT_ENFORCED}
    world.enforcer.refuse = lambda operations: False
    await world.page()  # and the UE may ask again
    world.check_pools()
    assert not world.verdict().problems


@scenario()
async def test_what_the_kernel_refused_to_close_is_closed_soon(world: World) -> None:
    grant = await world.page()
    world.enforcer.down = True
    [error] = await all_of(world.release(grant))
    assert isinstance(error, EnforcementError)
    assert not world.slots()
    await world.sleep(1_000)
    assert world.enforcer.steering()  # it does steer on, without a lease
    world.enforcer.down = False
    await world.sleep(200)
    assert not world.enforcer.steering()


@scenario()
async def test_if_the_kernel_refuses_even_to_close_its_timeouts_do(world: World) -> None:
    grant = await world.page(duration_ms=5_000)
    world.enforcer.down = True
    [refusal] = await all_of(world.relocate(grant))
    assert refusal.cause == "ENFORCEMENT_FAILED"
    assert not world.slots()
    await world.sleep(5_000)
    assert not world.enforcer.steering()


@scenario()
async def test_repair_waits_for_what_is_on_its_way(world: World) -> None:
    """What is durable, and not in the kernel yet, is not for a repair to do."""
    grant = await world.page()
    world.enforcer.gate.shut = True
    moving = asyncio.create_task(world.relocate(grant))
    await until(lambda: world.enforcer.gate.waiting)
    world.trace.clear()
    world.controller.disagree()
    for _ in range(20):
        await asyncio.sleep(0)
    world.enforcer.gate.open()
    moved = await moving
    await world.sleep(10)
    assert world.trace == ["Move", "reconcile"]
    assert world.enforcer.steering() == {lease_id(moved): moved.lease.deadline_ns}


@pytest.mark.parametrize("act", [relocating, extending, releasing])
@scenario()
async def test_a_full_disk_changes_nothing_for_who_has_a_lease(world: World, act: Act) -> None:
    grant = await world.page()
    world.store.full = True
    [error] = await all_of(act(world, grant))
    assert isinstance(error, StoreError)
    assert world.enforcer.steering() == {lease_id(grant): grant.lease.deadline_ns}
    assert len(world.enforcer.applied) == 1
    world.store.full = False
    await world.sleep(PREPARE_MS)
    assert world.slots() == {"edge1": 1}
    await act(world, grant)
    assert not world.verdict().problems
