"""Parking: nothing is lost from sight, bounds hold, order is kept."""

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from upf.parking import NS_PER_MS, NS_PER_S, Arrival, Parking, ParkingLimits

LIMITS = ParkingLimits(
    paged_packets_per_ue=4,
    held_packets_per_ue=8,
    bytes_per_ue=6_000,
    packets=12,
    bytes=10_000,
    page_timeout_ms=100,
    pages_per_ue_s=1.0,
    page_burst=3,
)
KEYS = [bytes([*ue, *service]) for ue in ((1, 1, 1, 1), (2, 2, 2, 2)) for service in
        ((9, 9, 9, 1), (9, 9, 9, 2))]  # fmt: skip
pairs = st.sampled_from(KEYS)


class Lives(RuleBasedStateMachine):
    """Any history of a parking lot, beside the plainest model of it: lists."""

    def __init__(self) -> None:
        super().__init__()
        self.parking: Parking[int] = Parking(LIMITS)
        self.now_ns = 0
        self.number = 0
        self.waiting: dict[bytes, list[tuple[int, int]]] = {}
        self.on_hold: set[bytes] = set()
        self.stored = self.released = self.dropped = self.expired = 0

    @rule(key=pairs, octets=st.integers(20, 4_000))
    def arrive(self, key: bytes, octets: int) -> None:
        self.number += 1
        known = key in self.waiting
        arrival = self.parking.arrive(key, self.number, octets, self.now_ns)
        if arrival is Arrival.NO_ROOM:
            return
        assert (arrival is Arrival.FIRST) == (not known)
        self.waiting.setdefault(key, []).append((self.number, octets))
        self.stored += 1

    @rule(key=pairs, length_ms=st.integers(1, 300))
    def hold(self, key: bytes, length_ms: int) -> None:
        self.parking.hold(key, self.now_ns + length_ms * NS_PER_MS)
        self.waiting.setdefault(key, [])
        self.on_hold.add(key)

    @rule(key=pairs)
    def release(self, key: bytes) -> None:
        expected = [number for number, _ in self.waiting.get(key, [])]
        assert list(self.parking.release(key)) == expected
        self.released += len(expected)
        self.parking.end(key)
        self._gone(key)

    @rule(key=pairs)
    def refuse(self, key: bytes) -> None:
        expected = [number for number, _ in self.waiting.get(key, [])]
        assert self.parking.refuse(key) == expected
        self.dropped += len(expected)
        self._gone(key)

    @rule()
    def passed(self) -> None:
        self.parking.passed()
        self.stored += 1
        self.released += 1

    @rule(length_ms=st.integers(1, 400))
    def time_goes_on(self, length_ms: int) -> None:
        self.now_ns += length_ms * NS_PER_MS
        for key, on_hold in self.parking.overdue(self.now_ns):
            assert on_hold == (key in self.on_hold)
            expected = [number for number, _ in self.waiting[key]]
            assert self.parking.expire(key) == expected
            self.expired += len(expected)
            self._gone(key)
        next_ns = self.parking.next_deadline_ns
        assert next_ns is None or next_ns > self.now_ns

    @precondition(lambda self: self.waiting)
    @invariant()
    def bounds_hold(self) -> None:
        for ue in {key[:4] for key in self.waiting}:
            held = [p for key, ps in self.waiting.items() if key[:4] == ue for p in ps]
            assert len(held) <= LIMITS.held_packets_per_ue
            assert sum(octets for _, octets in held) <= LIMITS.bytes_per_ue
        every = [packet for packets in self.waiting.values() for packet in packets]
        assert len(every) <= LIMITS.packets
        assert sum(octets for _, octets in every) <= LIMITS.bytes

    @invariant()
    def nothing_is_lost_from_sight(self) -> None:
        counts = self.parking.counts
        held = sum(map(len, self.waiting.values()))
        assert (counts.stored, counts.released, counts.dropped, counts.expired, counts.held) == (
            *(self.stored, self.released, self.dropped, self.expired, held),
        )
        assert counts.stored == counts.released + counts.dropped + counts.expired + counts.held

    def _gone(self, key: bytes) -> None:
        self.waiting.pop(key, None)
        self.on_hold.discard(key)


TestLives = Lives.TestCase


@given(st.lists(st.integers(0, 2_000), max_size=60))
def test_a_ue_causes_no_more_pages_than_its_rate(gaps_ms: list[int]) -> None:
    parking: Parking[int] = Parking(LIMITS)
    now_ns = pages = 0
    for gap_ms in gaps_ms:
        now_ns += gap_ms * NS_PER_MS
        pages += parking.arrive(KEYS[0], 0, 100, now_ns) is Arrival.FIRST
        parking.refuse(KEYS[0])
        assert pages <= LIMITS.page_burst + now_ns * LIMITS.pages_per_ue_s / NS_PER_S
    other = parking.arrive(KEYS[2], 0, 100, now_ns)
    assert other is Arrival.FIRST  # one UE's flood costs another nothing
