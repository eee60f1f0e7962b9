"""Group commit: one write and one kernel batch for what arrived together; each fails for itself."""

import asyncio
from collections.abc import Sequence
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pytest
from fakes import UES, World, all_of, lease_id, opens, scenario, until

from controlplane.answers import Grant, Refusal
from controlplane.committer import ACKNOWLEDGE_S, MAX_CHANGES, Change, Done
from controlplane.enforcement import Install, Operation
from controlplane.facts import UeMoved
from controlplane.lease import EndReason, State
from controlplane.ledger import Ledger
from controlplane.store import StoreError

ROOMY = """
qos_profiles: [{name: QOS_E}]
services: [{aisi: chat, task: text-generation, model: m, address4: 198.18.0.1,
            address6: "fd00:a151::1"}]
anchors:
  - {name: edge1, region: n, trust_tier: 0, slots: 100, cost: 0,
     hosts: [{aisi: chat, service_time_ms: 1}]}
"""
MOVED = UeMoved("ue1", "gnb2")


def writes(world: World) -> list[list[str]]:
    return [types for types in world.store.writes if types != ["Started"]]


@scenario(catalogue_text=ROOMY)
async def test_what_arrives_together_is_one_write_and_one_batch(world: World) -> None:
    await world.heartbeat("edge1")
    outcomes = await all_of(*map(world.page, UES))
    assert all(isinstance(one, Grant) for one in outcomes)
    assert writes(world) == [["Prepared", "Committed"] * len(UES)]
    assert [len(batch) for batch in world.enforcer.applied] == [len(UES)]
    assert len({outcome.timeline.enforced_ns for outcome in outcomes}) == 1


@scenario(catalogue_text=ROOMY)
async def test_what_arrives_during_a_write_is_the_next_one(world: World) -> None:
    await world.heartbeat("edge1")
    world.store.gate.shut = True
    first = asyncio.create_task(world.page("ue1"))
    await until(lambda: world.store.gate.waiting)
    others = [asyncio.create_task(world.page(ue)) for ue in UES[1:]]
    await until(lambda: all(world.controller.locks.held(ue) for ue in UES))
    assert not world.enforcer.applied  # nothing is enforced that is not durable
    world.store.gate.open()
    await asyncio.gather(first, *others)
    counts = [types.count("Committed") for types in writes(world)]
    assert counts == [1, len(UES) - 1]


@scenario()
async def test_a_batch_has_its_limit(world: World) -> None:
    submit = world.controller.committer.submit
    await asyncio.gather(*(submit(Change([MOVED])) for _ in range(MAX_CHANGES + 1)))
    assert [len(types) for types in writes(world)] == [MAX_CHANGES, 1]


@scenario(catalogue_text=ROOMY)
async def test_acknowledgements_go_with_the_next_write_or_soon(world: World) -> None:
    await world.heartbeat("edge1")
    first = await world.page("ue1")
    second = await world.page("ue2")
    assert writes(world)[-1] == ["Acknowledged", "Prepared", "Committed"]
    before = world.clock.now
    await world.sleep(ACKNOWLEDGE_S * 1_000 + 1)
    assert writes(world)[-1] == ["Acknowledged"]
    acknowledged = [line for line in world.lines() if b'"type":"Acknowledged"' in line]
    for grant, line in zip((first, second), acknowledged, strict=True):
        assert lease_id(grant).encode() in line
    assert world.clock.now - before < 25_000_000
    assert not world.verdict().problems


# Each fails for itself


@scenario(catalogue_text=ROOMY)
async def test_one_that_the_kernel_refuses_fails_alone(world: World) -> None:
    await world.heartbeat("edge1")

    def poisoned(operations: Sequence[Operation]) -> bool:
        return any(
            isinstance(operation, Install) and str(operation.binding.flows[0].ue) == "10.45.0.3"
            for operation in operations
        )

    world.enforcer.refuse = poisoned
    outcomes = await all_of(*map(world.page, UES))
    refused = [ue for ue, one in zip(UES, outcomes, strict=True) if isinstance(one, Refusal)]
    assert refused == ["ue3"]
    assert len(world.enforcer.steering()) == len(UES) - 1
    assert world.reasons() == {State.COMMITTED: len(UES) - 1, EndReason.NOT_ENFORCED: 1}
    world.check_pools()
    await world.sleep(100)
    acknowledged = b"".join(line for line in world.lines() if b'"type":"Acknowledged"' in line)
    for one in outcomes:
        if isinstance(one, Grant):
            assert lease_id(one).encode() in acknowledged
    assert not world.verdict().problems


@scenario(catalogue_text=ROOMY)
async def test_a_write_that_fails_fails_for_all_in_it_and_for_nobody_after(world: World) -> None:
    await world.heartbeat("edge1")
    world.store.fail_at = 1
    outcomes = await all_of(*map(world.page, UES))
    assert all(isinstance(one, StoreError) for one in outcomes)
    assert not world.enforcer.applied
    assert not world.entries()
    world.check_pools()
    outcomes = await all_of(*map(world.page, UES))
    assert all(isinstance(one, Grant) for one in outcomes)
    assert not world.verdict().problems


