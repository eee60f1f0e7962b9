"""`aipaging doctor`: what the kernel and the machine have and lack, and what each lack disables."""

import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from scripts.errors import EXIT_FAILED
from upf.features import Features, probe

PACKAGES = ("mininet", "pyroute2", "pyarrow", "numpy", "cryptography", "starlette", "h2")
GOOD_CLOCKS = ("tsc", "kvm-clock", "arch_sys_counter", "hyperv_clocksource_tsc_page")
CLOCKSOURCE = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")
CLOCK_MONOTONIC_COARSE = 6  # linux/time.h; its resolution is one tick
ENOUGH_MEMORY_BYTES = ENOUGH_DISK_BYTES = 1 << 30
GIB = 1 << 30

NOTHING_RUNS = "no experiment can run"
# feature -> (what it is, whether the main job needs it, what does not work without it)
NOTHING_WAITS = "no first-packet paging; no service waits for a target that is not ready"
KERNEL = {
    "netns": ("network namespaces", True, NOTHING_RUNS),
    "mount_pid_ns": ("mount and PID namespaces", True, NOTHING_RUNS),
    "net_admin": ("links can be changed (CAP_NET_ADMIN)", True, NOTHING_RUNS),
    "veth": ("veth pairs", True, "no emulated network"),
    "bridge": ("bridges", True, "no radio cells"),
    "ipv6": ("IPv6", True, "no emulated network: every host has an IPv6 address"),
    "policy_routing": ("routing by mark, IPv4", True, "no steering"),
    "policy_routing6": ("routing by mark, IPv6", True, "no steering"),
    "htb": ("HTB", True, "no cell capacity, no QoS classes"),
    "netem": (
        "netem",
        False,
        "links are delayed by a relay in user space; Ubuntu has it in linux-modules-extra",
    ),
    "packet_vnet_hdr": ("PACKET_VNET_HDR", False, "no relay: links have a delay by netem only"),
    "nft_inet": ("nf_tables, inet family", True, "no gate"),
    "timeout_map": ("maps with timeouts and counters", True, "no leases in the kernel"),
    "in_place_renewal": (
        "renewal of an element in place (Linux 6.12)",
        False,
        "a lease is renewed by deleting and adding it, in one batch",
    ),
    "tc_bpf": (
        "programs at tc ingress (tcx, Linux 6.6)",
        False,
        "no fast path: each leased packet costs the router about a third more",
    ),
    "conntrack": ("connection tracking in rules", True, "TCP is not pinned to its anchor"),
    "ct_mark": ("connection marks in rules", True, "TCP is not pinned to its anchor"),
    "nfqueue": ("packet queues of user space", False, NOTHING_WAITS),
    "nft_queue": (
        "nf_tables' own `queue` expression",
        False,
        "the xtables target NFQUEUE does its work, where there is that",
    ),
    "nfqueue_target": (
        "xtables target NFQUEUE in nf_tables rules",
        False,
        "nf_tables' `queue` expression does its work, where there is that",
    ),
    "nft_reject": ("`reject` in rules", False, "who is refused a first packet is not told (ICMP)"),
    "nft_bridge": ("nf_tables, bridge family", True, "no guard against spoofing in a cell"),
    "so_timestampns": ("kernel receive timestamps", True, "no delay or outage can be measured"),
    "so_rxq_ovfl": ("count of socket overflows", True, "own drops would look like the network's"),
    "so_rcvbufforce": (
        "receive buffers past rmem_max",
        False,
        "fast probes may overflow their socket: raise net.core.rmem_max",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing looked at."""

    name: str
    ok: bool
    required: bool  # by the main job, `aipaging run relocation`
    found: str
    without: str  # what a lack of it disables


def checks() -> list[Check]:
    """Look at everything; takes about a second."""
    features = probe()
    return [*_machine(), *_software(), *_kernel(features)]


def _machine() -> Iterator[Check]:
    root = os.geteuid() == 0
    yield Check(
        name="root",
        ok=root,
        required=True,
        found="yes" if root else "no: run it with sudo",
        without=f"{NOTHING_RUNS}, and what needs root to be tried is shown as missing",
    )
    cpus = len(os.sched_getaffinity(0))
    yield Check(
        name="CPUs",
        ok=cpus >= 2,
        required=False,
        found=str(cpus),
        without="probe timing is poor: sender and receiver share one core",
    )
    clock = CLOCKSOURCE.read_text().strip() if CLOCKSOURCE.exists() else "unknown"
    yield Check(
        name="clock source",
        ok=clock in GOOD_CLOCKS,
        required=False,
        found=clock,
        without="reading the time is slow, and timestamps less exact",
    )
    tick_s = time.clock_getres(CLOCK_MONOTONIC_COARSE)
    yield Check(
        name="kernel tick",
        ok=tick_s <= 0.004,
        required=False,
        found=f"{1 / tick_s:.0f} Hz",
        without="leases end up to a tick (10 ms) before their deadline",
    )
    memory_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            memory_bytes = int(line.split()[1]) * 1024
    yield Check(
        name="memory available",
        ok=memory_bytes >= ENOUGH_MEMORY_BYTES,
        required=False,
        found=f"{memory_bytes / GIB:.1f} GiB",
        without="long runs may be killed",
    )
    disk_bytes = shutil.disk_usage(Path.cwd()).free
    yield Check(
        name="disk free here",
        ok=disk_bytes >= ENOUGH_DISK_BYTES,
        required=False,
        found=f"{disk_bytes / GIB:.1f} GiB",
        without="raw records of long runs may not fit",
    )


def _software() -> Iterator[Check]:
    yield Check(
        name="Python",
        ok=sys.version_info >= (3, 11),
        required=True,
        found=platform.python_version(),
        without=NOTHING_RUNS,
    )
    try:
        from mininet.net import Mininet  # noqa: F401

        ok, found = True, version("mininet")
    except ImportError as error:
        ok, found = False, str(error)
    yield Check(
        name="Mininet",
        ok=ok,
        required=True,
        found=found,
        without="no emulated network: run scripts/setup",
    )
    for program, required, without in (
        ("mnexec", True, "no emulated network: run scripts/setup as root"),
        ("nft", False, "`bench install` cannot compare with it; `nft list ruleset` by hand"),
    ):
        path = shutil.which(program)
        yield Check(
            name=program,
            ok=path is not None,
            required=required,
            found=path or "not on PATH",
            without=without,
        )


def _kernel(features: Features) -> Iterator[Check]:
    for feature, (name, required, without) in KERNEL.items():
        ok: bool = getattr(features, feature)
        reason = features.reasons.get(feature, "not tried")
        yield Check(
            name=name,
            ok=ok,
            required=required,
            found="yes" if ok else f"no: {reason}",
            without=without,
        )
    delay = "netem" if features.netem else "a relay in user space"
    possible = features.netem or features.packet_vnet_hdr
    yield Check(
        name="link delay",
        ok=possible,
        required=True,
        found=f"by {delay}" if possible else "no: neither netem nor PACKET_VNET_HDR",
        without="no topology with a delayed link, such as the built-in ones",
    )


def show(found: list[Check], console: Console) -> None:
    """Print a table, what is lacking marked, and what that comes to."""
    table = Table(title=f"Linux {platform.release()}, {platform.machine()}", title_justify="left")
    for column in ("", "what", "found", "without it"):
        table.add_column(column)
    for check in found:
        mark = "[green]ok" if check.ok else "[red]NO" if check.required else "[yellow]no"
        table.add_row(mark, check.name, check.found, "" if check.ok else check.without)
    console.print(table)
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    console.print(f"Packages: {packages}")
    lacking = [check.name for check in found if check.required and not check.ok]
    if lacking:
        console.print(f"[red]Experiments cannot run here. Needed and missing: {', '.join(lacking)}")
    else:
        console.print("[green]Experiments can run here.")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(as_json: bool) -> None:
    """Say what this machine has and lacks, and what each lack disables.

    Kernel features are tried in a throwaway network namespace, which leaves nothing behind. Exit
    code 1 if `aipaging run relocation` cannot run here.
    """
    found = checks()
    can_run = all(check.ok for check in found if check.required)
    if as_json:
        report = {
            "can_run": can_run,
            "kernel": platform.release(),
            "packages": {name: version(name) for name in PACKAGES},
            "checks": [asdict(check) for check in found],
        }
        click.echo(json.dumps(report, indent=2))
    else:
        show(found, Console())
    if not can_run:
        raise SystemExit(EXIT_FAILED)
