"""Admission: whatever is reserved, released, moved or pre-empted, the pools add up."""

import random
from collections import Counter, defaultdict
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from controlplane.admission import Demand, Holder, Pools, Rates, Resource, Shortage
from controlplane.catalogue import Anchor, Hosting

CELL = Rates(100, 50)


def anchor(
    name: str, slots: int, downlink_bps: int | None = None, uplink_bps: int | None = None
) -> Anchor:
    return Anchor(
        name=name,
        region="north",
        trust_tier=1,
        slots=slots,
        cost=1.0,
        n6_downlink_bps=downlink_bps,
        n6_uplink_bps=uplink_bps,
        hosts=[Hosting(aisi="chat", service_time_ms=20.0)],
    )


def pools() -> Pools:
    return Pools(
        {"edge1": anchor("edge1", 2, 100, 40), "edge2": anchor("edge2", 5)},
        {"gnb1": CELL, "gnb2": Rates()},
    )


def demand(at: str | None = "edge1", downlink_bps: int = 10, cell: str = "gnb1") -> Demand:
    return Demand(at, cell, downlink_bps, 0)


@pytest.mark.parametrize(
    ("asked", "short"),
    [
        (Demand("edge1", "gnb2", 101, 0), Shortage(Resource.N6_DOWNLINK, "edge1", 101, 100)),
        (Demand("edge1", "gnb2", 0, 41), Shortage(Resource.N6_UPLINK, "edge1", 41, 40)),
        (Demand("edge2", "gnb1", 101, 0), Shortage(Resource.CELL_DOWNLINK, "gnb1", 101, 100)),
        (Demand(None, "gnb1", 0, 51), Shortage(Resource.CELL_UPLINK, "gnb1", 51, 50)),
        (Demand("cloud", None, 0, 0), Shortage(Resource.ANCHOR_SLOTS, "cloud", 1, 0)),
        (Demand("edge2", "gnb9", 1, 0), Shortage(Resource.CELL_DOWNLINK, "gnb9", 1, 0)),
        (Demand("edge2", "gnb2", 10**12, 10**12), None),
        (Demand("edge1", "gnb1", 100, 40), None),
        (Demand("edge2", "gnb9", 0, 0), None),
    ],
)
def test_what_is_short_is_named_and_nothing_of_it_is_taken(
    asked: Demand, short: Shortage | None
) -> None:
    counted = pools()
    assert counted.try_reserve("a", "s", asked) == short
    if short is not None:
        for resource in Resource:
            for where in ("edge1", "edge2", "cloud", "gnb1", "gnb2", "gnb9"):
                assert counted.used(resource, where) == 0


def test_a_relocation_takes_the_cell_once_and_both_anchors() -> None:
    counted = pools()
    assert counted.try_reserve("old", "s", demand("edge1", 80)) is None
    assert counted.try_reserve("new", "s", demand("edge2", 90)) is None  # of 100 in the cell
    assert counted.used(Resource.CELL_DOWNLINK, "gnb1") == 90
    assert counted.used(Resource.N6_DOWNLINK, "edge1") == 80
    assert counted.used(Resource.N6_DOWNLINK, "edge2") == 90
    assert counted.slots_used() == {"edge1": 1, "edge2": 1}
    counted.release("old")
    counted.release("old")
    assert counted.used(Resource.CELL_DOWNLINK, "gnb1") == 90
    counted.release("new")
    assert counted.used(Resource.CELL_DOWNLINK, "gnb1") == 0


def test_a_lease_reserves_once() -> None:
    counted = pools()
    assert counted.try_reserve("a", "s", demand()) is None
    counted.hold("a", "s", demand())  # its event is folded
    assert counted.slots_used()["edge1"] == 1
    with pytest.raises(ValueError, match="already"):
        counted.try_reserve("a", "s", demand())


