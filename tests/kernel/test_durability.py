"""SIGKILL at any instant: what was acknowledged is there, the rest is whole or absent.

A control plane in a process of its own, real store, real gate, clients that hammer it with pages,
relocations and releases. It is killed at each boundary between steps, and at random; then started
again, and log, ledger and kernel are compared with what the clients had been told.
AIPAGING_TEST_KILLS sets how often (by default, 36).
"""

import asyncio
import json
import os
import random
import select
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import fused_plane
import pytest
from fused_plane import SUBSCRIBERS, TASK, UES, Fuse, fast_of, gate_of, probe_once, service

from controlplane.answers import Refusal
from controlplane.clock import parse_rfc3339
from controlplane.codec import Codec
from controlplane.entries import UTC_CLOCK
from controlplane.intent import Intent
from controlplane.lease import Committed, DrainStarted, Ended, Prepared, State
from controlplane.northbound.plane import ControlPlane
from controlplane.paging import Page
from controlplane.verification import verify_log
from upf.netns import Namespace

pytestmark = pytest.mark.kernel

KILLS = int(os.environ.get("AIPAGING_TEST_KILLS", "36"))
# Where it kills itself; "random" is killed from outside.
POINTS = (
    *("before write", "in transaction", "before commit", "after write"),
    *("before kernel", "before gate", "after gate", "after kernel"),
    *("before answer", "random", "random"),
)
SERIES = 18  # kills of one control plane
LIFE_S = 10.0  # at most so long one lives


