"""Revocations: what an anchor must refuse reaches it with its next heartbeat, and only once."""

from typing import Any

from fake_time import FakeClock
from fakes import World, all_of, lease_id, opens, scenario
from hypothesis import given
from hypothesis import strategies as st

from controlplane.clock import NS_PER_S
from controlplane.lease import Committed, Ended, EndReason, Lease
from controlplane.revocations import MAX_AT_ONCE, Revocations


def since(world: World, cursor: str | None = None) -> list[dict[str, Any]]:
    return world.plane.revocations.since(cursor)[0]


@scenario()
async def test_a_move_revokes_the_old_epoch_and_an_end_the_lease(world: World) -> None:
    grant = await world.page()
    assert since(world) == []
    _, cursor = world.plane.revocations.since(None)
    moved = await world.relocate(grant)
    exp = -(-world.clock.to_unix_ns(grant.lease.deadline_ns) // NS_PER_S)
    superseded = {"sub": "ue1", "aud": "chat", "epoch": 2, "exp": exp}
    news, cursor = world.plane.revocations.since(cursor)
    assert news == [superseded]
    assert since(world, cursor) == []
    await world.release(grant)
    ended = [{"lease": lease_id(grant), "exp": exp}, {"lease": lease_id(moved), "exp": exp}]
    assert since(world, cursor) == ended
    assert since(world) == [superseded, *ended]
    assert since(world, "00000000:2") == [superseded, *ended]  # of another process


@scenario()
async def test_what_ends_by_itself_needs_no_revocation(world: World) -> None:
    await world.page(duration_ms=1_000)
    await world.sleep(1_100)
    assert since(world) == []


@scenario()
async def test_what_was_never_granted_needs_none_and_what_failed_does(world: World) -> None:
    world.gateway.unready = {"edge1", "edge2", "cloud"}
    await all_of(world.page())
    assert since(world) == []
    world.gateway.unready = set()
    grant = await world.page()
    world.enforcer.refuse = opens
    await all_of(world.extend(grant, 30_000))
    [revoked] = since(world)
    assert revoked["lease"] == lease_id(grant)
    extended_s = world.clock.to_unix_ns(grant.lease.deadline_ns) // NS_PER_S + 30
    assert revoked["exp"] >= extended_s


@scenario()
async def test_a_revocation_lasts_as_long_as_the_token(world: World) -> None:
    grant = await world.page(duration_ms=10_000)
    await world.release(grant)
    await world.sleep(9_900)
    assert len(since(world)) == 1
    await world.sleep(2_000)
    assert since(world) == []


@scenario()
async def test_a_new_start_still_knows_what_is_revoked(world: World) -> None:
    grant, other = await world.page(), await world.page("ue2")
    await world.relocate(grant)
    await world.release(other)
    before, cursor = world.plane.revocations.since(None)
    await world.restart()
    assert since(world, cursor) == before


class Ends:
    """A list as long as one likes."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.revocations = Revocations(self.clock, self.lease)  # type: ignore[arg-type]
        self.number = 0

    def lease(self, name: str) -> Lease:
        raise AssertionError("an end needs no look at its lease")

    def end(self, lasts_s: int) -> None:
        self.number += 1
        name = str(self.number)
        self.revocations.observe(Committed(name, self.clock.now + lasts_s * NS_PER_S))
        self.revocations.observe(Ended(name, EndReason.RELEASED))


def test_many_come_in_several_answers() -> None:
    ends, cursor, found = Ends(), None, list[str]()
    for _ in range(2 * MAX_AT_ONCE + 5):
        ends.end(100)
    for expected in (MAX_AT_ONCE, MAX_AT_ONCE, 5, 0):
        news, cursor = ends.revocations.since(cursor)
        assert len(news) == expected
        found += [one["lease"] for one in news]
    assert found == [str(number) for number in range(1, 2 * MAX_AT_ONCE + 6)]


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
            news, cursors[value] = ends.revocations.since(cursors[value])
            knows[value] += [one["lease"] for one in news]
            assert len(knows[value]) == len(set(knows[value]))
            missing = until.keys() - set(knows[value])
            assert all(until[name] <= ends.clock.now for name in missing)


@given(st.text(max_size=64))
def test_any_cursor_is_one(cursor: str) -> None:
    ends = Ends()
    ends.end(100)
    for text in (cursor, f"{ends.revocations._instance}:{cursor}"):
        news, following = ends.revocations.since(text)
        assert len(news) <= 1
        assert ends.revocations.since(following)[0] == []
