"""`aipaging bench user-plane`: what the user plane costs at scale, and relocation beside others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from scripts.bench import common, forwarding, install, lease_memory, mass_expiry
from scripts.bench.chain import MAX_ANCHORS
from scripts.bench.forwarding import MAX_LEASES, Size
from scripts.bench.switching import comparison
from scripts.bench.switching.comparison import METHODS
from scripts.bench.switching.plot import plot
from scripts.errors import EXIT_BY_SIGNAL, EXIT_FAILED, UserError, require_root
from topologies.isolation import run_isolated
from upf.features import Features, probe

PARTS = ("install", "forwarding", "memory", "mass-expiry", "switch")
FEW_LEASES = 100
"""Against which installing beside many is compared."""
BATCH_LEASES = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How much is measured: the command's options."""

    leases: tuple[int, ...]
    anchors: int
    anchor_leases: int
    install_rounds: int
    rounds: int
    seconds_per_arm: float
    memory_settle_s: float
    expiring: int
    expiries: int
    expiry_rate_pps: int
    expiry_lead_s: float
    methods: tuple[str, ...]
    switches: int
    switch_rate_pps: int
    seed: int

    @property
    def most(self) -> int:
        """The largest number of leases."""
        return max(self.leases)


def measure(parts: tuple[str, ...], options: Options) -> dict[str, Any]:
    """Measure these parts, one after the other; return the figures."""
    features = probe()
    if not (features.timeout_map and features.ct_mark and features.policy_routing6):
        raise UserError("this kernel cannot hold the gate: see aipaging doctor")
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "install": lambda: _install(options, features),
        "forwarding": lambda: _forwarding(options, features),
        "memory": lambda: {
            "memory": lease_memory.measure(
                leases=options.most,
                features=features,
                settle_s=options.memory_settle_s,
            )
        },
        "mass-expiry": lambda: {
            "mass_expiry": mass_expiry.measure(
                leases=2 * options.expiring,
                rate_pps=options.expiry_rate_pps,
                repeats=options.expiries,
                lead_s=options.expiry_lead_s,
                features=features,
            )
        },
        "switch": lambda: _switch(options, features),
    }
    figures: dict[str, Any] = {}
    for part in PARTS:
        if part in parts:
            figures |= measures[part]()
    return figures


def _install(options: Options, features: Features) -> dict[str, Any]:
    live = [FEW_LEASES, max(options.most, FEW_LEASES + 1)]
    found = install.measure(
        live=live,
        rounds=options.install_rounds,
        seed=options.seed,
        features=features,
        batch_leases=min(BATCH_LEASES, options.most),
    )
    few, many = (found["by_live_leases"][str(count)] for count in live)
    names = ("gate_us", "gate_batch_us_per_element", "packed_us", "packed_batch_us_per_element")
    return {
        "install_us": {
            str(count): found["by_live_leases"][str(count)]["gate_us"] for count in live
        },
        "install_ratio": {name: many[name]["p50"] / few[name]["p50"] for name in names},
        "install": found,
    }


def _forwarding(options: Options, features: Features) -> dict[str, Any]:
    sizes = [Size(count) for count in options.leases]
    sizes.append(Size(options.leases[0], marked=True))
    if options.anchors > 1:
        sizes.append(Size(options.anchor_leases, options.anchors))
    found = forwarding.measure(
        sizes=sizes,
        rounds=options.rounds,
        slice_ns=int(options.seconds_per_arm * 1e9),
        seed=options.seed,
        features=features,
    )
    lowest = {
        name: min(one["ratio"]["p50"] for family in families.values() for one in family.values())
        for name, families in found["by_live_leases"].items()
    }
    return {
        "forwarding_ratio": found["ratio"],
        "forwarding_ratio_lowest": lowest,
        "forwarding": found,
    }


def _switch(options: Options, features: Features) -> dict[str, Any]:
    found = comparison.measure(
        methods=options.methods,
        switches=options.switches,
        rate_pps=options.switch_rate_pps,
        seed=options.seed,
        features=features,
    )
    return {"switch": found.pop("methods"), "switching": found}


def show(figures: dict[str, Any]) -> None:
    """Print the figures as tables."""
    if "install" in figures:
        install.show(figures["install"])
        ratios = figures["install_ratio"].items()
        rows = [(name, f"{ratio:.2f}") for name, ratio in ratios]
        few, many = figures["install_us"]
        common.print_table(f"p50 at {many} live leases to {few}", ("figure", "ratio"), rows)
    if "forwarding" in figures:
        forwarding.show(figures["forwarding"])
    if "memory" in figures:
        lease_memory.show(figures["memory"])
    if "mass_expiry" in figures:
        mass_expiry.show(figures["mass_expiry"])
    if "switch" in figures:
        comparison.show({"methods": figures["switch"], **figures["switching"]})


