"""The evidence log tells back what it was told, notices any damage, and outlives its clock."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from histories import EVERYTHING, Watch, at, committed, entries, lines, prepared

from controlplane.codec import Record
from controlplane.entries import UTC_CLOCK, Entry
from controlplane.evidence import EvidenceLog
from controlplane.lease import Committed
from controlplane.merkle import Tree, leaf_hash
from controlplane.sqlite_store import SqliteStore
from controlplane.store import Notice, Sink, StoreError, Write

HOUR_NS = 3_600 * 10**9
LINES = [line.removesuffix(b"\n") for line in lines(EVERYTHING)]
ENTRIES = entries(EVERYTHING)


class Memory:
    """A store (`controlplane.store.Store`) in memory; `failing`: it takes nothing."""

    def __init__(self, kept: Sequence[bytes] = ()) -> None:
        self.kept = list(kept)
        self.writes: list[Write] = []
        self.failing = False

    def replay(self) -> Iterator[bytes]:
        return iter(self.kept)

    def read(self, start: int, end: int) -> Iterator[bytes]:
        return (line + b"\n" for line in self.kept[start:end])

    async def append(self, write: Write) -> None:
        await asyncio.sleep(0)
        if self.failing:
            raise StoreError("no room")
        self.writes.append(write)
        self.kept += write.lines


def log_in(store: Memory | SqliteStore, clock: Watch | None = None) -> EvidenceLog:
    return EvidenceLog(store, clock or UTC_CLOCK)  # type: ignore[arg-type]


def append(log: EvidenceLog, clock: Watch, seconds: float, events: Sequence[Record]) -> None:
    clock.now = at(seconds)
    asyncio.run(log.append(events))


def test_tells_back_what_it_was_told(tmp_path: Path) -> None:
    """In the real store; a later process reads the same, and has the same root."""
    clock, store = Watch(), SqliteStore(tmp_path / "control.db")
    log = log_in(store, clock)
    for seconds, events in EVERYTHING:
        append(log, clock, seconds, events)
    root, size = log.root(), log.size
    store.close()
    store = SqliteStore(tmp_path / "control.db")
    later = log_in(store)
    assert list(later.replay()) == ENTRIES
    assert (later.root(), later.size) == (root, size)
    assert list(later.entries(3)) == ENTRIES[3:]
    assert list(later.entries(size + 5)) == []
    assert b"".join(later.read(2, 5)).splitlines() == LINES[2:5]
    store.close()


def test_goes_on_where_it_stopped() -> None:
    """Wherever that was: the log is the same as of one that never stopped."""
    for stopped in range(0, len(EVERYTHING), 5):
        clock, store = Watch(), Memory()
        for writes in (EVERYTHING[:stopped], EVERYTHING[stopped:]):
            log = log_in(store, clock)
            list(log.replay())
            for seconds, events in writes:
                append(log, clock, seconds, events)
        assert store.kept == LINES


def test_the_tree_is_over_the_lines() -> None:
    log, tree = log_in(Memory(LINES)), Tree()
    list(log.replay())
    for line in LINES:
        tree.append(leaf_hash(line))
    assert (log.root(), log.size) == (tree.root(), tree.size)
    assert log.tree.root(9) == tree.root(9)


def test_a_deadline_is_the_same_instant_for_a_later_process() -> None:
    """The monotonic clock began anew, as after a reboot; UTC went on."""

    class Later(Watch):
        def to_unix_ns(self, monotonic_ns: int) -> int:
            return monotonic_ns + 3 * HOUR_NS

        def from_unix_ns(self, unix_ns: int) -> int:
            return unix_ns - 3 * HOUR_NS

    found = [entry.event for entry in log_in(Memory(LINES), Later()).replay()]
    assert Committed("a", at(60) - 3 * HOUR_NS) in found


def test_a_write_is_one_write() -> None:
    """Entries, notices and sinks go to the store together, stamped with one instant."""
    store, notice = Memory(), Notice("s", b"body", 0)
    log, sink = log_in(store, Watch()), Sink("s", "https://x.example", None)
    asyncio.run(log.append([prepared(), committed()], [notice], [sink]))
    (write,) = store.writes
    assert (write.notices, write.sinks) == ([notice], [sink])
    assert len({entry.at_ns for entry in log_in(store).replay()}) == 1


def test_a_write_that_failed_leaves_the_log_as_it_was() -> None:
    clock, store = Watch(), Memory(LINES[:5])
    log = log_in(store, clock)
    list(log.replay())
    before = log.size, log.root()
    store.failing = True
    with pytest.raises(StoreError, match="no room"):
        append(log, clock, 99, [prepared("lost", 9)])
    assert (log.size, log.root()) == before
    store.failing = False
    append(log, clock, 100, [prepared("kept", 9)])
    *_, last = log_in(store).replay()
    assert last == Entry(5, at(100), prepared("kept", 9))


@pytest.mark.parametrize(("start", "end"), [(-1, 2), (3, 2), (0, 6), (6, 6)])
def test_what_is_not_in_the_log_cannot_be_read(start: int, end: int) -> None:
    log = log_in(Memory(LINES[:5]))
    list(log.replay())
    with pytest.raises(IndexError):
        log.read(start, end)


# Damage (each kind of it, wherever it is: test_evidence_cli)

Tamper = Callable[[list[bytes]], list[bytes]]
LAST = len(LINES) - 1


@pytest.mark.parametrize(
    ("tamper", "named"),
    [
        pytest.param(lambda a: a[1:], 0, id="first dropped"),
        pytest.param(lambda a: [*a[:2], *a[3:]], 2, id="one dropped"),
        pytest.param(lambda a: [*a[:3], a[2], *a[3:]], 3, id="one doubled"),
        pytest.param(lambda a: [*a[:3], a[4], a[3], *a[5:]], 3, id="two swapped"),
        pytest.param(lambda a: [*a[:3], b"", *a[3:]], 3, id="an empty one"),
        pytest.param(lambda a: [a[0], a[1].replace(b"edge3", b"edge2"), *a[2:]], 1, id="rewritten"),
        pytest.param(lambda a: [*a[:-1], a[-1][:-1]], LAST, id="last cut short"),
        pytest.param(
            lambda a: [*a[:-1], a[-1].replace(b"EXPIRED", b"REVOKED")], LAST, id="last rewritten"
        ),
    ],
)
def test_damage_is_refused_and_named(tamper: Tamper, named: int) -> None:
    log = log_in(Memory(tamper(LINES)))
    with pytest.raises(StoreError, match=rf"evidence log: entry {named}: "):
        list(log.replay())
    assert log.size == named


def test_damage_in_a_row_of_the_store_is_named(tmp_path: Path) -> None:
    """One bit of one row, by somebody with access to the file."""
    store = SqliteStore(tmp_path / "control.db")
    store.write(Write(LINES))
    flipped = bytearray(LINES[7])
    flipped[100] ^= 4
    statement = "UPDATE entries SET line = ? WHERE number = 7"
    store.connection.execute(statement, (bytes(flipped),))
    with pytest.raises(StoreError, match="evidence log: entry 7: "):
        list(log_in(store).replay())
    store.close()


def test_an_entry_of_another_log_is_refused() -> None:
    """It is whole and has the right number, but it was never said here."""
    (_, events), *rest = EVERYTHING
    others = [line.removesuffix(b"\n") for line in lines([(-2.9, events), *rest])]
    with pytest.raises(StoreError, match="entry 2: is not linked to the entry before it"):
        list(log_in(Memory([*LINES[:2], others[2]])).replay())
