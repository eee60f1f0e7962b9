"""The evidence part of `bench control`: a log is written and verified, proofs are made and checked.

The log is sound in every respect, so that the auditor finds nothing: a start of the controller,
then pages, batch after batch, each acknowledged with the next.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Iterator
from contextlib import closing
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from controlplane.clock import Clock
from controlplane.codec import Record
from controlplane.enforcement import Flow
from controlplane.evidence import EvidenceLog
from controlplane.facts import Acknowledged, Started
from controlplane.intent import Intent
from controlplane.lease import Committed, Prepared, Terms
from controlplane.merkle import Tree, leaf_hash, verify_inclusion
from controlplane.sqlite_store import SqliteStore
from controlplane.verification import verify_log
from scripts.bench.control_world import FIRST_UE4, FIRST_UE6, MAX_UES

BATCH_PAGES = 256  # as many as one write of the committer takes; two entries each
LEASE_NS = 86_400 * 1_000_000_000
PREPARE_NS = 2_000_000_000
PROOFS = 2_000


def measure(folder: Path, entries: int, tree_size: int, seed: int) -> dict[str, Any]:
    """Write and verify a log of `entries` or more; prove and verify in a tree of `tree_size`."""
    with closing(SqliteStore(folder / "evidence.db")) as store:
        clock = Clock()
        log = EvidenceLog(store, clock)
        batches = _batches(clock)
        took_s = asyncio.run(_write(log, batches, entries))
        started = time.perf_counter()
        verdict = verify_log((line + b"\n" for line in store.replay()), None)
        verified_s = time.perf_counter() - started
    assert verdict.audited == log.size and not verdict.problems, verdict.problems[:3]
    return {
        "evidence_entries": log.size,
        "evidence_entries_per_s": log.size / took_s,
        "evidence_entries_verified_per_s": log.size / verified_s,
        **_proofs(tree_size, seed),
    }


async def _write(log: EvidenceLog, batches: Iterator[list[Record]], entries: int) -> float:
    """Return how long it took, s; to make the events is not counted."""
    took_s = 0.0
    while log.size < entries:
        events = next(batches)
        started = time.perf_counter()
        await log.append(events)
        took_s += time.perf_counter() - started
    return took_s


def _proofs(tree_size: int, seed: int) -> dict[str, Any]:
    tree = Tree()
    for number in range(tree_size):
        tree.append(leaf_hash(number.to_bytes(8, "big")))
    chosen = random.Random(seed).sample(range(tree_size), min(PROOFS, tree_size))
    started = time.perf_counter()
    proofs = [tree.inclusion(number, tree_size) for number in chosen]
    proved_s = time.perf_counter() - started
    root = tree.root()
    started = time.perf_counter()
    for number, proof in zip(chosen, proofs, strict=True):
        verify_inclusion(tree.leaf(number), number, tree_size, proof, root)
    verified_s = time.perf_counter() - started
    return {
        "proof_tree_entries": tree_size,
        "proof_bytes": max(32 * len(proof) for proof in proofs),
        "proofs_made_per_s": len(proofs) / proved_s,
        "proofs_verified_per_s": len(proofs) / verified_s,
    }


def _batches(clock: Clock) -> Iterator[list[Record]]:
    yield [Started("00000000")]
    acknowledged: list[Record] = []
    for first in itertools.count(0, BATCH_PAGES):
        now_ns = clock.now_ns()
        pages = [_page(number, now_ns) for number in range(first, first + BATCH_PAGES)]
        yield [*acknowledged, *(event for page in pages for event in page)]
        ids = tuple(committed.lease_id for _, committed in pages)
        acknowledged = [Acknowledged(ids, clock.now_ns())]


def _page(number: int, now_ns: int) -> tuple[Prepared, Committed]:
    terms = Terms(
        lease_id=f"{number:016x}",
        session_id=f"00000000-0000-4000-8000-{number:012x}",
        cause="PAGE",
        tenant="operator",
        ue=f"ue{number}",
        aisi="bench.text-generation",
        anchor="edge1",
        flows=(
            Flow(FIRST_UE4 + number % MAX_UES, ip_address("198.18.0.1")),
            Flow(FIRST_UE6 + number, ip_address("fd00:a151::1")),
        ),
        epoch=1,
        qos_profile="QOS_E",
        five_qi=80,
        cell="gnb1",
        downlink_bps=0,
        uplink_bps=0,
        priority_level=8,
        preemptible=True,
        intent=Intent(task="text-generation"),
    )
    prepared = Prepared(terms, now_ns + PREPARE_NS)
    return prepared, Committed(terms.lease_id, now_ns + LEASE_NS)
