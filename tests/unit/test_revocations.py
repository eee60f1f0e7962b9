"""Revocations: what an anchor must refuse reaches it with its next heartbeat, and only once."""

from typing import Any

from fake_time import FakeClock
from fakes import DRAIN_MS, World, all_of, opens, scenario
from histories import terms
from hypothesis import given
from hypothesis import strategies as st

from controlplane.answers import Grant
from controlplane.clock import NS_PER_MS, NS_PER_S
from controlplane.lease import Committed, Ended, EndReason, Lease, State
from controlplane.revocations import MAX_AT_ONCE, Revocations


def since(world: World, anchor: str, cursor: str | None = None) -> list[dict[str, Any]]:
    return world.plane.revocations.since(cursor, anchor)[0]


def floor(world: World, grant: Grant, epoch: int, **more: Any) -> dict[str, Any]:
    exp = -(-world.clock.to_unix_ns(grant.lease.deadline_ns) // NS_PER_S)
    return {"sub": "ue1", "aud": "chat", "epoch": epoch, "exp": exp, **more}


@scenario()
async def test_a_session_takes_its_tokens_along_until_it_ends(world: World) -> None:
    grant = await world.page()
    there, here = grant.lease.terms.anchor, "edge2"
    assert there == "edge1"
    assert since(world, here) == since(world, there) == []
    _, cursor = world.plane.revocations.since(None, there)
    drained_ns = world.clock.to_unix_ns(world.clock.now) + DRAIN_MS * NS_PER_MS
    await world.relocate(grant, here)
    [left], cursor = world.plane.revocations.since(cursor, there)
    flows = [[str(flow.ue), str(flow.service)] for flow in grant.lease.terms.flows]
    assert left == floor(world, grant, 2, nbf=left["nbf"], flows=flows)
    assert left["nbf"] == drained_ns // NS_PER_MS / 1000  # rounded down: fails closed
    assert since(world, here) == [floor(world, grant, 1)]
    assert since(world, there, cursor) == since(world, "cloud") == []
    await world.sleep(DRAIN_MS + 100)
    assert since(world, there, cursor) == []  # it was told
    await world.relocate(grant, there)
    assert since(world, there, cursor) == [floor(world, grant, 1)]
    await world.release(grant)
    ended = floor(world, grant, 4)
    for anchor in (here, there, "cloud"):
        assert since(world, anchor)[-1] == ended
    again = await world.page()
    await world.relocate(again, here)
    lifted = since(world, here)[-1]
    assert (again.lease.terms.epoch, lifted["epoch"]) == (4, 4)  # tokens before it stay void


@scenario()
async def test_an_anchor_that_has_the_session_again_is_not_told_that_it_left(world: World) -> None:
    grant = await world.page()
    await world.relocate(grant, "edge2")
    await world.relocate(grant, "edge1")
    await world.sleep(DRAIN_MS + 100)
    assert [told["epoch"] for told in since(world, "edge1")] == [2, 1]
    assert [told["epoch"] for told in since(world, "edge2")] == [1, 3]


@scenario()
async def test_a_session_that_was_anchored_anew_keeps_its_tokens_there(world: World) -> None:
    grant = await world.page()
    moved = await world.plane.relocator.recover(grant.lease)
    assert moved.lease.terms.anchor == "edge2"
    assert since(world, "edge1") == [floor(world, grant, 2)]
    assert since(world, "edge2") == [floor(world, grant, 1)]


@scenario()
async def test_what_ends_by_itself_needs_no_revocation(world: World) -> None:
    await world.page(duration_ms=1_000)
    await world.sleep(1_100)
    assert since(world, "edge1") == []


@scenario()
async def test_what_was_never_granted_needs_none_and_what_failed_does(world: World) -> None:
    world.gateway.unready = {"edge1", "edge2", "cloud"}
    await all_of(world.page())
    assert since(world, "edge1") == []
    world.gateway.unready = set()
    grant = await world.page()
    world.enforcer.refuse = opens
    await all_of(world.extend(grant, 30_000))
    [revoked] = since(world, "edge1")
    assert revoked["epoch"] == grant.lease.terms.epoch + 1
    extended_s = world.clock.to_unix_ns(grant.lease.deadline_ns) // NS_PER_S + 30
    assert revoked["exp"] >= extended_s


@scenario()
async def test_a_revocation_lasts_as_long_as_the_token(world: World) -> None:
    grant = await world.page(duration_ms=10_000)
    await world.release(grant)
    await world.sleep(9_900)
    assert len(since(world, "edge1")) == 1
    await world.sleep(2_000)
    assert since(world, "edge1") == []


@scenario()
async def test_a_new_start_still_knows_what_is_revoked(world: World) -> None:
    grant, other = await world.page(), await world.page("ue2")
    await world.relocate(grant)
    await world.release(other)
    before, cursor = world.plane.revocations.since(None, "edge1")
    await world.restart()
    assert since(world, "edge1", cursor) == before


class Ends:
    """A list as long as one likes."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.revocations = Revocations(self.clock, self.leases)  # type: ignore[arg-type]
        self.number = 0

    def leases(self, name: str) -> list[Lease]:
        """One lease, alone in its session; its epoch is its number."""
        described = terms(name, epoch=int(name), anchor="edge1")
        return [Lease(terms=described, state=State.ENDED, deadline_ns=0)]

    def end(self, lasts_s: int) -> None:
        self.number += 1
        name = str(self.number)
        self.revocations.observe(Committed(name, self.clock.now + lasts_s * NS_PER_S))
        self.revocations.observe(Ended(name, EndReason.RELEASED))


def test_many_come_in_several_answers() -> None:
    ends, cursor, found = Ends(), None, list[int]()
    for _ in range(2 * MAX_AT_ONCE + 5):
        ends.end(100)
    for expected in (MAX_AT_ONCE, MAX_AT_ONCE, 5, 0):
        news, cursor = ends.revocations.since(cursor, "edge1")
        assert len(news) == expected
        found += [one["epoch"] - 1 for one in news]
    assert found == list(range(1, 2 * MAX_AT_ONCE + 6))


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("end"), st.integers(1, 5)),
            st.tuples(st.just("wait"), st.integers(0, 2)),
            st.tuples(st.just("ask"), st.integers(0, 2)),
        ),
        max_size=40,
    )
)
def test_each_anchor_learns_of_everything_that_matters_once(
    acts: list[tuple[str, int]],
) -> None:
    ends = Ends()
    cursors: dict[int, str | None] = dict.fromkeys(range(3))
    knows: dict[int, list[str]] = {anchor: [] for anchor in range(3)}
    until: dict[str, int] = {}
    for act, value in acts:
        if act == "end":
            ends.end(value)
            until[str(ends.number)] = ends.clock.now + value * NS_PER_S
        elif act == "wait":
            ends.clock.advance(value * 1_000)
        else:
            news, cursors[value] = ends.revocations.since(cursors[value], "edge1")
            knows[value] += [str(one["epoch"] - 1) for one in news]
            assert len(knows[value]) == len(set(knows[value]))
            missing = until.keys() - set(knows[value])
            assert all(until[name] <= ends.clock.now for name in missing)


@given(st.text(max_size=64))
def test_any_cursor_is_one(cursor: str) -> None:
    ends = Ends()
    ends.end(100)
    for text in (cursor, f"{ends.revocations._instance}:{cursor}"):
        news, following = ends.revocations.since(text, "edge1")
        assert len(news) <= 1
        assert ends.revocations.since(following, "edge1")[0] == []
