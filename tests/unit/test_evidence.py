"""The journal tells back what it was told, notices any damage, and is never half written."""

import errno
import hashlib
import json
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from unittest.mock import patch

import pytest
from fakes import FakeClock
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.enforcement import Flow
from controlplane.evidence import Journal, JournalError
from controlplane.intent import MAX_DURATION_MS, MIN_DURATION_MS, Intent
from controlplane.lease import (
    Committed,
    DrainStarted,
    Ended,
    EndReason,
    Event,
    Prepared,
    Renewed,
    Terms,
)
from controlplane.merkle import Tree, leaf_hash

FLOWS = (
    Flow(IPv4Address("10.45.0.1"), IPv4Address("198.18.0.1")),
    Flow(IPv6Address("fd00:45::1"), IPv6Address("fd00:a151::1")),
)
HOUR_NS = 3_600_000_000_000


def terms(lease_id: str = "lease", epoch: int = 1, intent: Intent | None = None) -> Terms:
    return Terms(
        lease_id=lease_id,
        session_id="session",
        ue="ue1",
        aisi="chat.example",
        anchor="edge1",
        flows=FLOWS,
        epoch=epoch,
        intent=intent or Intent(task="text-generation"),
    )


EVENTS: list[Event] = [
    Prepared(terms(), 10),
    Committed("lease", 20),
    Renewed("lease", 30),
    DrainStarted("lease", 25),
    Ended("lease", EndReason.RELOCATED),
]


def write(path: Path, *batches: Sequence[Event], clock: FakeClock | None = None) -> None:
    journal = Journal(path, clock or FakeClock())
    assert list(journal.replay()) == []
    for batch in batches:
        journal.append(batch)
    journal.close()


def replay(path: Path, clock: FakeClock | None = None) -> list[Event]:
    journal = Journal(path, clock or FakeClock())
    try:
        return list(journal.replay())
    finally:
        journal.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "journal"
    write(path, EVENTS[:1], EVENTS[1:4], EVENTS[4:])
    return path


# Round trip

words = st.text("aZ09é漢_.:-", min_size=1, max_size=12)
instants = st.integers(-HOUR_NS, 24 * HOUR_NS)
intents = st.builds(
    lambda **members: Intent.model_validate(members),
    task=st.sampled_from(["text-generation", "mask", "a-b-3"]),
    regions=st.lists(words, max_size=3),
    minTrustTier=st.integers(0, 10),
    maxLatencyMs=st.none() | st.floats(0, 3_600_000, exclude_min=True),
    maxCost=st.none() | st.floats(0, 1e9),
    qosProfile=words,
    durationMs=st.integers(MIN_DURATION_MS, MAX_DURATION_MS),
)
flows = st.one_of(
    st.builds(Flow, st.ip_addresses(v=4), st.ip_addresses(v=4)),
    st.builds(Flow, st.ip_addresses(v=6), st.ip_addresses(v=6)),
)
events = st.one_of(
    st.builds(
        Prepared,
        st.builds(
            Terms,
            lease_id=words,
            session_id=words,
            ue=words,
            aisi=words,
            anchor=words,
            flows=st.lists(flows, max_size=3).map(tuple),
            epoch=st.integers(1, 2**53 - 1),
            intent=intents,
        ),
        instants,
    ),
    st.builds(Committed, words, instants),
    st.builds(Renewed, words, instants),
    st.builds(DrainStarted, words, instants),
    st.builds(Ended, words, st.sampled_from(EndReason)),
)


