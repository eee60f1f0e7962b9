"""Who is told what: a session's sink, in order and once; and everybody who follows the stream."""

import asyncio
import json
from typing import Any

import pytest
from fakes import World, all_of, lease_id, opens, scenario, session_id, until

from controlplane.answers import Grant
from controlplane.event_stream import Filter
from controlplane.granting import SinkRequest
from controlplane.policy import Policy
from controlplane.store import Notice, StoreError
from controlplane.telling import replayed

SINK = SinkRequest(uri="https://app.example/notices", credential='{"secret": 1}')
ROOMY = """
qos_profiles: [{name: QOS_E}]
services: [{aisi: chat, task: text-generation, model: m, address4: 198.18.0.1,
            address6: "fd00:a151::1"}]
anchors:
  - {name: edge1, region: n, trust_tier: 0, slots: 9, cost: 0,
     hosts: [{aisi: chat, service_time_ms: 1}]}
  - {name: edge2, region: n, trust_tier: 0, slots: 9, cost: 9,
     hosts: [{aisi: chat, service_time_ms: 1}]}
"""


def notices(world: World) -> list[Notice]:
    assert world.folder is None
    return world._memory.notices


def told(world: World, grant: Grant | None = None) -> list[tuple[str, str | None]]:
    """What a session's sink is told, in order: what, and why."""
    found = []
    for notice in notices(world):
        event = json.loads(notice.body)
        if grant is None or notice.session_id == session_id(grant):
            data = event["data"]
            why = data.get("reason") or data.get("statusInfo") or data.get("qosStatus")
            found.append((event["type"].rpartition(".")[2], why))
    return found


def test_a_sink_is_told_of_a_sessions_life() -> None:
    async def run() -> None:
        grant = await world.page(sink=SINK, duration_ms=10_000)
        await world.page("ue2")  # has no sink
        await world.relocate(grant)
        await world.sleep(200)  # the drain is over; that is nobody's business
        await world.extend(grant, 1_000)
        await world.sleep(11_000)
        assert told(world) == [
            ("committed", "PAGE"),
            ("qos-status-changed", "AVAILABLE"),
            ("relocated", "REQUEST"),
            ("extended", None),
            ("ended", "EXPIRED"),
            ("qos-status-changed", "DURATION_EXPIRED"),
        ]
        assert [notice.is_last for notice in notices(world)] == [False] * 5 + [True]
        entries = [json.loads(line) for line in world.lines()]
        for notice in notices(world):
            event = json.loads(notice.body)
            index = int(event["id"].partition("-")[0])
            assert entries[index]["lease_id"]  # each tells of an entry
            if "leaseId" in event["data"]:
                assert event["data"]["leaseId"] == entries[index]["lease_id"]

    with World() as world:
        world.run(run())


def test_a_client_of_qos_alone_is_told_in_camaras_words_only() -> None:
    async def run() -> None:
        grant = await world.qos(sink=SINK)
        await world.release(grant)
        assert told(world) == [
            ("qos-status-changed", "AVAILABLE"),
            ("qos-status-changed", "DELETE_REQUESTED"),
        ]

    with World() as world:
        world.run(run())


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        ("failure", [("recovered", "FAILURE")]),
        ("policy", [("ended", "POLICY"), ("qos-status-changed", "NETWORK_TERMINATED")]),
        ("kernel", [("ended", "NOT_ENFORCED"), ("qos-status-changed", "NETWORK_TERMINATED")]),
    ],
)
def test_a_sink_is_told_what_the_network_did_and_why(
    event: str, expected: list[tuple[str, str]]
) -> None:
    async def run() -> None:
        grant = await world.page(sink=SINK)
        if event == "failure":
            await world.heartbeat("edge1")
            await world.sleep(400)
        elif event == "policy":
            await world.keeper.set_policy("default", Policy(tasks=()))
            await world.sleep(10)
        else:
            world.enforcer.refuse = opens
            await all_of(world.extend(grant, 1_000))
            expected.insert(0, ("extended", ""))
            assert [name for name, _ in told(world)[2:]] == [name for name, _ in expected]
            return
        assert told(world)[2:] == expected

    with World() as world:
        world.run(run())