@scenario()
async def test_acknowledgements_outlast_a_full_disk(world: World) -> None:
    await world.page()
    world.store.full = True
    await world.sleep(200)
    world.store.full = False
    await world.sleep(50)
    assert writes(world)[-1] == ["Acknowledged"]
    assert len([types for types in writes(world) if "Acknowledged" in types]) == 1


@scenario()
async def test_counts_outlast_a_full_disk(world: World) -> None:
    """The kernel has them no more when the end can be written at last."""
    await world.page(duration_ms=1_000)
    await world.sleep(990)
    world.store.full = True
    await world.sleep(200)
    assert world.states() == {"edge1@1": State.COMMITTED}
    world.store.full = False
    await world.sleep(200)
    [end] = world.ends()
    assert end["usage"]["uplink_packets"] >= 970
    assert not world.verdict().problems


# Who is cancelled


@pytest.mark.parametrize("held_at", ["disk", "kernel"])
@pytest.mark.parametrize("how", ["it works", "it fails"])
@scenario()
async def test_who_is_cancelled_returns_when_it_is_known(
    world: World, held_at: str, how: str
) -> None:
    await world.heartbeat("edge1")
    gate = world.store.gate if held_at == "disk" else world.enforcer.gate
    gate.shut = True
    paging = asyncio.create_task(world.page())
    await until(lambda: gate.waiting)
    for _ in range(2):
        paging.cancel()
        await asyncio.sleep(0)
    assert not paging.done()
    assert world.controller.locks.held("ue1")
    if how == "it fails" and held_at == "disk":
        world.store.full = True
    elif how == "it fails":
        world.enforcer.refuse = opens
    gate.open()
    await all_of(paging)
    world.store.full = False
    assert paging.cancelled()
    assert not world.controller.locks.held("ue1")
    await world.sleep(10)
    granted = [] if how == "it fails" else [State.COMMITTED]
    if held_at == "kernel":  # what was durable is ended, although its caller has left
        granted = granted or [EndReason.NOT_ENFORCED]
    assert list(world.reasons()) == granted
    assert len(world.enforcer.steering()) == (how == "it works")
    world.check_pools()


@scenario()
async def test_who_is_cancelled_in_the_instant_it_is_known_returns(world: World) -> None:
    await world.heartbeat("edge1")
    world.enforcer.gate.shut = True
    paging = asyncio.create_task(world.page())
    await until(lambda: world.enforcer.gate.waiting)
    turns = 0
    world.enforcer.gate.let()
    while not paging.done():  # at one of these turns both come together
        paging.cancel()
        await asyncio.sleep(0)
        turns += 1
        assert turns < 50
    assert paging.cancelled()
    assert list(world.enforcer.steering())


# It fails stop


def test_a_fault_of_its_own_is_the_end_of_all_grants() -> None:
    """Memory may have run ahead of the log, or behind: only a new start can tell."""
    folds = 0
    fold = Ledger.fold

    def faulty(self: Ledger, event: Any, at_ns: int) -> None:
        nonlocal folds
        folds += 1
        if folds == 1:
            raise KeyError("a fault")
        fold(self, event, at_ns)

    async def run() -> None:
        with patch.object(Ledger, "fold", faulty):
            outcomes = await all_of(world.page("ue1"), world.page("ue2"))
        outcomes += await all_of(world.page("ue3"))
        assert all(isinstance(one, StoreError) for one in outcomes)
        assert not world.enforcer.applied
        await world.restart()
        assert (await world.page("ue4")).lease.state is State.COMMITTED
        assert not world.verdict().problems

    with World() as world:
        world.run(run())


@scenario()
async def test_after_a_stop_nothing_waits_for_ever(world: World) -> None:
    committer = world.controller.committer
    await world.stop()
    with pytest.raises(StoreError, match="stopped"):
        await committer.submit(Change([MOVED]))
    await world.start()


def test_nothing_to_do_is_no_work() -> None:
    """An idle control plane writes nothing, and asks the kernel nothing."""
    with World() as world:
        world.run(world.sleep(3_600_000))
        assert world.store.writes == [["Started"]]
        assert world.enforcer.batches == 0


@scenario(catalogue_text=ROOMY)
async def test_load_tells_how_full_batches_are(world: World) -> None:
    await world.heartbeat("edge1")
    load = world.controller.committer.load
    before = load.batches, load.changes, load.entries
    await all_of(world.page("ue1"), world.page("ue2"))
    after = load.batches, load.changes, load.entries
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 2, 4]


@scenario()
async def test_done_tells_when_it_was_durable_and_when_enforced(world: World) -> None:
    world.store.gate.shut = world.enforcer.gate.shut = True
    grant_at = world.clock.now
    work = asyncio.create_task(world.qos())
    await until(lambda: world.store.gate.waiting)
    world.clock.advance(3)
    world.store.gate.open()
    await until(lambda: world.enforcer.gate.waiting)
    world.clock.advance(4)
    world.enforcer.gate.open()
    line = (await work).timeline
    assert line is not None
    steps = [grant_at, line.prepared_ns, line.committed_ns, line.enforced_ns]
    assert [later - earlier for earlier, later in pairwise(steps)] == [0, 3_000_000, 4_000_000]
    done = await world.controller.committer.submit(Change([MOVED]))
    assert done == Done(world.clock.now, world.clock.now)
