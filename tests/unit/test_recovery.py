"""Recovery: an anchor has died, there is nothing to keep, and sessions are anchored anew."""

import asyncio

from catalogues import TWO_SERVICES
from fakes import (
    CELLS,
    PREPARE_MS,
    SINK,
    World,
    cancelled,
    lease_id,
    opens,
    scenario,
    session_id,
    until,
)

from controlplane.fleet import AnchorFailed
from controlplane.lease import EndReason, State


@scenario()
async def test_a_session_at_a_dead_anchor_is_anchored_anew_in_one_write(world: World) -> None:
    grant = await world.page(sink=SINK)
    await world.sleep(1_000)
    for anchor in ("edge1", "edge2"):
        await world.heartbeat(anchor)
    world.trace.clear()
    beating = asyncio.create_task(world.heartbeats("edge2"))
    await world.sleep(400)
    assert world.trace == [
        "write AnchorFailed",
        "write Prepared+Committed+Ended",
        "Revoke+Install",
    ]
    assert world.states() == {"edge1@1": EndReason.ANCHOR_FAILED, "edge2@2": State.COMMITTED}
    assert world.enforcer.anchors()["10.45.0.1>198.18.0.1"] == "edge2"
    held = world.ledger.committed(world.controller.session(session_id(grant)))
    assert held is not None
    assert held.deadline_ns == grant.lease.deadline_ns
    [end] = world.ends()
    assert end["usage"]["uplink_packets"] > 1_000
    await cancelled(beating)
    world.check_pools()
    assert not world.verdict().problems
    assert world.verdict().counts.recoveries == 1


@scenario()
async def test_an_anchor_that_refuses_the_connection_is_dead(world: World) -> None:
    world.gateway.dead = {"edge1"}
    grant = await world.page()
    assert grant.lease.terms.anchor == "edge2"
    await world.sleep(10)
    [failed] = [entry for entry in world.entries() if entry["type"] == "AnchorFailed"]
    assert failed["name"] == "edge1"
    world.gateway.dead = set()
    await world.sleep(1_100)  # it is asked again, once in a second
    assert world.entries()[-1]["type"] == "AnchorRecovered"


@scenario(catalogue_text=TWO_SERVICES)
async def test_where_no_anchor_of_the_service_is_left_the_intent_is_paged_anew(
    world: World,
) -> None:
    grant = await world.page(sink=SINK)
    other = await world.page("ue2")
    world.gateway.dead = {"edge1", "edge2"}
    await world.heartbeat("edge1")
    await world.sleep(1_000)
    [moved] = world.ledger.sessions(ue="ue1") or world.ledger.sessions(ue="ue2")
    held = world.ledger.committed(moved)
    assert held is not None
    assert (moved.aisi, held.terms.anchor, held.terms.cause) == ("write", "edge3", "FAILURE")
    assert held.deadline_ns == grant.lease.deadline_ns
    reasons = world.reasons()
    assert reasons == {State.COMMITTED: 1, EndReason.REPAGED: 1, EndReason.ANCHOR_FAILED: 1}
    loser = other if moved.ue == "ue1" else grant
    assert world.ledger.lease(lease_id(loser)).end_reason is EndReason.ANCHOR_FAILED
    if moved.ue == "ue1":  # the sink goes with it
        kept = world.store.sink(moved.session_id)
        assert kept is not None
        assert kept.uri == SINK.uri
    world.check_pools()
    assert not world.verdict().problems


@scenario(catalogue_text=TWO_SERVICES)
async def test_what_was_rolled_back_does_not_shorten_what_is_paged_anew(world: World) -> None:
    grant = await world.page()
    world.gateway.unready = {"edge2"}
    await world.drain("edge1")
    await world.sleep(PREPARE_MS * 2)
    [session] = world.ledger.sessions(ue="ue1")
    held = world.ledger.committed(session)
    assert held is not None
    assert (held.terms.anchor, held.deadline_ns) == ("edge3", grant.lease.deadline_ns)
    assert world.reasons() == {
        EndReason.ABORTED: 1,
        EndReason.REPAGED: 1,
        State.COMMITTED: 1,
    }
    assert not world.verdict().problems


@scenario(cells=CELLS)
async def test_a_recovery_that_the_kernel_refuses_ends_the_session(world: World) -> None:
    await world.page()
    await world.heartbeat("edge1")
    world.enforcer.refuse = opens
    await world.sleep(400)
    assert not world.enforcer.steering()
    assert set(world.states().values()) == {EndReason.ANCHOR_FAILED, EndReason.NOT_ENFORCED}
    world.check_pools()


@scenario()
async def test_a_recovery_that_cannot_be_written_is_tried_again(world: World) -> None:
    grant = await world.page()
    await world.heartbeat("edge1")

    def fail() -> None:
        world.store.fail_at = 1

    world.gateway.meanwhile = fail  # while another anchor is asked
    await world.sleep(400)
    world.gateway.meanwhile = lambda: None
    assert world.states() == {"edge1@1": State.COMMITTED}
    await world.sleep(2_000)
    assert world.states()["edge1@1"] == EndReason.ANCHOR_FAILED
    assert world.enforcer.anchors()["10.45.0.1>198.18.0.1"] == "edge2"
    assert grant.lease.terms.anchor == "edge1"


@scenario()
async def test_a_session_is_recovered_once(world: World) -> None:
    """It is committed at an anchor that fails in the same instant: both tell of it."""
    await world.heartbeat("edge1")
    world.store.gate.shut = True
    paging = asyncio.create_task(world.page())
    await until(lambda: world.store.gate.waiting)
    failing = asyncio.create_task(world.keeper.record([died("edge1")]))
    await asyncio.sleep(0)
    world.store.gate.open()
    await asyncio.gather(paging, failing)
    await world.sleep(100)
    assert world.states() == {"edge1@1": EndReason.ANCHOR_FAILED, "edge2@2": State.COMMITTED}


def died(anchor: str) -> AnchorFailed:
    return AnchorFailed(anchor, "it is said to be dead")


@scenario()
async def test_what_is_granted_at_an_anchor_that_failed_meanwhile_is_recovered(
    world: World,
) -> None:
    """It was asked, and was ready; then it failed, before the lease was granted."""
    world.gateway.gate.shut = True
    paging = asyncio.create_task(world.page())
    await until(lambda: world.gateway.gate.waiting and world.states())
    await world.keeper.record([died("edge1")])
    world.gateway.unready.add("edge1")  # and does not recover
    world.gateway.gate.let(True)
    world.gateway.gate.open()
    grant = await paging
    assert grant.lease.terms.anchor == "edge1"
    await world.sleep(100)
    assert world.states() == {"edge1@1": EndReason.ANCHOR_FAILED, "edge2@2": State.COMMITTED}
    await world.release(grant)
    assert not world.enforcer.steering()
