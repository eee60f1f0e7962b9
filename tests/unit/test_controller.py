"""Transactions: what is promised, journalled, enforced and answered, and in which order."""

import asyncio
import contextlib
import errno
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jwt
import pytest
from fakes import DRAIN_MS, KEY, PREPARE_MS, UES, FakeEnforcer, World

from controlplane import aist
from controlplane.clock import NS_PER_MS, parse_rfc3339
from controlplane.controller import Grant, Refusal, Settings
from controlplane.enforcement import EnforcementError, Install, Move, Operation, Renew
from controlplane.evidence import JournalError
from controlplane.intent import Intent
from controlplane.lease import EndReason, State

TASK = "text-generation"
ROOM_FOR_ONE = """
qos_profiles: [{name: QOS_E}]
services: [{aisi: chat, task: text-generation, model: m, address4: 198.18.0.1,
            address6: "fd00:a151::1"}]
anchors:
  - {name: edge1, region: n, trust_tier: 0, slots: 4, cost: 0,
     hosts: [{aisi: chat, service_time_ms: 1}]}
  - {name: edge2, region: n, trust_tier: 0, slots: 1, cost: 9,
     hosts: [{aisi: chat, service_time_ms: 1}]}
"""


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.close()


def intent(task: str = TASK, duration_ms: int = 60_000, **members: Any) -> Intent:
    return Intent.model_validate({"task": task, "durationMs": duration_ms, **members})


def page(world: World, ue: str = "ue1", **members: Any) -> Grant:
    return asyncio.run(world.controller.page(ue, intent(**members)))


def relocate(world: World, grant: Grant, target: str | None = None, **options: Any) -> Grant:
    session_id = grant.lease.terms.session_id
    return asyncio.run(world.controller.relocate(session_id, target, **options))


def refused(call: Callable[[], Any]) -> Refusal:
    with pytest.raises(Refusal) as caught:
        call()
    return caught.value


def why(refusal: Refusal) -> dict[str, str]:
    return {exclusion.anchor: exclusion.constraint for exclusion in refusal.excluded}


def opens(operations: Sequence[Operation]) -> bool:
    return any(isinstance(operation, Install | Move | Renew) for operation in operations)


@contextlib.contextmanager
def broken_disk(at_write: int = 1) -> Iterator[None]:
    """From the nth write on, the disk is full."""
    writes, write = 0, os.write

    def failing(file: int, data: bytes) -> int:
        nonlocal writes
        writes += 1
        if writes >= at_write:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data)

    with patch("os.write", failing):
        yield


# Paging


def test_a_page_is_answered_with_a_lease_that_is_enforced(world: World) -> None:
    grant = page(world)
    terms = grant.lease.terms
    assert (terms.ue, terms.aisi, terms.anchor, terms.epoch) == ("ue1", "chat", "edge1", 1)
    assert grant.lease.state is State.COMMITTED
    expires_ns = world.clock.now + 60_000 * NS_PER_MS
    assert world.enforcer.steering() == {terms.lease_id: expires_ns}
    assert world.enforcer.anchors() == {
        "10.45.0.1>198.18.0.1": "edge1",
        "fd00:45::1>fd00:a151::1": "edge1",
    }
    assert [candidate.anchor.name for candidate in grant.resolution.candidates] == [
        "edge1",
        "edge2",
        "cloud",
    ]
    claims: dict[str, Any] = jwt.decode(
        grant.token,
        KEY.public_key(),
        algorithms=["EdDSA"],
        audience="chat",
        options={"verify_exp": False, "verify_nbf": False, "require": aist.REQUIRED_CLAIMS},
    )
    assert (claims["sub"], claims["scope"]) == ("ue1", TASK)
    assert claims["addresses"] == ["10.45.0.1", "fd00:45::1"]
    assert (claims["lease"], claims["epoch"]) == (terms.lease_id, 1)
    assert 0 <= world.clock.to_unix_ns(expires_ns) - claims["exp"] * 10**9 < 10**9