def test_a_handover_is_never_refused_and_an_overdrawn_cell_gives_nothing_more() -> None:
    counted = Pools({"edge1": anchor("edge1", 9)}, {"gnb1": CELL, "gnb2": Rates(50, 50)})
    for session in ("a", "b"):
        assert counted.try_reserve(f"{session}1", session, demand(downlink_bps=40)) is None
    counted.move_cell("a", "gnb2")
    incoming = Demand(None, "gnb2", 40, 0)
    assert counted.shortage("b", incoming) == Shortage(Resource.CELL_DOWNLINK, "gnb2", 40, 10)
    counted.move_cell("b", "gnb2")
    assert counted.used(Resource.CELL_DOWNLINK, "gnb1") == 0
    assert counted.used(Resource.CELL_DOWNLINK, "gnb2") == 80
    # A session that is in it already adds nothing by relocating.
    assert counted.try_reserve("b2", "b", demand(downlink_bps=40, cell="gnb2")) is None
    assert counted.try_reserve("c1", "c", demand(downlink_bps=1, cell="gnb2")) is not None


def held(counted: Pools, *leases: tuple[str, int, int]) -> list[Holder]:
    holders = []
    for lease_id, priority_level, downlink_bps in leases:
        counted.hold(lease_id, f"s-{lease_id}", demand("edge2", downlink_bps))
        holders.append(
            Holder(
                lease_id=lease_id,
                session_id=f"s-{lease_id}",
                priority_level=priority_level,
                vulnerable=True,
            )
        )
    return holders


@pytest.mark.parametrize(
    ("asked_bps", "expected"),
    [
        (10, []),
        (30, ["least"]),
        (40, ["much"]),  # with it, `least` can be spared
        (70, ["least", "much"]),
        (90, ["least", "much", "little"]),
        (91, None),  # would take `equal`
    ],
)
def test_the_least_important_make_room_and_nobody_in_vain(
    asked_bps: int, expected: list[str] | None
) -> None:
    counted = pools()
    holders = held(counted, ("equal", 5, 10), ("little", 8, 10), ("much", 8, 50), ("least", 9, 20))
    victims = counted.victims(demand("edge2", asked_bps), "new", 5, holders)
    assert victims == expected


def test_a_session_does_not_take_its_own_and_the_invulnerable_are_safe() -> None:
    counted = Pools({"edge2": anchor("edge2", slots=2)}, {"gnb1": CELL})
    own, other = held(counted, ("own", 9, 0), ("other", 9, 0))
    asked = demand("edge2", 0)  # a slot
    assert counted.victims(asked, own.session_id, 1, [own]) is None
    assert counted.victims(asked, own.session_id, 1, [other, own]) == ["other"]
    safe = replace(other, vulnerable=False)
    assert counted.victims(asked, own.session_id, 1, [own, safe]) is None
    assert counted.victims(asked, "new", 1, [own, safe]) == ["own"]