def test_an_end_is_told_whatever_else_is_in_its_write() -> None:
    """Another session's COMMIT, prepared earlier, is no new anchor of this one."""

    async def run() -> None:
        ends = await world.page("ue1", sink=SINK)
        world.gateway.gate.shut = True
        paging = asyncio.create_task(world.page("ue2"))  # in two phases
        await until(lambda: world.gateway.gate.waiting)
        world.store.gate.shut = True
        blocker = asyncio.create_task(world.qos("ue3", "QOS_E"))
        await until(lambda: world.store.gate.waiting)
        world.gateway.gate.open()
        releasing = asyncio.create_task(world.release(ends))
        await until(lambda: len(world.controller.committer._waiting) == 2)
        world.store.gate.open()
        await asyncio.gather(paging, blocker, releasing)
        together = [types for types in world.store.writes if {"Committed", "Ended"} <= set(types)]
        assert together, world.store.writes
        assert told(world, ends)[-2:] == [
            ("ended", "RELEASED"),
            ("qos-status-changed", "DELETE_REQUESTED"),
        ]

    with World(catalogue_text=ROOMY) as world:
        world.run(run())


def test_what_could_not_be_written_is_told_when_it_is() -> None:
    async def run() -> None:
        grant = await world.page(sink=SINK)
        world.store.full = True
        [error] = await all_of(world.release(grant))
        assert isinstance(error, StoreError)
        assert len(told(world)) == 2
        world.store.full = False
        await world.release(grant)
        assert told(world)[2:] == [
            ("ended", "RELEASED"),
            ("qos-status-changed", "DELETE_REQUESTED"),
        ]

    with World() as world:
        world.run(run())


def test_a_sink_is_known_after_a_restart() -> None:
    async def run() -> None:
        grant = await world.page(sink=SINK)
        await world.restart()
        await world.release(grant)
        assert [name for name, _ in told(world)[2:]] == ["ended", "qos-status-changed"]

    with World() as world:
        world.run(run())


def test_sessions_whose_last_word_is_told_are_forgotten() -> None:
    async def run() -> None:
        teller = world.controller.committer._tell.__self__  # type: ignore[attr-defined]
        for _ in range(3):
            grant = await world.page(sink=SINK)
            await world.release(grant)
        world.store.full = True
        await all_of(world.page(sink=SINK))
        world.store.full = False
        await world.page("ue2")
        assert not teller._with_sink

    with World() as world:
        world.run(run())


# The stream


async def read(world: World, wanted: Filter, after: int | None = None) -> list[tuple[Any, ...]]:
    found = []
    async for message in world.plane.stream.subscribe(wanted, after):
        assert message.raw_data is not None
        found.append((int(message.id or -1), message.event, json.loads(message.raw_data)))
    return found


@scenario(catalogue_text=ROOMY, tenants={"clinic": Policy()})
async def test_the_stream_tells_everything_live_as_it_does_from_the_log(world: World) -> None:
    live = asyncio.create_task(read(world, Filter()))
    await asyncio.sleep(0)
    first = world.plane.log.size
    grant = await world.page(tenant="clinic")
    await world.relocate(grant)
    await world.keeper.moved("ue1", "gnb2")
    await world.keeper.set_policy("clinic", Policy())
    await world.drain("edge2")
    await world.sleep(200)
    await world.release(grant)
    again = [
        (event.event_id, event.kind, event.data)
        for event in replayed(world.plane.log, world.ledger, first - 1)
    ]
    world.plane.stream.close()
    seen = await live

    def but_for_when(events: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        return [(i, k, {n: v for n, v in d.items() if n != "at"}) for i, k, d in events]

    assert but_for_when(seen) == but_for_when(again)
    assert [index for index, *_ in seen] == list(range(first, world.plane.log.size))
    kinds = [kind for _, kind, _ in seen if kind != "Acknowledged"]
    assert kinds[:6] == [
        *("Prepared", "Committed", "Prepared", "Committed", "DrainStarted", "UeMoved"),
    ]
    assert {"PolicySet", "AnchorDraining", "Ended"} <= set(kinds)
    ended = [data for _, kind, data in seen if kind == "Ended"]
    assert all(data["sessionId"] == session_id(grant) for data in ended)
    assert ended[-1]["reason"] == "RELEASED"
    assert ended[-1]["downlinkPackets"] >= 200


@scenario(tenants={"clinic": Policy()})
async def test_a_tenant_sees_its_own_events_only(world: World) -> None:
    mine = asyncio.create_task(read(world, Filter(tenant="clinic")))
    hers = asyncio.create_task(read(world, Filter(ue="ue2")))
    await asyncio.sleep(0)
    grant = await world.page("ue1", tenant="clinic")
    other = await world.page("ue2")
    await world.keeper.moved("ue2", "gnb2")
    await world.release(grant)
    await world.release(other)
    world.plane.stream.close()
    assert {data.get("leaseId") for *_, data in await mine} == {lease_id(grant)}
    assert {data.get("ue") for *_, data in await hers} == {"ue2"}