def test_evidence_is_durable_before_the_kernel_and_the_kernel_before_the_answer(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fdatasync

    def spied(file: int) -> None:
        sync(file)
        world.trace.append("sync")

    def on_disk(operations: Sequence[Operation]) -> None:
        last = world.entries()[-1]
        assert isinstance(operations[0], Install)
        assert (last["type"], last["lease_id"]) == ("Committed", operations[0].binding.lease_id)

    monkeypatch.setattr(os, "fdatasync", spied)
    world.enforcer.before = on_disk
    world.trace.clear()

    async def call() -> None:
        await world.controller.page("ue1", intent())
        world.trace.append("answer")

    asyncio.run(call())
    assert world.trace == [
        *("sync", "journal Prepared", "ask edge1"),
        *("sync", "journal Committed", "Install", "answer"),
    ]


def test_each_step_is_timed_when_it_was_done(world: World) -> None:
    started = world.clock.to_unix_ns(world.clock.now)
    world.gateway.meanwhile = lambda: world.clock.advance(7)
    world.enforcer.before = lambda operations: world.clock.advance(5)
    line = page(world).timeline
    assert line.requested_unix_ns == line.prepared_unix_ns == started
    assert line.committed_unix_ns == started + 7 * NS_PER_MS
    assert line.enforced_unix_ns == started + 12 * NS_PER_MS


@pytest.mark.parametrize(
    ("ue", "members", "cause"),
    [
        ("stranger", {}, "UE_UNKNOWN"),
        ("ue1", {"task": "image-segmentation"}, "TASK_UNKNOWN"),
        ("ue1", {"qosProfile": "GOLD"}, "QOS_PROFILE_UNKNOWN"),
    ],
)
def test_what_does_not_exist_is_named(
    world: World, ue: str, members: dict[str, Any], cause: str
) -> None:
    assert refused(lambda: page(world, ue, **members)).cause == cause
    assert not world.entries()


def test_a_refusal_names_what_excluded_each_candidate(world: World) -> None:
    world.gateway.unready = {"edge1"}
    page(world, "ue2")
    page(world, "ue3")  # edge2 is full
    refusal = refused(lambda: page(world, minTrustTier=2))
    assert refusal.cause == "NO_CANDIDATE"
    assert why(refusal) == {"edge1": "readiness", "edge2": "capacity", "cloud": "trustTier"}
    assert world.slots() == {"edge2": 2}  # what was reserved at edge1 is free again
    assert not world.ledger.session_of("ue1", "chat")


def test_an_anchor_that_is_not_ready_makes_way_for_the_next(world: World) -> None:
    world.gateway.unready = {"edge1"}
    grant = page(world)
    assert grant.lease.terms.anchor == "edge2"
    assert [(e.anchor, e.constraint) for e in grant.resolution.excluded] == [("edge1", "readiness")]
    assert world.states() == {"edge1@1": EndReason.ABORTED, "edge2@2": State.COMMITTED}
    assert world.slots() == {"edge2": 1}
    assert len(world.enforcer.applied) == 1


def test_an_answer_that_comes_too_late_is_no_answer(world: World) -> None:
    world.gateway.meanwhile = lambda: world.clock.advance(PREPARE_MS)
    assert refused(lambda: page(world)).cause == "PREPARE_TIMED_OUT"
    assert not world.slots()
    assert not world.enforcer.applied


def test_a_page_that_is_abandoned_frees_its_slot_in_time(world: World) -> None:
    async def call() -> None:
        world.gateway.meanwhile = asyncio.Event().wait  # for ever
        paging = asyncio.create_task(world.controller.page("ue1", intent()))
        while not world.gateway.asked:
            await asyncio.sleep(0)
        paging.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await paging

    asyncio.run(call())
    world.clock.advance(PREPARE_MS)
    world.controller.tick()
    assert not world.slots()


def test_one_session_for_each_ue_and_service(world: World) -> None:
    grant = page(world)
    assert refused(lambda: page(world)).cause == "SESSION_EXISTS"
    relocate(world, grant)
    world.clock.advance(DRAIN_MS)
    world.controller.tick()  # one of its leases is over, the session is not
    assert refused(lambda: page(world)).cause == "SESSION_EXISTS"
    page(world, task="automatic-speech-recognition")  # another service
    page(world, "ue2")  # another UE


def all_at_once(world: World, ues: Sequence[str]) -> list[Grant | Refusal]:
    async def call() -> list[Any]:
        pages = [world.controller.page(ue, intent()) for ue in ues]
        return await asyncio.gather(*pages, return_exceptions=True)

    outcomes = asyncio.run(call())
    assert all(isinstance(outcome, Grant | Refusal) for outcome in outcomes), outcomes
    return outcomes


def test_the_same_page_twice_at_once_is_one_session(world: World) -> None:
    outcomes = all_at_once(world, ["ue1", "ue1"])
    assert sum(isinstance(outcome, Grant) for outcome in outcomes) == 1
    assert sum(world.slots().values()) == 1


@pytest.mark.parametrize("unready", [set(), {"edge1"}], ids=["all ready", "first choice is not"])
def test_concurrent_pages_never_take_more_than_there_is(tmp_path: Path, unready: set[str]) -> None:
    """Also where all fall through to the same second choice after they were resolved."""
    world = World(tmp_path, catalogue_text=ROOM_FOR_ONE.replace("slots: 4", "slots: 2"))
    slots = {anchor.name: anchor.slots for anchor in world.catalogue.anchors}
    most: Counter[str] = Counter()

    def look() -> None:
        for anchor, used in world.slots().items():
            most[anchor] = max(most[anchor], used)

    world.gateway.unready = unready
    world.gateway.meanwhile = look
    outcomes = all_at_once(world, UES)
    assert all(used <= slots[anchor] for anchor, used in most.items()), most
    granted = Counter(o.lease.terms.anchor for o in outcomes if isinstance(o, Grant))
    assert granted == world.slots() == ({"edge2": 1} if unready else {"edge1": 2, "edge2": 1})
    losers = [why(o)["edge2"] for o in outcomes if isinstance(o, Refusal)]
    assert losers == ["capacity"] * len(losers)
    world.close()


# Relocation


def test_make_before_break(world: World) -> None:
    before = page(world)
    world.clock.advance(10_000)
    world.trace.clear()
    after = relocate(world, before)
    old, new = before.lease, after.lease
    # One write and one batch, and only after the target said that it is ready.
    assert world.trace == [
        "journal Prepared",
        "ask edge2",
        "journal Committed+DrainStarted",
        "Move",
    ]
    assert world.enforcer.applied[-1] == (
        Move(new.binding(), old.binding(), world.clock.now + DRAIN_MS * NS_PER_MS),
    )
    assert (new.terms.anchor, new.terms.epoch) == ("edge2", 2)
    assert new.terms.session_id == old.terms.session_id
    assert new.deadline_ns == old.deadline_ns  # no more time than was asked for
    claims = jwt.decode(after.token, options={"verify_signature": False})
    assert (claims["lease"], claims["epoch"]) == (new.terms.lease_id, 2)
    assert world.slots() == {"edge1": 1, "edge2": 1}

    world.clock.advance(DRAIN_MS)
    assert world.controller.tick() == new.deadline_ns
    assert world.states() == {"edge1@1": EndReason.RELOCATED, "edge2@2": State.COMMITTED}
    assert world.slots() == {"edge2": 1}
    assert world.enforcer.steering() == {new.terms.lease_id: new.deadline_ns}


def test_a_drain_ends_with_the_lease_at_the_latest(world: World) -> None:
    before = page(world, duration_ms=1_000)
    world.clock.advance(1_000 - DRAIN_MS / 2)
    relocate(world, before)
    assert world.enforcer.drains() == {before.lease.terms.lease_id: before.lease.deadline_ns}


def test_the_first_intents_constraints_hold_for_every_move(world: World) -> None:
    grant = page(world, minTrustTier=3)
    refusal = refused(lambda: relocate(world, grant, "cloud"))
    assert (refusal.cause, why(refusal)) == ("NO_CANDIDATE", {"cloud": "trustTier"})
    world.gateway.unready = {"edge2"}
    assert refused(lambda: relocate(world, grant)).cause == "ANCHOR_NOT_READY"


@pytest.mark.parametrize(
    ("target", "cause"),
    [("edge1", "ALREADY_THERE"), ("nowhere", "NO_CANDIDATE"), ("edge2", "ANCHOR_NOT_READY")],
)
def test_a_target_that_cannot_be_changes_nothing(world: World, target: str, cause: str) -> None:
    world.gateway.unready = {"edge2"}
    grant = page(world)
    assert refused(lambda: relocate(world, grant, target)).cause == cause
    assert world.enforcer.steering() == {grant.lease.terms.lease_id: grant.lease.deadline_ns}
    assert len(world.enforcer.applied) == 1
    assert world.slots() == {"edge1": 1}
    world.gateway.unready = set()
    assert relocate(world, grant).lease.terms.anchor == "edge2"  # and it may be tried again


@pytest.mark.parametrize("way", ["released", "expired", "expired, not yet noticed", "too slow"])
def test_a_session_that_ends_while_its_target_gets_ready(world: World, way: str) -> None:
    grant = page(world, duration_ms=1_000)

    def meanwhile() -> None:
        if way == "released":
            world.controller.release(grant.lease.terms.session_id)
        elif way == "too slow":
            world.controller.renew(grant.lease.terms.session_id, 60_000)
            world.clock.advance(PREPARE_MS)
        else:
            world.clock.advance(1_000)
            if way == "expired":
                world.controller.tick()

    world.gateway.meanwhile = meanwhile
    cause = refused(lambda: relocate(world, grant)).cause
    world.controller.tick()
    assert not any(isinstance(batch[0], Move) for batch in world.enforcer.applied)
    if way == "too slow":  # nothing has changed
        assert cause == "PREPARE_TIMED_OUT"
        assert world.slots() == {"edge1": 1}
        assert list(world.enforcer.steering()) == [grant.lease.terms.lease_id]
    else:
        assert cause == "SESSION_ENDED"
        assert not world.slots()
        assert not world.enforcer.steering()


def test_a_renewal_while_the_target_gets_ready_is_kept(world: World) -> None:
    grant = page(world, duration_ms=1_000)
    session_id = grant.lease.terms.session_id
    world.gateway.meanwhile = lambda: world.controller.renew(session_id, 9_000) and None
    moved = relocate(world, grant)
    assert moved.lease.deadline_ns == world.clock.now + 9_000 * NS_PER_MS


def test_one_relocation_at_a_time(world: World) -> None:
    grant = page(world)
    session_id = grant.lease.terms.session_id

    async def call() -> list[Any]:
        moves = [world.controller.relocate(session_id, None) for _ in range(2)]
        return await asyncio.gather(*moves, return_exceptions=True)

    first, second = asyncio.run(call())
    assert isinstance(first, Grant)
    assert isinstance(second, Refusal)
    assert second.cause == "BUSY"
    assert refused(lambda: relocate(world, grant, "edge2")).cause == "ALREADY_THERE"


def test_there_and_back_again(world: World) -> None:
    grant = page(world)
    for epoch, anchor in [(2, "edge2"), (3, "edge1"), (4, "edge2")]:
        moved = relocate(world, grant, anchor)
        assert (moved.lease.terms.epoch, moved.lease.terms.anchor) == (epoch, anchor)
        world.clock.advance(DRAIN_MS)
        world.controller.tick()
    assert world.slots() == {"edge2": 1}


def test_breaking_before_making_is_for_experiments(world: World) -> None:
    grant = page(world)
    refusal = refused(lambda: relocate(world, grant, break_before_make=True))
    assert refusal.cause == "NOT_ALLOWED"
    assert len(world.enforcer.applied) == 1


def test_breaking_before_making_really_breaks_first(tmp_path: Path) -> None:
    world = World(tmp_path, settings=Settings(allow_break_before_make=True))
    grant = page(world)
    steered: list[dict[str, int]] = []
    world.gateway.meanwhile = lambda: steered.append(world.enforcer.steering())
    world.trace.clear()
    moved = relocate(world, grant, break_before_make=True)
    assert steered == [{}]
    assert world.trace == [
        *("journal Ended", "Revoke", "journal Prepared", "ask edge2"),
        *("journal Committed", "Install"),
    ]
    assert (moved.lease.terms.epoch, moved.lease.deadline_ns) == (2, grant.lease.deadline_ns)
    world.close()


# Renewal, release, expiry


def test_renewal_extends_and_never_shortens(world: World) -> None:
    grant = page(world, duration_ms=10_000)
    session_id, lease_id = grant.lease.terms.session_id, grant.lease.terms.lease_id
    assert refused(lambda: world.controller.renew(session_id, 9_999)).cause == "NOT_RENEWED"
    assert world.enforcer.steering() == {lease_id: grant.lease.deadline_ns}
    world.clock.advance(4_000)
    world.trace.clear()
    world.controller.renew(session_id, 10_000)
    assert world.trace == ["journal Renewed", "Renew"]
    assert world.enforcer.steering() == {lease_id: world.clock.now + 10_000 * NS_PER_MS}
    world.clock.advance(10_000)  # the instant of its deadline
    assert refused(lambda: world.controller.renew(session_id, 10_000)).cause == "SESSION_ENDED"


def test_release_closes_everything_the_session_opened(world: World) -> None:
    grant = page(world)
    relocate(world, grant)
    world.trace.clear()
    world.controller.release(grant.lease.terms.session_id)
    assert world.trace == ["journal Ended+Ended", "EndDrain+Revoke"]
    assert not world.enforcer.steering()
    assert not world.enforcer.drains()
    assert not world.slots()
    again = refused(lambda: world.controller.release(grant.lease.terms.session_id))
    assert again.cause == "SESSION_ENDED"
    assert refused(lambda: world.controller.release("none")).cause == "SESSION_UNKNOWN"
    assert page(world).lease.terms.epoch == 3


def test_tick_ends_what_is_overdue_and_says_what_is_next(world: World) -> None:
    assert world.controller.tick() is None
    short, long = page(world, duration_ms=1_000), page(world, "ue2", duration_ms=2_000)
    world.clock.advance(999.999999)
    assert world.controller.tick() == short.lease.deadline_ns
    assert len(world.entries()) == 4
    world.clock.advance(0.000001)
    assert world.controller.tick() == long.lease.deadline_ns
    assert world.ledger.lease(short.lease.terms.lease_id).end_reason is EndReason.EXPIRED
    assert world.slots() == {long.lease.terms.anchor: 1}
    world.clock.advance(5_000)
    assert world.controller.tick() is None


# Failures


@pytest.mark.parametrize("moving", ["page", "relocate", "renew"])
def test_if_the_kernel_refuses_nobody_holds_a_lease(world: World, moving: str) -> None:
    world.enforcer.refuse = opens
    if moving == "page":
        cause = refused(lambda: page(world)).cause
    else:
        world.enforcer.refuse = lambda operations: False
        grant = page(world)
        world.enforcer.refuse = opens
        session_id = grant.lease.terms.session_id
        if moving == "relocate":
            cause = refused(lambda: relocate(world, grant)).cause
        else:
            cause = refused(lambda: world.controller.renew(session_id, 90_000)).cause
    assert cause == "ENFORCEMENT_FAILED"
    assert not world.slots()
    assert not world.enforcer.steering()
    assert not world.enforcer.drains()
    assert set(world.states().values()) == {EndReason.NOT_ENFORCED}
    world.enforcer.refuse = lambda operations: False
    page(world)  # and the UE may ask again


def test_if_the_kernel_refuses_even_to_close_nobody_holds_a_lease(world: World) -> None:
    """Its own timeouts close it then."""
    grant = page(world, duration_ms=5_000)
    world.enforcer.refuse = lambda operations: True
    assert refused(lambda: relocate(world, grant)).cause == "ENFORCEMENT_FAILED"
    assert not world.slots()
    world.clock.advance(5_000)
    assert not world.enforcer.steering()


def test_what_the_kernel_refused_to_close_is_closed_at_the_next_tick(world: World) -> None:
    grant = page(world)
    world.enforcer.refuse = lambda operations: True
    with pytest.raises(EnforcementError):
        world.controller.release(grant.lease.terms.session_id)
    assert world.enforcer.steering()  # it does steer on, without a lease
    world.enforcer.refuse = lambda operations: False
    world.controller.tick()
    assert not world.enforcer.steering()


@pytest.mark.parametrize("at_write", [1, 2])
def test_what_is_not_durable_is_not_enforced(world: World, at_write: int) -> None:
    with broken_disk(at_write), pytest.raises(JournalError, match="No space left"):
        page(world)
    assert not world.enforcer.applied
    world.clock.advance(PREPARE_MS)
    world.controller.tick()
    assert not world.slots()
    page(world)


def test_a_full_disk_changes_nothing_for_who_has_a_lease(world: World) -> None:
    grant = page(world)
    session_id = grant.lease.terms.session_id
    calls: list[Callable[[], Any]] = [
        lambda: relocate(world, grant),
        lambda: world.controller.renew(session_id, 90_000),
        lambda: world.controller.release(session_id),
    ]
    for call in calls:
        with broken_disk(), pytest.raises(JournalError):
            call()
    with broken_disk(2), pytest.raises(JournalError):
        relocate(world, grant)
    assert world.enforcer.steering() == {grant.lease.terms.lease_id: grant.lease.deadline_ns}
    assert len(world.enforcer.applied) == 1
    world.clock.advance(PREPARE_MS)
    world.controller.tick()
    assert world.slots() == {"edge1": 1}
    assert relocate(world, grant).lease.terms.anchor == "edge2"


# Recovery


def history(folder: Path) -> World:
    """A journal with everything in it that can happen."""
    world = World(folder)
    first = page(world, duration_ms=5_000)
    world.clock.advance(10)
    second = page(world, "ue2", task="automatic-speech-recognition", duration_ms=900)
    relocate(world, first)
    world.clock.advance(DRAIN_MS)
    world.controller.tick()
    world.controller.renew(first.lease.terms.session_id, 8_000)
    world.gateway.unready = {"edge1"}
    refused(lambda: relocate(world, first, "edge1"))
    world.clock.advance(850)
    world.controller.tick()  # the second is over
    assert world.ledger.lease(second.lease.terms.lease_id).end_reason is EndReason.EXPIRED
    relocate(world, first, "cloud")
    world.controller.release(first.lease.terms.session_id)
    world.gateway.unready = set()
    page(world, "ue3")
    world.enforcer.refuse = opens
    refused(lambda: page(world, "ue4"))
    world.close()
    return world


def authorised(entries: list[dict[str, Any]], unix_ns: int) -> dict[str, int]:
    """Lease -> expiry, by an independent reading of a journal: what may be enforced."""
    until: dict[str, int] = {}
    session: dict[str, str] = {}
    for entry in entries:
        if entry["type"] == "Prepared":
            session[entry["terms"]["lease_id"]] = entry["terms"]["session_id"]
        elif entry["type"] in ("Committed", "Renewed"):
            until[entry["lease_id"]] = parse_rfc3339(entry["until"])
        else:  # DrainStarted, Ended
            until.pop(entry["lease_id"], None)
    held: dict[str, int] = {}
    for lease_id, expires in until.items():
        # A relocation that did not get to its end never happened: the older lease stands.
        older = any(session[other] == session[lease_id] for other in held)
        if expires > unix_ns and not older:
            held[lease_id] = expires
    return held


def test_recovery_from_a_crash_at_any_point_of_the_journal(tmp_path: Path) -> None:
    whole = history(tmp_path).path.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert {json.loads(line)["type"] for line in lines} == {
        *("Prepared", "Committed", "Renewed", "DrainStarted", "Ended")
    }
    start = 0
    cuts = [0]
    for line in lines:
        cuts += [start + 1, start + len(line) // 2, start + len(line) - 1, start + len(line)]
        start += len(line)
    folder = tmp_path / "copy"
    folder.mkdir()
    seen_live = seen_over = 0
    for cut in cuts:
        kept = whole[:cut].splitlines(keepends=True)
        durable = [json.loads(line) for line in kept if line.endswith(b"\n")]
        for later_ms in (0, 6_000):
            (folder / "journal").write_bytes(whole[:cut])
            after = World(folder, start=False)
            if durable:
                at = parse_rfc3339(durable[-1]["at"])
                after.clock.now = after.clock.from_unix_ns(at)
            after.clock.advance(later_ms)
            after.start()
            expected = authorised(durable, after.clock.to_unix_ns(after.clock.now))
            seen_live += bool(expected)
            seen_over += bool(not expected and authorised(durable, 0))
            found = after.enforcer.steering()
            unix = {lease: after.clock.to_unix_ns(until) for lease, until in found.items()}
            assert unix == expected, f"after {len(durable)} entries"
            live = list(after.ledger.live())
            assert not [held for held in live if held.state is State.PREPARED]
            assert all(held.deadline_ns > after.clock.now for held in live)
            assert after.slots() == Counter(held.terms.anchor for held in live)
            check_epochs(after)
            # And it goes on: with a page that is granted above every epoch of before.
            for held in live:
                with contextlib.suppress(Refusal):
                    after.controller.release(held.terms.session_id)
            assert not after.slots()
            page(after)
            check_epochs(after)
            after.close()
    assert seen_live > 20
    assert seen_over > 5


def check_epochs(world: World) -> None:
    latest: dict[tuple[str, str], int] = {}
    for entry in world.entries():
        if entry["type"] == "Prepared":
            terms = entry["terms"]
            pair = (terms["ue"], terms["aisi"])
            assert terms["epoch"] > latest.get(pair, 0), f"the epoch of {pair} did not grow"
            latest[pair] = terms["epoch"]


def test_a_crash_within_the_write_of_a_flip_changes_nothing_for_the_ue(world: World) -> None:
    """The new COMMIT made it to disk, the old lease's drain did not; the kernel saw neither."""
    grant = page(world)
    relocate(world, grant)
    world.close()
    lines = world.path.read_bytes().splitlines(keepends=True)
    assert [json.loads(line)["type"] for line in lines[-2:]] == ["Committed", "DrainStarted"]
    world.path.write_bytes(b"".join(lines[:-1]) + lines[-1][:40])
    world.enforcer = FakeEnforcer(world.clock, world.trace)  # a kernel that was never told
    world.start()
    assert world.enforcer.steering() == {grant.lease.terms.lease_id: grant.lease.deadline_ns}
    assert world.slots() == {"edge1": 1}
    world.controller.release(grant.lease.terms.session_id)
    assert not world.slots()
