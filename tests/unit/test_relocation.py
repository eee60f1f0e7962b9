"""Relocation: a session moves and its UE notices nothing, or nothing has changed."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import jwt
import pytest
from catalogues import TWO_SERVICES
from fakes import (
    DRAIN_MS,
    PREPARE_MS,
    World,
    all_of,
    cancelled,
    lease_id,
    moves,
    opens,
    scenario,
    session_id,
    until,
)

from controlplane.answers import Grant
from controlplane.clock import NS_PER_MS
from controlplane.controller import Settings
from controlplane.enforcement import Move
from controlplane.lease import EndReason, State
from controlplane.relocation import BETTER
from controlplane.store import StoreError

# Make before break


@scenario()
async def test_make_before_break(world: World) -> None:
    before = await world.page()
    await world.sleep(10_000)
    world.trace.clear()
    after = await world.relocate(before)
    old, new = before.lease, after.lease
    # One write and one batch, and only after the target said that it is ready.
    assert world.trace == ["ask edge2", "write Prepared", "write Committed+DrainStarted", "Move"]
    drain_until_ns = world.clock.now + DRAIN_MS * NS_PER_MS
    assert world.enforcer.applied[-1] == (Move(new.binding(), old.binding(), drain_until_ns),)
    assert (new.terms.anchor, new.terms.epoch, new.terms.cause) == ("edge2", 2, "REQUEST")
    assert new.terms.session_id == old.terms.session_id
    assert new.deadline_ns == old.deadline_ns  # no more time than was asked for
    assert after.token is not None
    claims = jwt.decode(after.token, options={"verify_signature": False})
    assert (claims["lease"], claims["epoch"]) == (new.terms.lease_id, 2)
    assert world.slots() == {"edge1": 1, "edge2": 1}

    await world.sleep(DRAIN_MS + 1)
    assert world.states() == {"edge1@1": EndReason.RELOCATED, "edge2@2": State.COMMITTED}
    assert world.slots() == {"edge2": 1}
    assert world.enforcer.steering() == {new.terms.lease_id: new.deadline_ns}
    await world.release(before)
    first, second = (end["usage"] for end in world.ends())
    assert first["uplink_packets"] == 10_000  # up to the flip, although the flip took its counter
    assert 10_000 < first["downlink_packets"] <= 10_000 + DRAIN_MS
    assert second["uplink_packets"] == DRAIN_MS + 1
    assert not world.verdict().problems
    assert world.verdict().counts.relocations == 1


@scenario()
async def test_a_drain_ends_with_the_lease_at_the_latest(world: World) -> None:
    """Both are due at once, and end once each."""
    before = await world.page(duration_ms=1_000)
    await world.sleep(1_000 - DRAIN_MS / 2)
    await world.relocate(before)
    assert world.enforcer.drains() == {lease_id(before): before.lease.deadline_ns}
    await world.sleep(1_000)
    assert world.states() == {"edge1@1": EndReason.RELOCATED, "edge2@2": EndReason.EXPIRED}
    assert len(world.ends()) == 2
    world.check_pools()
    assert not world.verdict().problems


@scenario()
async def test_there_and_back_again(world: World) -> None:
    grant = await world.page()
    for epoch, anchor in [(2, "edge2"), (3, "edge1"), (4, "edge2")]:
        moved = await world.relocate(grant, anchor)
        assert (moved.lease.terms.epoch, moved.lease.terms.anchor) == (epoch, anchor)
        await world.sleep(DRAIN_MS + 1)
    assert world.slots() == {"edge2": 1}
    assert not world.verdict().problems


@scenario()
async def test_back_while_it_still_drains(world: World) -> None:
    grant = await world.page()
    await world.relocate(grant, "edge2")
    await world.relocate(grant, "edge1")
    assert world.slots() == {"edge1": 2, "edge2": 1}
    await world.sleep(DRAIN_MS + 1)
    assert world.slots() == {"edge1": 1}
    assert not world.verdict().problems


@scenario()
async def test_better_moves_only_for_enough(world: World) -> None:
    grant = await world.page()
    [refusal] = await all_of(world.relocate(grant, BETTER))
    assert refusal.cause == "NO_BETTER_ANCHOR"
    for anchor in ("edge1", "edge2"):
        await world.heartbeat(anchor, load=0.95 if anchor == "edge1" else 0.1)
    moved = await world.relocate(grant, BETTER)
    assert moved.lease.terms.anchor == "edge2"


# Whatever keeps it from moving changes nothing


@scenario()
async def test_the_first_intents_constraints_hold_for_every_move(world: World) -> None:
    grant = await world.page(minTrustTier=3)
    [refusal] = await all_of(world.relocate(grant, "cloud"))
    excluded = {exclusion.anchor: exclusion.constraint for exclusion in refusal.excluded}
    assert (refusal.cause, excluded) == ("NO_CANDIDATE", {"cloud": "trustTier"})
    world.gateway.unready = {"edge2"}
    [refusal] = await all_of(world.relocate(grant))
    assert refusal.cause == "ANCHOR_NOT_READY"


@pytest.mark.parametrize(
    ("target", "cause"),
    [("edge1", "ALREADY_THERE"), ("nowhere", "NO_CANDIDATE"), ("edge2", "ANCHOR_NOT_READY")],
)
@scenario()
async def test_a_target_that_cannot_be_changes_nothing(
    world: World, target: str, cause: str
) -> None:
    world.gateway.unready = {"edge2"}
    grant = await world.page()
    [refusal] = await all_of(world.relocate(grant, target))
    assert refusal.cause == cause
    assert world.enforcer.steering() == {lease_id(grant): grant.lease.deadline_ns}
    assert len(world.enforcer.applied) == 1
    assert world.slots() == {"edge1": 1}
    world.gateway.unready = set()
    assert (await world.relocate(grant)).lease.terms.anchor == "edge2"  # and may be tried again


@scenario()
async def test_a_target_that_is_not_ready_makes_way_for_the_next(world: World) -> None:
    world.gateway.unready = {"edge2"}
    grant = await world.page()
    moved = await world.relocate(grant)
    assert moved.lease.terms.anchor == "cloud"
    assert world.states() == {
        "edge1@1": State.DRAINING,
        "edge2@2": EndReason.ABORTED,
        "cloud@3": State.COMMITTED,
    }
    assert not world.verdict().problems


@scenario(catalogue_text=TWO_SERVICES)
async def test_a_target_without_bandwidth_gets_nothing_reserved(world: World) -> None:
    grant = await world.page(qosProfile="QOS_G")
    [refusal] = await all_of(world.relocate(grant, "edge2"))
    assert refusal.cause == "NO_CANDIDATE"
    assert "n6Downlink of edge2: 4,000,000 bit/s asked, 3,000,000 free" in str(refusal)
    assert world.slots() == {"edge1": 1}
    world.check_pools()


@scenario(catalogue_text=TWO_SERVICES)
async def test_both_leases_of_a_move_are_one_load_on_the_cell(world: World) -> None:
    """10 Mbit/s carry two sessions of 4: a third does not fit, the relocation of one does."""
    world.catalogue.anchors[1].__dict__["n6_downlink_bps"] = None
    grant = await world.page(qosProfile="QOS_G")
    await world.page("ue2", qosProfile="QOS_G")
    await world.relocate(grant)
    assert world.slots() == {"edge1": 2, "edge2": 1}
    world.check_pools()


Happens = Callable[[World, Grant], Coroutine[Any, Any, object]]


async def expires(world: World, grant: Grant) -> None:
    world.clock.advance(1_000)


async def takes_too_long(world: World, grant: Grant) -> None:
    world.clock.advance(PREPARE_MS)


@pytest.mark.parametrize(
    ("happens", "duration_ms", "cause"),
    [(expires, 1_000, "SESSION_ENDED"), (takes_too_long, 60_000, "PREPARE_TIMED_OUT")],
)
@scenario()
async def test_a_target_that_gets_ready_too_late(
    world: World, happens: Happens, duration_ms: int, cause: str
) -> None:
    grant = await world.page(duration_ms=duration_ms)
    world.gateway.meanwhile = lambda: happens(world, grant)
    [refusal] = await all_of(world.relocate(grant))
    await world.sleep(10)
    assert refusal.cause == cause
    assert not moves(world)
    if cause == "SESSION_ENDED":
        assert not world.slots()
        assert not world.enforcer.steering()
    else:  # nothing has changed
        assert world.slots() == {"edge1": 1}
        assert list(world.enforcer.steering()) == [lease_id(grant)]
    world.check_pools()


@scenario()
async def test_what_else_is_asked_of_a_session_waits_for_its_move(world: World) -> None:
    grant = await world.page(duration_ms=10_000)
    world.gateway.gate.shut = True
    moving = asyncio.create_task(world.relocate(grant))
    await until(lambda: world.gateway.gate.waiting)
    others = [
        asyncio.create_task(work)
        for work in (world.relocate(grant), world.extend(grant, 5_000), world.release(grant))
    ]
    await asyncio.sleep(0)
    assert not any(task.done() for task in others)
    world.gateway.gate.open()
    moved = await moving
    assert moved.lease.terms.anchor == "edge2"
    back = await others[0]
    assert back.lease.terms.anchor == "edge1"
    assert (await others[1]).deadline_ns == grant.lease.deadline_ns + 5_000 * NS_PER_MS
    await others[2]
    assert not world.enforcer.steering()
    world.check_pools()
    assert not world.verdict().problems


@scenario()
async def test_a_move_that_is_abandoned_changes_nothing(world: World) -> None:
    grant = await world.page()
    world.gateway.gate.shut = True
    moving = asyncio.create_task(world.relocate(grant))
    await until(lambda: world.gateway.gate.waiting)
    await cancelled(moving)
    world.gateway.gate.open()
    await world.sleep(PREPARE_MS + 1)
    assert world.states() == {
        "edge1@1": State.COMMITTED,
        "edge2@2": EndReason.PREPARE_TIMED_OUT,
    }
    assert world.slots() == {"edge1": 1}


@scenario()
async def test_if_the_kernel_refuses_the_flip_nobody_holds_a_lease(world: World) -> None:
    grant = await world.page()
    world.enforcer.refuse = opens
    [refusal] = await all_of(world.relocate(grant))
    assert refusal.cause == "ENFORCEMENT_FAILED"
    assert not world.enforcer.steering()
    assert not world.enforcer.drains()
    assert set(world.states().values()) == {EndReason.NOT_ENFORCED}
    world.check_pools()
    world.enforcer.refuse = lambda operations: False
    await world.page()


@pytest.mark.parametrize("at_write", [1, 2])
@scenario()
async def test_a_full_disk_changes_nothing_for_who_has_a_lease(world: World, at_write: int) -> None:
    grant = await world.page()
    await world.sleep(100)  # its acknowledgement is written
    world.store.fail_at = at_write
    [error] = await all_of(world.relocate(grant))
    assert isinstance(error, StoreError)
    assert world.enforcer.steering() == {lease_id(grant): grant.lease.deadline_ns}
    assert not moves(world)
    await world.sleep(PREPARE_MS + 1)
    assert world.slots() == {"edge1": 1}
    assert (await world.relocate(grant)).lease.terms.anchor == "edge2"


# Break before make


@scenario()
async def test_breaking_before_making_is_for_experiments(world: World) -> None:
    grant = await world.page()
    [refusal] = await all_of(world.relocate(grant, break_before_make=True))
    assert refusal.cause == "NOT_ALLOWED"
    assert len(world.enforcer.applied) == 1


@scenario(settings=Settings(allow_break_before_make=True, drain_ms=DRAIN_MS))
async def test_breaking_before_making_really_breaks_first(world: World) -> None:
    grant = await world.page()
    steered: list[dict[str, int]] = []
    world.gateway.meanwhile = lambda: steered.append(world.enforcer.steering())
    world.trace.clear()
    moved = await world.relocate(grant, break_before_make=True)
    assert steered == [{}]
    assert world.trace == [
        *("write Ended", "Revoke", "ask edge2", "write Prepared"),
        *("write Committed", "Install"),
    ]
    assert (moved.lease.terms.epoch, moved.lease.deadline_ns) == (2, grant.lease.deadline_ns)
    session = world.controller.session(session_id(grant))
    assert session.ended_ns is None
    world.check_pools()
    await world.sleep(60_000)
    world.check_pools()
    assert world.verdict().counts.breaks == 1
    assert not world.verdict().problems
