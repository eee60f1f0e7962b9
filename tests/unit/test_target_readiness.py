"""A relocation whose target is not ready yet: the uplink waits for it, or nothing changes."""

import asyncio

from catalogues import CATALOGUE
from fakes import (
    DRAIN_MS,
    PREPARE_MS,
    World,
    all_of,
    lease_id,
    moves,
    scenario,
    until,
)

from controlplane.clock import NS_PER_MS
from controlplane.controller import Settings
from controlplane.enforcement import Hold, Move
from controlplane.store import StoreError

CHAT_PORT = 'address6: "fd00:a151::1"'
BUFFERS = CATALOGUE.replace(CHAT_PORT, f"{CHAT_PORT}, relocation: buffer", 1)
FLIPS = CATALOGUE.replace(CHAT_PORT, f"{CHAT_PORT}, relocation: flip", 1)
BUFFER = Settings(prepare_ms=PREPARE_MS, drain_ms=DRAIN_MS, buffer_ms=1_000)


@scenario(catalogue_text=BUFFERS, settings=BUFFER)
async def test_the_uplink_waits_for_a_target_that_gets_ready(world: World) -> None:
    before = await world.page()
    await world.heartbeat("edge2", ready_aisis=frozenset())  # it lives, and says it is not ready
    world.gateway.unready.add("edge2")
    moving = asyncio.create_task(world.relocate(before, "edge2"))
    await world.sleep(400)
    held = world.enforcer.held
    assert list(held) == [lease_id(before)]
    assert world.enforcer.anchors()["10.45.0.1>198.18.0.1"] == "edge1"  # the old path stands
    world.gateway.unready.discard("edge2")
    after = await moving
    assert after.lease.terms.anchor == "edge2"
    assert isinstance(world.enforcer.applied[-1][0], Move)
    assert not world.verdict().problems


@scenario(catalogue_text=BUFFERS, settings=BUFFER)
async def test_a_target_that_does_not_get_ready_changes_nothing(world: World) -> None:
    before = await world.page()
    world.gateway.dead.add("edge2")  # which is no failure: it is not up yet
    began_ns = world.clock.now
    [refusal] = await all_of(world.relocate(before, "edge2"))
    assert refusal.cause == "ANCHOR_NOT_READY"
    assert world.clock.now - began_ns < 1_100 * NS_PER_MS
    assert world.enforcer.held == {}  # it went on
    assert world.enforcer.steering() == {lease_id(before): before.lease.deadline_ns}
    assert world.slots() == {"edge1": 1}
    assert not world.verdict().problems
    assert moves(world) == 0


@scenario(catalogue_text=BUFFERS, settings=BUFFER)
async def test_nothing_is_held_beyond_its_lease(world: World) -> None:
    before = await world.page(duration_ms=500)
    world.gateway.unready.add("edge2")
    moving = asyncio.create_task(world.relocate(before, "edge2"))
    await world.sleep(100)
    assert world.enforcer.held == {lease_id(before): before.lease.deadline_ns}
    [refusal] = await asyncio.gather(moving, return_exceptions=True)
    assert getattr(refusal, "cause", None) == "ANCHOR_NOT_READY"
    assert not world.verdict().problems


@scenario(catalogue_text=BUFFERS, settings=BUFFER)
async def test_where_nothing_can_be_held_the_target_must_be_ready(world: World) -> None:
    before = await world.page()
    world.gateway.unready.add("edge2")
    world.enforcer.refuse = lambda operations: isinstance(operations[0], Hold)
    [refusal] = await all_of(world.relocate(before, "edge2"))
    assert refusal.cause == "ANCHOR_NOT_READY"
    assert world.enforcer.steering() == {lease_id(before): before.lease.deadline_ns}


@scenario(catalogue_text=FLIPS)
async def test_a_service_that_flips_drains_for_an_instant(world: World) -> None:
    before = await world.page()
    await world.relocate(before, "edge2")
    until_ns = world.enforcer.drains()[lease_id(before)]
    assert until_ns == world.clock.now + world.controller.settings.flip_drain_ms * NS_PER_MS


@scenario()
async def test_nothing_is_granted_before_the_preparation_is_durable(world: World) -> None:
    """The target is asked meanwhile, and may have answered long before."""
    grant = await world.page()
    world.store.gate.shut = True
    moving = asyncio.create_task(world.relocate(grant))
    await until(lambda: world.gateway.asked[-1:] == [("edge2", "chat")])
    for _ in range(100):
        await asyncio.sleep(0)
    assert not moving.done()
    assert not moves(world)
    world.store.gate.open()
    assert (await moving).lease.terms.anchor == "edge2"


@scenario()
async def test_a_preparation_that_is_not_durable_leaves_no_question_behind(world: World) -> None:
    grant = await world.page()
    await world.sleep(100)  # its acknowledgement is written
    world.gateway.gate.shut = True
    world.store.fail_at = 1
    [error] = await all_of(world.relocate(grant))
    assert isinstance(error, StoreError)
    assert world.gateway.asked[-1] == ("edge2", "chat")
    await until(lambda: not world.gateway.gate.waiting)
    world.check_pools()