class Admission(RuleBasedStateMachine):
    """Pools next to a model that counts everything anew each time."""

    def __init__(self) -> None:
        super().__init__()
        self.anchors = {"edge1": anchor("edge1", 3, 20, 10), "edge2": anchor("edge2", 2, 12, None)}
        self.cells = {"gnb1": Rates(20, 10), "gnb2": Rates(12, None)}
        self.pools = Pools(self.anchors, self.cells)
        self.leases: dict[str, tuple[str, Demand]] = {}
        self.holders: dict[str, Holder] = {}
        self.made = 0

    def used(self, leases: dict[str, tuple[str, Demand]]) -> Counter[tuple[Resource, str]]:
        used: Counter[tuple[Resource, str]] = Counter()
        shares: defaultdict[tuple[Resource, str, str], int] = defaultdict(int)
        for session_id, asked in leases.values():
            if asked.anchor is not None:
                used[Resource.ANCHOR_SLOTS, asked.anchor] += 1
                used[Resource.N6_DOWNLINK, asked.anchor] += asked.downlink_bps
                used[Resource.N6_UPLINK, asked.anchor] += asked.uplink_bps
            if asked.cell is not None:
                for resource, amount in (
                    (Resource.CELL_DOWNLINK, asked.downlink_bps),
                    (Resource.CELL_UPLINK, asked.uplink_bps),
                ):
                    share = (resource, asked.cell, session_id)
                    shares[share] = max(shares[share], amount)
        for (resource, cell, _), amount in shares.items():
            used[resource, cell] += amount
        return used

    def fits(self, leases: dict[str, tuple[str, Demand]], session_id: str, more: Demand) -> bool:
        """Whether no pool that would be drawn from further would be overdrawn."""
        before, after = self.used(leases), self.used({**leases, "more": (session_id, more)})
        for (resource, where), used in after.items():
            capacity = self.pools.capacity(resource, where)
            if used > before[resource, where] and capacity is not None and used > capacity:
                return False
        return True

    demands = st.builds(
        Demand,
        st.sampled_from([None, "edge1", "edge2"]),
        st.sampled_from([None, "gnb1", "gnb2"]),
        st.integers(0, 8),
        st.integers(0, 4),
    )
    sessions = st.sampled_from(["s1", "s2", "s3", "s4", "s5"])
    picks = st.integers(0, 1 << 20)

    def named(self) -> str:
        self.made += 1
        return f"lease{self.made}"

    def hold(self, lease_id: str, session_id: str, asked: Demand, arp: tuple[int, bool]) -> None:
        self.leases[lease_id] = session_id, asked
        self.holders[lease_id] = Holder(
            lease_id=lease_id, session_id=session_id, priority_level=arp[0], vulnerable=arp[1]
        )

    arps = st.tuples(st.integers(1, 4), st.booleans())

    @rule(session_id=sessions, asked=demands, arp=arps)
    def reserve(self, session_id: str, asked: Demand, arp: tuple[int, bool]) -> None:
        lease_id, fits = self.named(), self.fits(self.leases, session_id, asked)
        short = self.pools.try_reserve(lease_id, session_id, asked)
        assert (short is None) == fits
        if fits:
            self.hold(lease_id, session_id, asked, arp)
        else:
            assert short is not None
            assert short.free < short.asked

    @rule(session_id=sessions, asked=demands, arp=arps)
    def replay(self, session_id: str, asked: Demand, arp: tuple[int, bool]) -> None:
        lease_id = self.named()
        self.pools.hold(lease_id, session_id, asked)
        self.hold(lease_id, session_id, asked, arp)

    @precondition(lambda self: self.leases)
    @rule(pick=picks)
    def release(self, pick: int) -> None:
        lease_id = list(self.leases)[pick % len(self.leases)]
        self.pools.release(lease_id)
        del self.leases[lease_id], self.holders[lease_id]

    @rule(session_id=sessions, cell=st.sampled_from(["gnb1", "gnb2"]))
    def hand_over(self, session_id: str, cell: str) -> None:
        self.pools.move_cell(session_id, cell)
        for lease_id, (of, asked) in self.leases.items():
            if of == session_id:
                moved = Demand(asked.anchor, cell, asked.downlink_bps, asked.uplink_bps)
                self.leases[lease_id] = of, moved

    @rule(name=st.sampled_from(["edge1", "edge2"]), slots=st.integers(1, 4))
    def register_anew(self, name: str, slots: int) -> None:
        self.anchors[name] = self.anchors[name].model_copy(update={"slots": slots})

    @rule(session_id=sessions, asked=demands, level=st.integers(1, 4), pick=picks)
    def preempt(self, session_id: str, asked: Demand, level: int, pick: int) -> None:
        holders = list(self.holders.values())
        victims = self.pools.victims(asked, session_id, level, holders)
        random.Random(pick).shuffle(holders)
        assert self.pools.victims(asked, session_id, level, holders) == victims

        def without(ended: list[str]) -> dict[str, tuple[str, Demand]]:
            return {name: held for name, held in self.leases.items() if name not in ended}

        eligible = [
            name
            for name, holder in self.holders.items()
            if holder.vulnerable
            and holder.priority_level > level
            and holder.session_id != session_id
        ]
        if victims is None:
            assert not self.fits(without(eligible), session_id, asked)
            return
        assert set(victims) <= set(eligible)
        assert self.fits(without(victims), session_id, asked)
        for spared in victims:
            others = [name for name in victims if name != spared]
            assert not self.fits(without(others), session_id, asked)
        levels = [self.holders[name].priority_level for name in victims]
        assert levels == sorted(levels, reverse=True)

    @invariant()
    def adds_up(self) -> None:
        expected = self.used(self.leases)
        for resource in Resource:
            for where in ("edge1", "edge2", "gnb1", "gnb2"):
                assert self.pools.used(resource, where) == expected[resource, where]


def test_pools_add_up_whatever_happens() -> None:
    run_state_machine_as_test(
        Admission, settings=settings(max_examples=60, stateful_step_count=30, deadline=None)
    )