def in_child(work: Callable[[int], None]) -> tuple[int, int]:
    """Run `work` in a child with a pipe to write to; return its pid and our end of the pipe."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return child, read

    status = 1
    try:
        os.close(read)
        work(write)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def wish(ue: str, key: str) -> Page:
    """Return the request of a UE under a key."""
    intent = Intent.model_validate({"task": TASK, "durationMs": 600_000})
    return Page(tenant="operator", ue=ue, intent=intent, key=key)


def hammer(folder: Path, netns: str, fuse: Fuse, round_number: int, told: int) -> None:
    """Serve clients until killed; each answer is written to `told` once the client has it."""

    def tell(**what: Any) -> None:
        os.write(told, json.dumps(what).encode() + b"\n")  # short: one piece

    async def client(plane: ControlPlane, ue: str, chance: random.Random) -> None:
        number = 0
        while True:
            number += 1
            key = f"{round_number}.{ue}.{number}"
            tell(asked=key, ue=ue)
            try:
                granted = await plane.pager.page(wish(ue, key))
            except Refusal as refusal:  # of a session that the round before left: see below
                assert refusal.cause == "SESSION_EXISTS", refusal
                tell(refused=key)
            else:
                fuse.at("before answer")
                terms = granted.lease.terms
                tell(granted=terms.lease_id, session=terms.session_id, key=key)
            for session in plane.controller.ledger.sessions(ue=ue):
                if chance.random() < 0.6:
                    moved = await plane.relocator.relocate(session.session_id)
                    fuse.at("before answer")
                    tell(granted=moved.lease.terms.lease_id, session=session.session_id)
                if chance.random() < 0.6:
                    await plane.controller.release(session.session_id)
                    fuse.at("before answer")
                    tell(released=session.session_id)

    async def serve() -> None:
        with ExitStack() as undo:
            async with service(folder, netns, undo, fuse).running() as plane:
                tell(serves=True)
                chances = [random.Random(f"{round_number}.{n}") for n in range(UES)]
                await asyncio.gather(
                    *(
                        client(plane, subscriber.ue, chance)
                        for subscriber, chance in zip(SUBSCRIBERS, chances, strict=True)
                    )
                )

    asyncio.run(serve())


def inspect(folder: Path, netns: str, unanswered: dict[str, str], told: int) -> None:
    """Start again, retry what was not answered, and tell what there is."""

    async def look() -> None:
        with ExitStack() as undo:
            made = service(folder, netns, undo, Fuse("never", 1))
            async with made.running() as plane:
                ledger = plane.controller.ledger
                gate = gate_of(made)
                enforced = {(entry.lease_id, entry.anchor) for entry in gate.enforced()}
                fast, wanted = fast_of(gate)
                committed = {
                    (held.terms.lease_id, held.terms.anchor)
                    for held in ledger.live()
                    if held.state is State.COMMITTED
                }
                sessions = {}
                for key, ue in unanswered.items():
                    with suppress(Refusal):  # it came to nothing, and there is another session
                        granted = await plane.pager.page(wish(ue, key))
                        sessions[key] = granted.lease.terms.session_id
            found = json.dumps(
                {
                    "enforced": sorted(enforced),
                    "committed": sorted(committed),
                    "fast": fast,
                    "wanted of fast": wanted,
                    "retried": sessions,
                }
            )
            (folder / "found.json").write_text(found)
            lines = b"".join(made.plane.log.read(0, made.plane.log.size))
            (folder / "log.jsonl").write_bytes(lines)
        os.write(told, b"done\n")

    asyncio.run(look())


def answers(read: int, child: int, until_s: float, kill_after_s: float | None) -> Iterator[Any]:
    """Yield what the child tells until it is dead; kill it some time after it serves, if asked."""
    rest, serves_at = b"", None
    deadline = time.monotonic() + until_s
    while True:
        now = time.monotonic()
        due = serves_at is not None and kill_after_s is not None and now > serves_at + kill_after_s
        if due or now > deadline:
            os.kill(child, signal.SIGKILL)
        if not select.select([read], [], [], 0.002)[0]:
            continue
        data = os.read(read, 65_536)
        if not data:
            break
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            serves_at = now if "serves" in message else serves_at
            yield message
    os.close(read)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL, "it failed before it was killed"


def check(folder: Path, told: list[Any], earlier: dict[str, str]) -> None:
    """Compare what clients were told, ever, with log, ledger and kernel."""
    lines = (folder / "log.jsonl").read_bytes().splitlines(keepends=True)
    verdict = verify_log(lines, None)
    assert not verdict.problems, [str(problem) for problem in verdict.problems[:5]]
    found = json.loads((folder / "found.json").read_text())
    # The kernel holds what the ledger says, both families of each lease, and nothing else.
    assert found["enforced"] == found["committed"]
    assert found["fast"] == found["wanted of fast"]
    codec, granted, ended = Codec(UTC_CLOCK), set(), set()
    prepared: dict[str, Prepared] = {}
    at: dict[str, int] = {}
    for line in lines:
        members = json.loads(line)
        event = codec.decode(members)
        match event:
            case Prepared(terms, _):
                prepared[terms.lease_id] = event
            case Committed(lease_id, _):
                granted.add(lease_id)
                at[lease_id] = parse_rfc3339(members["at"])
            case DrainStarted(lease_id, _):
                # A flip is whole: the lease that takes over is granted in the same write.
                session = prepared[lease_id].terms.session_id
                others = [
                    other
                    for other, when in at.items()
                    if prepared[other].terms.session_id == session
                    and other != lease_id
                    and when == parse_rfc3339(members["at"])
                ]
                assert others, f"lease {lease_id} drains for nobody"
            case Ended(lease_id, _):
                ended.add(lease_id)
            case _:
                pass
    for message in told:
        if "granted" in message:
            assert message["granted"] in granted, f"{message} was acknowledged and is not there"
        if "released" in message:
            of_session = [
                lease_id
                for lease_id, event in prepared.items()
                if event.terms.session_id == message["released"]
            ]
            assert set(of_session) <= ended, f"{message} was acknowledged and did not happen"
    # The same request under the same key, before the kill and after, is one granted session.
    of_key: dict[str, set[str]] = {}
    for lease_id in granted:
        terms = prepared[lease_id].terms
        if terms.key is not None:
            of_key.setdefault(terms.key, set()).add(terms.session_id)
    assert all(len(made) == 1 for made in of_key.values())
    for key, session in found["retried"].items():
        assert earlier.setdefault(key, session) == session


def wire(namespace: Namespace) -> None:
    """Make the interfaces that the gate is told of."""
    with namespace.links() as links:
        for name in ("n3", "n6-1", "n6-2"):
            links.link("add", ifname=name, kind="veth", peer=f"{name}-far")
            links.link("set", index=links.link_lookup(ifname=name)[0], state="up")


def kill_again_and_again(tmp_path: Path, numbers: range, died: Counter[str]) -> tuple[int, int]:
    """Kill one control plane so many times; return how many grants and releases were kept."""
    chance = random.Random(numbers.start)
    told: list[Any] = []
    keys: dict[str, str] = {}
    with Namespace() as namespace:
        wire(namespace)
        for number in numbers:
            point = POINTS[number % len(POINTS)]
            fuse = Fuse(point, chance.randint(1, 60))
            kill_after_s = chance.uniform(0, 0.25) if point == "random" else None

            def work(pipe: int, fuse: Fuse = fuse, number: int = number) -> None:
                hammer(tmp_path, namespace.path, fuse, number, pipe)

            child, read = in_child(work)
            asked: dict[str, str] = {}
            for message in answers(read, child, LIFE_S, kill_after_s):
                told.append(message)
                if "asked" in message:
                    asked[message["asked"]] = message["ue"]
                elif "refused" in message:
                    del asked[message["refused"]]
                elif "key" in message:
                    keys[message["key"]] = message["session"]
                    asked.pop(message["key"], None)
            died[point] += 1

            def look(pipe: int, asked: dict[str, str] = asked) -> None:
                inspect(tmp_path, namespace.path, asked, pipe)

            child, read = in_child(look)
            with os.fdopen(read, "rb") as pipe:
                assert pipe.read() == b"done\n", f"round {number} ({point}) did not start again"
            os.waitpid(child, 0)
            check(tmp_path, told, keys)
    return sum("granted" in message for message in told), sum(
        "released" in message for message in told
    )


def test_it_may_be_killed_at_any_instant(tmp_path: Path) -> None:
    probe_once()
    died: Counter[str] = Counter()
    granted = released = 0
    for first in range(0, KILLS, SERIES):  # each on a log of its own, which is verified each time
        folder = tmp_path / str(first)
        folder.mkdir()
        kept = kill_again_and_again(folder, range(first, min(first + SERIES, KILLS)), died)
        granted, released = granted + kept[0], released + kept[1]
    print(f"\n{KILLS} kills ({dict(died)}): {granted} grants and {released} releases kept")
    assert granted > 10 * KILLS and released > KILLS  # it did something between the kills


def test_a_store_that_lies_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    probe_once()
    monkeypatch.setattr(fused_plane, "LAZY", [True])
    with pytest.raises(AssertionError):
        kill_again_and_again(tmp_path, range(9, 11), Counter())  # at random
    assert "StoreError" in capfd.readouterr().err  # it did not start again over what is missing