@settings(deadline=None)
@given(st.lists(st.lists(events, min_size=1, max_size=4), max_size=4))
def test_tells_back_what_it_was_told(batches: list[list[Event]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, told = Path(folder) / "journal", [event for batch in batches for event in batch]
        write(path, *batches)
        assert replay(path) == told


def test_a_deadline_is_the_same_instant_for_a_later_process(path: Path) -> None:
    """The monotonic clock began anew, as after a reboot; UTC went on."""
    later = FakeClock()
    later.offset += 3 * HOUR_NS
    assert replay(path, later)[1] == Committed("lease", 20 - 3 * HOUR_NS)


def test_goes_on_where_it_stopped(path: Path) -> None:
    journal = Journal(path, FakeClock())
    assert list(journal.replay()) == EVENTS
    journal.append([Prepared(terms("next", 2), 90)])
    root, size = journal.root(), journal.size
    journal.close()
    assert replay(path) == [*EVENTS, Prepared(terms("next", 2), 90)]
    tree = Tree()
    for line in path.read_bytes().splitlines():
        tree.append(leaf_hash(line))
    assert (tree.root(), tree.size) == (root, size)


def test_each_entry_names_the_one_before(path: Path) -> None:
    previous = bytes(32)
    for index, line in enumerate(path.read_bytes().splitlines()):
        entry = json.loads(line)
        assert (entry["index"], entry["previous"]) == (index, previous.hex())
        previous = hashlib.sha256(b"\0" + line).digest()


def test_is_for_its_owner_only(path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


# Damage


def test_a_last_line_that_was_cut_short_is_dropped(path: Path) -> None:
    whole = path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    good = len(whole) - len(last)
    for cut in range(good, len(whole)):
        path.write_bytes(whole[:cut])
        assert replay(path) == EVENTS[:-1]
        assert path.read_bytes() == whole[:good]
    path.write_bytes(whole[:-10])
    journal = Journal(path, FakeClock())
    list(journal.replay())
    journal.append(EVENTS[-1:])
    journal.close()
    assert replay(path) == EVENTS


def test_any_flipped_bit_is_noticed_and_its_entry_named(path: Path) -> None:
    whole = path.read_bytes()
    for at in range(len(whole)):
        entry = whole[:at].count(b"\n")
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        with pytest.raises(JournalError, match=rf"journal: entry {entry}: "):
            replay(path)
        assert path.read_bytes() == bytes(damaged)  # evidence is not tidied away


Tamper = Callable[[list[bytes]], list[bytes]]


@pytest.mark.parametrize(
    ("tamper", "named"),
    [
        pytest.param(lambda lines: lines[1:], 0, id="first dropped"),
        pytest.param(lambda lines: lines[:2] + lines[3:], 2, id="one dropped"),
        pytest.param(lambda lines: lines[:2] + lines[1:], 2, id="one doubled"),
        pytest.param(lambda lines: [*lines, lines[-1]], 5, id="last doubled"),
        pytest.param(lambda lines: [*lines[:3], lines[4], lines[3]], 3, id="two swapped"),
        pytest.param(lambda lines: [*lines[:3], b"\n", *lines[3:]], 3, id="empty line"),
        pytest.param(lambda lines: [*lines[:3], b"[]\n", *lines[3:]], 3, id="not an entry"),
        pytest.param(
            lambda lines: [lines[0].replace(b"edge1", b"edge2"), *lines[1:]], 0, id="rewritten"
        ),
        pytest.param(
            lambda lines: [*lines[:-1], lines[-1].replace(b"RELOCATED", b"EXPIRED")],
            4,
            id="last rewritten",
        ),
    ],
)
def test_tampering_is_refused_and_named(path: Path, tamper: Tamper, named: int) -> None:
    path.write_bytes(b"".join(tamper(path.read_bytes().splitlines(keepends=True))))
    with pytest.raises(JournalError, match=rf"journal: entry {named}: "):
        replay(path)


def test_an_entry_of_another_journal_is_refused(path: Path, tmp_path: Path) -> None:
    """It is whole and has the right number, but it was never said here."""
    other = tmp_path / "other"
    write(other, [Prepared(terms(), 10), Committed("lease", 21), Renewed("lease", 99)])
    lines, others = (file.read_bytes().splitlines(keepends=True) for file in (path, other))
    path.write_bytes(b"".join([*lines[:2], others[2]]))
    with pytest.raises(JournalError, match="journal: entry 2: is not linked to the entry before"):
        replay(path)


# Writing


@pytest.mark.parametrize("way", ["nothing written", "partly written", "not synced"])
def test_a_failed_write_leaves_the_file_as_it_was(path: Path, way: str) -> None:
    whole = path.read_bytes()
    journal = Journal(path, FakeClock())
    list(journal.replay())
    before = journal.size, journal.root()
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    real = os.write
    fault = {
        "nothing written": patch("os.write", side_effect=full),
        "partly written": patch("os.write", lambda file, data: real(file, data[:-7])),
        "not synced": patch("os.fdatasync", side_effect=full),
    }[way]
    with fault, pytest.raises(JournalError, match="journal: cannot be written: No space left"):
        journal.append([Prepared(terms("next", 2), 90), Committed("next", 99)])
    assert path.read_bytes() == whole
    assert (journal.size, journal.root()) == before
    journal.append([Prepared(terms("next", 2), 90)])  # there is room again
    journal.close()
    assert replay(path) == [*EVENTS, Prepared(terms("next", 2), 90)]


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from fakes import FakeClock
from controlplane.evidence import Journal, JournalError
from controlplane.lease import Committed
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path(sys.argv[1])
limit = path.stat().st_size + 100
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
journal = Journal(path, FakeClock())
list(journal.replay())
try:
    journal.append([Committed("lease", 20)] * 3)
except JournalError as error:
    print(error)
"""


def test_a_disk_that_is_really_full(path: Path) -> None:
    """The kernel itself cuts the write short, at a limit of the file's size."""
    whole = path.read_bytes()
    search = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    told = subprocess.run(
        [sys.executable, "-c", FULL_DISK, path],
        env={**os.environ, "PYTHONPATH": search},
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
    )
    assert "cannot be written" in told.stdout
    assert path.read_bytes() == whole


def test_only_one_controller_at_a_time(path: Path) -> None:
    journal = Journal(path, FakeClock())
    with pytest.raises(JournalError, match="another controller is using this journal"):
        Journal(path, FakeClock())
    journal.close()
    assert replay(path) == EVENTS


def test_a_journal_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="absent/journal: cannot be opened: No such file"):
        Journal(tmp_path / "absent" / "journal", FakeClock())