def _parse_leases(_context: click.Context, _option: click.Parameter, text: str) -> tuple[int, ...]:
    try:
        counts = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError as error:
        raise click.BadParameter("give numbers separated by commas, as in 1,1000") from error
    if not all(0 < count <= MAX_LEASES for count in counts):
        raise click.BadParameter(f"each number is from 1 to {MAX_LEASES}")
    return counts


def _number(
    name: str, field: str, default: int, least: int, most: int, text: str
) -> Callable[..., Any]:
    kind = click.IntRange(least, most)
    return click.option(name, field, default=default, show_default=True, type=kind, help=text)


def _seconds(name: str, field: str, default: float, text: str) -> Callable[..., Any]:
    kind = click.FloatRange(0.01, 60)
    return click.option(name, field, default=default, show_default=True, type=kind, help=text)


@click.command()
@click.option(
    "--json",
    "path",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where the figures go; the plot of switches goes beside it, as .svg.",
)
@click.option(
    "--part",
    "parts",
    multiple=True,
    type=click.Choice(PARTS),
    help="Measure this alone; may be given several times.  [default: all]",
)
@click.option(
    "--leases",
    default="1,1000,100000",
    show_default=True,
    callback=_parse_leases,
    help="Numbers of live leases, each in both families; installing and memory at the largest.",
)
@_number("--anchors", "anchors", 64, 1, MAX_ANCHORS, "Of one more arm of forwarding.")
@_number("--anchor-leases", "anchor_leases", 4_096, 1, MAX_LEASES, "Live leases of that arm.")
@_number("--install-rounds", "install_rounds", 200, 2, 5_000, "Of installing.")
@_number("--rounds", "rounds", 100, 3, 1_000, "Of forwarding.")
@_seconds("--seconds-per-arm", "seconds_per_arm", 0.06, "Of forwarding: one arm, once a round.")
@_seconds("--memory-settle", "memory_settle_s", 1.5, "Before each look at the memory in use.")
@_number(
    "--expiring", "expiring", 10_000, 1, 50_000, "Leases that end at once, beside as many others."
)
@_number("--expiries", "expiries", 3, 1, 100, "How often they do.")
@_number("--expiry-rate", "expiry_rate_pps", 40_000, 100, 100_000, "Packets/s through all of them.")
@_seconds("--expiry-lead", "expiry_lead_s", 1.0, "Of traffic before they end, and after.")
@click.option(
    "--method",
    "methods",
    multiple=True,
    type=click.Choice([method.name for method in METHODS]),
    help="Switch by this alone; may be given several times.  [default: all]",
)
@_number("--switches", "switches", 30, 1, 1_000, "Of each method, under each kind of traffic.")
@_number("--switch-rate", "switch_rate_pps", 10_000, 100, 20_000, "Datagrams/s meanwhile.")
@click.option("--seed", default=1, show_default=True, help="Of all that is in random order.")
def command(path: Path, parts: tuple[str, ...], **given: Any) -> None:
    """Measure the user plane: leases at scale, and relocation beside what people use today.

    \b
    install      one COMMIT into the kernel, beside 100 and beside many live leases
    forwarding   packets per second, steered against plain
    memory       of a live lease
    mass-expiry  many leases end at once, beside others that carry traffic
    switch       a service moves: lease, nft, ip route, Open vSwitch, HAProxy, DNS

    All of it happens in namespaces that vanish with it, however it ends; quarter of an hour with
    the defaults. Programs that are not installed are skipped by name.

    \b
    Examples:
      aipaging bench user-plane --json results/user-plane.json
      aipaging bench user-plane --part switch --switches 100 --json results/switch.json

    In the file: forwarding_ratio.<leases>.p50, install_us.<leases>.p50, mass_expiry.lost,
    mass_expiry.overrun_packets, switch.<method>.lost, switch.<method>.outage_ms.p50 and more;
    docs/performance.md explains them.
    """
    require_root("a benchmark of the kernel")
    given["methods"] = given["methods"] or tuple(method.name for method in METHODS)
    options = Options(**given)
    chosen, target = parts or PARTS, path.absolute()
    common.make_folder_of(target)
    status = run_isolated(lambda: _isolated(chosen, options, target))
    if status > EXIT_BY_SIGNAL:
        raise UserError("the benchmark was ended by a signal", status)
    if status != 0:
        raise UserError("the benchmark failed; no figures were written")


def _isolated(parts: tuple[str, ...], options: Options, path: Path) -> int:
    try:
        figures = measure(parts, options)
        show(figures)
        given = {name: value for name, value in asdict(options).items() if name != "seed"}
        common.write_result(
            path,
            benchmark="user-plane",
            seed=options.seed,
            options={"parts": list(parts), **given},
            figures=figures,
        )
        if "switch" in figures:
            plot(path.with_suffix(".svg"), {"methods": figures["switch"]}, options.switch_rate_pps)
    except UserError as error:
        common.console.print(f"error: {error}", style="red", markup=False, highlight=False)
        return EXIT_FAILED
    return 0
