"""Leases end when they are due, in few writes, with their counts."""

import asyncio
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address

from fakes import (
    World,
    all_of,
    lease_id,
    scenario,
    session_id,
    until,
)

from controlplane.answers import Grant
from controlplane.lease import EndReason
from controlplane.parties import Subscriber

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


@scenario()
async def test_a_lease_ends_when_it_is_due_with_counts_from_just_before(world: World) -> None:
    short, long = await world.page(duration_ms=1_000), await world.page("ue2", duration_ms=2_000)
    await world.sleep(999)
    assert not world.ends()
    await world.sleep(1.001)
    [end] = world.ends()
    assert (end["lease_id"], end["reason"]) == (lease_id(short), "EXPIRED")
    assert end["usage"]["uplink_packets"] == 970  # when the kernel still had them
    assert world.slots() == {long.lease.terms.anchor: 1}
    await world.sleep(5_000)
    assert len(world.ends()) == 2
    world.check_pools()
    assert not world.verdict().problems


@scenario()
async def test_a_stall_before_the_deadline_leaves_the_counts_of_the_reading_before(
    world: World,
) -> None:
    await world.page(duration_ms=2_000)
    await world.sleep(1_600)
    world.clock.advance(1_000)  # this process does not run
    await world.sleep(10)
    [end] = world.ends()
    assert end["usage"]["uplink_packets"] == 1_500
    assert not world.verdict().problems


@scenario()
async def test_an_extension_puts_the_end_off(world: World) -> None:
    grant = await world.page(duration_ms=1_000)
    await world.sleep(980)  # its counts have been read for the end that was due
    await world.extend(grant, 1_000)
    await world.sleep(1_010)
    assert not world.ends()
    await world.sleep(20)
    [end] = world.ends()
    assert end["usage"]["uplink_packets"] == 1_970
    assert not world.verdict().problems


@scenario(catalogue_text=ONE_SERVICE)
async def test_many_that_are_due_at_once_end_in_few_writes(world: World) -> None:
    world.controller.subscribers |= many(world, 600)
    ues = [ue for ue in world.controller.subscribers if ue.startswith("many")]
    outcomes = await all_of(*(world.page(ue, duration_ms=1_000) for ue in ues))
    assert all(isinstance(one, Grant) for one in outcomes)
    writes = len(world.store.writes)
    await world.sleep(1_100)
    ending = [types for types in world.store.writes[writes:] if "Ended" in types]
    assert len(ending) <= 3
    assert world.reasons() == {EndReason.EXPIRED: 600}
    assert all(end["usage"]["uplink_packets"] for end in world.ends())
    world.check_pools()
    assert not world.verdict().problems


def many(world: World, number: int) -> dict[str, Subscriber]:
    [like, *_] = world.controller.subscribers.values()
    return {
        f"many{n}": replace(
            like,
            ue=f"many{n}",
            address4=IPv4Address(f"10.45.{4 + n // 200}.{n % 200}"),
            address6=IPv6Address(f"fd00:45::1:{n}"),
        )
        for n in range(number)
    }


@scenario()
async def test_a_ue_whose_transaction_is_under_way_keeps_nobody_else_waiting(world: World) -> None:
    busy = await world.page(duration_ms=1_000)
    idle = await world.page("ue2", duration_ms=1_000)
    await world.sleep(900)
    world.gateway.gate.shut = True
    asking = asyncio.create_task(world.page(task="automatic-speech-recognition"))
    await until(lambda: world.gateway.gate.waiting)
    await world.sleep(200)
    assert [end["lease_id"] for end in world.ends()] == [lease_id(idle)]
    world.gateway.gate.open()
    await asking
    await world.sleep(10)
    assert world.ledger.lease(lease_id(busy)).end_reason is EndReason.EXPIRED
    assert all(end["usage"]["uplink_packets"] == 970 for end in world.ends())
    assert not world.verdict().problems


@scenario()
async def test_what_could_not_be_written_when_it_was_due_is_written_later(world: World) -> None:
    await world.page(duration_ms=1_000)
    await world.page("ue2", duration_ms=1_000)
    await world.sleep(900)
    world.store.full = True
    await world.sleep(500)
    assert not world.ends()
    world.store.full = False
    await world.sleep(200)
    assert world.reasons() == {EndReason.EXPIRED: 2}
    world.check_pools()


@scenario()
async def test_a_kernel_that_gives_no_counts_keeps_nothing_alive(world: World) -> None:
    await world.page(duration_ms=1_000)
    await world.sleep(100)
    world.enforcer.down = True
    await world.sleep(1_000)
    assert world.reasons() == {EndReason.EXPIRED: 1}
    world.check_pools()
    [problem] = world.verdict().problems  # and the log tells that there are no counts
    assert problem.rule == "closing-counts"


@scenario()
async def test_nothing_grows_with_what_is_over(world: World) -> None:
    for _ in range(6):
        for act in ("expire", "release"):
            grant = await world.page(duration_ms=1_000)
            await world.sleep(990)  # counted already
            if act == "release":
                await world.release(grant)
            await world.sleep(700_000)
    committer, ledger = world.controller.committer, world.ledger
    assert not committer._sampled
    assert not committer._carried
    assert not ledger._leases
    assert not ledger._sessions
    assert not ledger._ended
    assert not world.keeper._tasks
    assert not world.controller.locks._queues
    assert len(ledger.deadlines._heap) < 10
