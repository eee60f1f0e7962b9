"""The evidence part of `bench control`: how fast entries are made, proofs made and verified."""

from __future__ import annotations

import random
import time
from ipaddress import ip_address
from typing import Any

from controlplane.enforcement import Flow
from controlplane.entries import UTC_CLOCK, Chain
from controlplane.intent import Intent
from controlplane.lease import Committed, Prepared, Terms
from controlplane.merkle import Tree, leaf_hash, verify_inclusion

BATCH = 512  # entries made at a time, as a full group commit does
PROOFS = 2_000


def measure(entries: int, tree_size: int, seed: int) -> dict[str, Any]:
    """Make and check a chain of `entries`; prove and verify in a tree of `tree_size`."""
    chain = Chain(UTC_CLOCK)
    lines: list[bytes] = []
    events = [event for number in range(BATCH // 2) for event in _page(number)]
    started = time.perf_counter()
    while len(lines) < entries:
        made = chain.lines(events)
        for line in made:
            chain.add(line)
        lines += made
    made_s = time.perf_counter() - started
    reader = Chain(UTC_CLOCK)
    started = time.perf_counter()
    for line in lines:
        reader.check(line)
    checked_s = time.perf_counter() - started
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
        "evidence_entries_per_s": len(lines) / made_s,
        "evidence_entries_checked_per_s": len(lines) / checked_s,
        "proof_tree_entries": tree_size,
        "proof_bytes": max(32 * len(proof) for proof in proofs),
        "proofs_made_per_s": len(proofs) / proved_s,
        "proofs_verified_per_s": len(proofs) / verified_s,
    }


def _page(number: int) -> tuple[Prepared, Committed]:
    terms = Terms(
        lease_id=f"{number:016x}",
        session_id=f"00000000-0000-4000-8000-{number:012x}",
        cause="PAGE",
        tenant="operator",
        ue=f"ue{number}",
        aisi="bench.text-generation",
        anchor="edge1",
        flows=(
            Flow(ip_address("10.45.0.1"), ip_address("198.18.0.1")),
            Flow(ip_address("fd00:45::1"), ip_address("fd00:a151::1")),
        ),
        epoch=1,
        qos_profile="QOS_E",
        cell="gnb1",
        downlink_bps=0,
        uplink_bps=0,
        priority_level=8,
        preemptible=True,
        intent=Intent(task="text-generation"),
    )
    now_ns = time.time_ns()
    return Prepared(terms, now_ns + 1), Committed(terms.lease_id, now_ns + 2)
