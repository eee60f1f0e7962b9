"""What a live lease takes of memory, in the kernel and in the process that holds the gate.

In a process of its own, so that nothing but the leases grows there.

    python -m scripts.bench.lease_memory '{"leases": 100000, "versions": [4], ...}'

One line of JSON at the end.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from controlplane.enforcement import Revoke
from scripts.bench import common
from scripts.bench.chain import LEASES_PER_BATCH, Chain, install
from scripts.errors import UserError
from upf.features import Features

METHOD = """\
kernel: change of SUnreclaim + Percpu + VmallocUsed in /proc/meminfo (slab memory of elements, their
counters, the sets' tables) when the leases are installed, and when they are revoked, three times
each: median, min and max, for other work on the machine changes the same sums. process: growth of
RssAnon of a process that does nothing else: Gate and Binding objects. Leases of one family (IPv4)
and of both are measured apart."""

ONE_HOUR_NS = 3600 * 1_000_000_000
TIMEOUT_S = 300
REPEATS = 3
FAMILIES = (("ipv4", (4,)), ("dual_stack", (4, 6)))


def measure(*, leases: int, settle_s: float, features: Features) -> dict[str, Any]:
    """Return bytes per lease, by `ipv4` and `dual_stack`.

    `settle_s` is waited before each look: the kernel frees elements and tables after grace periods.
    """
    figures: dict[str, Any] = {}
    for number in common.steps("memory", len(FAMILIES)):
        name, versions = FAMILIES[number]
        asked = {
            "leases": leases,
            "versions": versions,
            "features": features.to_json(),
            "settle_s": settle_s,
        }
        done = subprocess.run(
            [sys.executable, "-m", "scripts.bench.lease_memory", json.dumps(asked)],
            capture_output=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        if done.returncode != 0:
            raise UserError(f"memory of leases: {done.stderr.decode(errors='replace')[-2000:]}")
        figures[name] = json.loads(done.stdout)
    return {**figures, "leases": leases, "method": METHOD}


def _measure(
    leases: int, versions: Sequence[int], features: dict[str, Any], settle_s: float
) -> dict[str, float]:
    with ExitStack() as undo:
        chain = Chain(leases=leases, features=Features(**features))
        undo.callback(chain.close)
        assert chain.gate is not None
        changes: list[float] = []
        for number in range(REPEATS):
            gc.collect()
            time.sleep(settle_s)
            free, own = _kernel_bytes(), _process_bytes()
            bindings = chain.bindings(
                versions, expires_ns=time.monotonic_ns() + ONE_HOUR_NS, epoch=number + 1
            )
            install(chain.gate, bindings)
            gc.collect()
            time.sleep(settle_s)
            held = _kernel_bytes()
            if number == 0:  # later ones take up what the first left in the process
                process = _process_bytes() - own
            for start in range(0, leases, LEASES_PER_BATCH):
                some = bindings[start : start + LEASES_PER_BATCH]
                chain.gate.apply([Revoke(lease) for lease in some])
            time.sleep(settle_s)
            changes += [(held - free) / leases, (held - _kernel_bytes()) / leases]
    return {
        "kernel_bytes_per_lease": float(np.median(changes)),
        "kernel_bytes_per_lease_min": min(changes),
        "kernel_bytes_per_lease_max": max(changes),
        "process_bytes_per_lease": process / leases,
    }


def show(figures: dict[str, Any]) -> None:
    """Print the figures as a table."""
    rows = [
        (
            name.replace("_", "-"),
            *(f"{value:,.0f}" for value in figures[name].values()),
        )
        for name, _ in FAMILIES
    ]
    columns = ("bytes a lease", "kernel", "min", "max", "process")
    common.print_table(f"Memory of {figures['leases']:,} leases", columns, rows)


def _kernel_bytes() -> int:
    return sum(
        _kibibytes(Path("/proc/meminfo"), name) for name in ("SUnreclaim", "Percpu", "VmallocUsed")
    )


def _process_bytes() -> int:
    return _kibibytes(Path("/proc/self/status"), "RssAnon")


def _kibibytes(path: Path, name: str) -> int:
    """Return a `Name: number kB` of a file, in bytes."""
    for line in path.read_text().splitlines():
        key, _, rest = line.partition(":")
        if key == name:
            return int(rest.split()[0]) * 1024
    raise UserError(f"{path} has no {name}")


def main() -> None:
    """Measure and print."""
    print(json.dumps(_measure(**json.loads(sys.argv[1]))))


if __name__ == "__main__":
    main()
