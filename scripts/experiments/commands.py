"""`aipaging run ...` and `aipaging report`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console

from scripts.cli import LazyGroup
from scripts.errors import EXIT_BAD_INPUT, UserError
from scripts.experiments import common
from topologies.endpoints.probe_plan import MAX_RATE_PPS

Command = TypeVar("Command", bound=Callable[..., Any])

run = LazyGroup(
    name="run",
    commands_at={
        "relocation": (
            "scripts.experiments.commands:relocation",
            "Move live traffic between two anchors; count what is lost.",
        ),
        "handover": (
            "scripts.experiments.commands:handover",
            "Hand UEs over to another gNB, their anchor following; count what is lost.",
        ),
        "continuity": (
            "scripts.experiments.commands:continuity",
            "Move clients that read token streams; count what breaks.",
        ),
        "qos": (
            "scripts.experiments.commands:qos",
            "Congest a cell; compare GBR and low-latency flows with what they were promised.",
        ),
        "expiry": (
            "scripts.experiments.commands:expiry",
            "Let leases expire, the controller dead in half; count what still passes.",
        ),
    },
    help="Run an experiment on a network of its own; leaves a result folder with raw records, "
    "summary.json and report.html.",
)


_RATE = click.option(
    "--rate",
    "rate_pps",
    type=click.IntRange(10, MAX_RATE_PPS),
    default=1_000,
    show_default=True,
    help="Packets per second of each probe flow; 1/rate is the resolution.",
)


def _common_options(command: Command) -> Command:
    for option in reversed(
        (
            click.option(
                "--topology",
                default="two-edge",
                show_default=True,
                help="Built-in name (two-edge, two-edge-far) or a file like those.",
            ),
            click.option(
                "--catalogue",
                type=click.Path(dir_okay=False, path_type=Path),
                default=common.BUILT_IN_CATALOGUE,
                help="Services and anchors; by default topologies/catalogue.yaml.",
            ),
            click.option(
                "--task",
                default="text-generation",
                show_default=True,
                help="What UEs ask for: a Hugging Face pipeline tag.",
            ),
            click.option(
                "--ues",
                type=click.IntRange(1, 250),
                help="How many UEs; by default as the topology says.",
            ),
            click.option(
                "--ip",
                type=click.Choice(["4", "6"]),
                default="4",
                show_default=True,
                help="Version.",
            ),
            click.option("--seed", type=int, default=1, show_default=True, help="Of all choices."),
            click.option(
                "--out",
                required=True,
                type=click.Path(file_okay=False, path_type=Path),
                help="Result folder; must be new or empty.",
            ),
        )
    ):
        command = option(command)
    return command


_RELOCATIONS = click.option(
    "--relocations",
    type=click.IntRange(1, 100_000),
    default=100,
    show_default=True,
    help="Relocations per arm; where clients read streams, each is one of every client.",
)
_BETWEEN = click.option(
    "--between",
    default="edge1,edge2",
    show_default=True,
    help="The two anchors to relocate between.",
)


def _episode_options(command: Command) -> Command:
    for option in reversed(
        (
            click.option(
                "--arms",
                default="none,mbb,bbm",
                show_default=True,
                help="none: nothing moves, the noise floor; mbb: make before break; bbm: break "
                "before make, the control that must lose packets. Interleaved in random order.",
            ),
            _RELOCATIONS,
            _BETWEEN,
            click.option(
                "--window-ms",
                type=click.IntRange(100, 60_000),
                default=300,
                show_default=True,
                help="How long an episode lasts, at least: its packets are those sent in it.",
            ),
        )
    ):
        command = option(command)
    return command


@click.command()
@_common_options
@_RATE
@_episode_options
def relocation(**options: Any) -> None:
    """Move live traffic between two anchors; count what is lost.

    Every UE asks for a service by intent. Then uplink, downlink and request/response probes run
    without pause while one UE after another is relocated, each episode by another arm.

    \b
    The run of the README:
      aipaging run relocation --arms none,mbb,bbm --relocations 100 --rate 5000 --out results/r
    """
    from scripts.experiments import relocation as experiment

    experiment.run(experiment.Options(**_typed(_with_episodes(options, experiment.ARMS))))
    _finish(options["out"])


@click.command()
@_common_options
@_RATE
@_episode_options
@click.option(
    "--gnbs",
    default="gnb1,gnb2",
    show_default=True,
    help="The two gNBs to hand over between.",
)
@click.option(
    "--gap-ms",
    type=click.FloatRange(0, 10_000),
    default=50.0,
    show_default=True,
    help="Without any radio link, in arm bbm.",
)
def handover(**options: Any) -> None:
    """Hand UEs over to another gNB, their anchor following; count what is lost.

    As `run relocation`, but each episode begins with a handover. In arm mbb both radio links are
    up, and the UPF switches the UE's path in one step; in arm bbm the old link is lost before the
    new one is there.

    \b
    Example:
      aipaging run handover --relocations 100 --rate 5000 --ues 1 --out results/handover
    """
    from scripts.experiments import handover as experiment
    from scripts.experiments.relocation import ARMS

    gnbs = _two_names(options.pop("gnbs"), "--gnbs", "gNBs, as in gnb1,gnb2")
    experiment.run(experiment.Options(gnbs=gnbs, **_typed(_with_episodes(options, ARMS))))
    _finish(options["out"])


def _with_episodes(options: dict[str, Any], known: Sequence[str]) -> dict[str, Any]:
    """Check and split `arms` (`known` are those there are) and `between`."""
    arms = _names(options["arms"])
    for arm in arms:
        if arm not in known:
            raise UserError(
                f"--arms: there is no arm {arm}; there are {', '.join(known)}", EXIT_BAD_INPUT
            )
    between = _two_names(options["between"], "--between", "anchors, as in edge1,edge2")
    return {**options, "arms": arms, "between": between}


@click.command()
@_common_options
@click.option(
    "--arms",
    default="none,drain,bbm",
    show_default=True,
    help="none: no relocation, the noise floor; drain: make before break, connections drain; bbm: "
    "break before make, the control in which streams must break. Interleaved in random order.",
)
@_RELOCATIONS
@_BETWEEN
@click.option(
    "--drain-ms",
    type=click.IntRange(1, 600_000),
    default=2_000,
    show_default=True,
    help="How long connections may go on at the old anchor.",
)
@click.option(
    "--requests",
    type=click.IntRange(1, 10_000),
    default=6,
    show_default=True,
    help="Streams that each client reads in an episode, one after another.",
)
@click.option(
    "--tokens",
    type=click.IntRange(1, 10_000),
    default=10,
    show_default=True,
    help="Of each stream; 20 ms apart.",
)
def continuity(**options: Any) -> None:
    """Move clients that read token streams; count what breaks.

    curl (HTTP/1.1), libcurl (HTTP/2), httpx (both) and the openai library read streams over
    connections that they keep, while their session is relocated. They bring one token throughout
    and know of nothing. Every token is numbered.

    \b
      aipaging run continuity --relocations 100 --out results/c
    """
    from scripts.experiments import continuity as experiment

    experiment.run(experiment.Options(**_typed(_with_episodes(options, experiment.ARMS))))
    _finish(options["out"])


@click.command()
@_common_options
@_RATE
@click.option(
    "--leases",
    type=click.IntRange(1, 100_000),
    default=200,
    show_default=True,
    help="How many leases to let expire.",
)
def expiry(**options: Any) -> None:
    """Let leases expire while probes run; count what passes after a deadline.

    Leases are of random length. In half of the rounds the controller is killed (SIGKILL) right
    after it granted, so that nothing of ours is left to end them: only the kernel is.
    """
    from scripts.experiments import expiry as experiment

    experiment.run(experiment.Options(**_typed(options)))
    _finish(options["out"])


@click.command()
@_common_options
@click.option(
    "--cell-mbps",
    type=click.IntRange(10, 1_000),
    default=100,
    show_default=True,
    help="What the cell carries in each direction.",
)
@click.option(
    "--streams",
    type=click.IntRange(1, 64),
    default=8,
    show_default=True,
    help="Greedy TCP connections that fill it.",
)
@click.option(
    "--seconds",
    type=click.IntRange(2, 3_600),
    default=10,
    show_default=True,
    help="Of each arm and direction.",
)
@click.option(
    "--rounds", type=click.IntRange(1, 1_000), default=1, show_default=True, help="Of all arms."
)
def qos(**options: Any) -> None:
    """Congest a cell; compare QoS flows with what they were promised.

    Four UEs in one cell: a GBR flow at its GFBR, one that would exceed its MFBR, small packets of
    5QI 80, and greedy TCP. Arm qos: each with its QoS profile. Arm none: all with best effort, the
    control in which nothing may be kept. Downlink and uplink. --rate and --ues have no effect here.

    \b
    Example:
      aipaging run qos --seconds 20 --rounds 5 --out results/qos
    """
    from scripts.experiments import qos as experiment

    experiment.run(experiment.Options(**_typed(options)))
    _finish(options["out"])


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
def report(folder: Path) -> None:
    """Make summary.json, plots and report.html in FOLDER again, from its raw records alone."""
    _finish(folder)


def _finish(folder: Path) -> None:
    """Analyse, report, and end with the table and where the report is."""
    from scripts.analysis import analyse
    from scripts.records import ResultFolderError
    from scripts.report import build_report
    from scripts.summary_table import render

    with common.console.status("analysing the records"):
        try:
            summary = analyse(folder)
            report_file = build_report(folder)
        except ResultFolderError as error:
            raise UserError(str(error), EXIT_BAD_INPUT) from error
    console = Console()
    console.print(render(summary))
    for problem in summary.get("probe", summary)["problems"]:
        console.print(f"Beware: {problem}.", style="yellow", highlight=False)
    console.print(f"report: {report_file}", highlight=False, soft_wrap=True)


def _names(text: str) -> tuple[str, ...]:
    """Split a list at its commas; each name once, in order."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _two_names(text: str, option: str, what: str) -> tuple[str, str]:
    names = _names(text)
    if len(names) != 2:
        raise UserError(f"{option}: name two different {what}", EXIT_BAD_INPUT)
    return names[0], names[1]


def _typed(options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "ip": int(options["ip"])}
