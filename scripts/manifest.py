"""The manifest of a run: everything one needs to know to believe, or repeat, its figures."""

import os
import platform
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from controlplane.catalogue import Catalogue
from controlplane.clock import rfc3339
from topologies.endpoints.probe_plan import ProbePlan
from topologies.network import Network
from topologies.spec import TopologySpec
from upf.features import Features

SCHEMA_VERSION = 1
SYSCTLS = (
    "net/core/rmem_max",
    "net/core/wmem_max",
    "net/core/netdev_max_backlog",
    "net/core/netdev_budget",
    "net/ipv4/tcp_congestion_control",
    "net/netfilter/nf_conntrack_max",
    "net/netfilter/nf_conntrack_tcp_loose",
    "kernel/sched_rt_runtime_us",
)


def build(
    *,
    experiment: str,
    seed: int,
    options: dict[str, Any],
    spec: TopologySpec,
    catalogue: Catalogue,
    features: Features,
    network: Network,
    plan: ProbePlan | None,
    traffic: Mapping[str, Any],
) -> dict[str, Any]:
    """Describe a run: the scenario as given and as resolved, and the machine it ran on.

    `plan`: of the probes, if there are any; `traffic`: members that say what else was sent.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "experiment": experiment,
        "seed": seed,
        "started_at": rfc3339(time.time_ns()),
        "options": options,
        "topology": spec.model_dump(mode="json"),
        "catalogue": catalogue.model_dump(mode="json"),
        **({} if plan is None else _probes(plan)),
        **traffic,
        "clock": "all namespaces share one kernel and one CLOCK_REALTIME",
        "network": network.readback,
        "link_delays": network.measure_delays(),
        "software": software(),
        "machine": machine(),
        "features": features.to_json(),
        "sysctls": sysctls(),
    }


def _probes(plan: ProbePlan) -> dict[str, Any]:
    return {
        "rate_pps": plan.rate_pps,
        "payload_bytes": plan.payload_bytes,
        "waiting_time_ms": plan.waiting_time_ms,
        "sites": [asdict(site) for site in plan.sites],
        "flows": [asdict(flow) for flow in plan.flows],
    }


def software() -> dict[str, Any]:
    """Return versions: ours, as a commit if this is a checkout, Python's and every package's."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
        "python": platform.python_version(),
        "packages": {found.name: found.version for found in distributions()},
    }


def machine() -> dict[str, Any]:
    """Return what the figures depend on of this machine."""
    memory_kib = next(
        int(line.split()[1])
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemTotal:")
    )
    clocksource = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")
    return {
        "kernel": platform.release(),
        "kernel_version": platform.version(),
        "architecture": platform.machine(),
        "cpu": cpu_model(),
        "cpus": os.cpu_count(),
        "memory_bytes": memory_kib * 1024,
        "clocksource": clocksource.read_text().strip() if clocksource.exists() else None,
    }


def cpu_model() -> str:
    """Return the CPU's name for itself."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model", "cpu model"):
            return value.strip()
    return platform.processor() or "unknown"


def sysctls() -> dict[str, str | None]:
    """Return machine-wide settings that matter; None where this kernel has no such setting."""
    found = {}
    for name in SYSCTLS:
        path = Path("/proc/sys") / name
        found[name.replace("/", ".")] = path.read_text().strip() if path.exists() else None
    return found


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
