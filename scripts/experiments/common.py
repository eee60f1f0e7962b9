"""What the experiments share: their options, their probe plan, and how they run isolated."""

import os
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from controlplane.catalogue import Catalogue, load_catalogue
from controlplane.controller import Settings
from scripts import manifest
from scripts.errors import EXIT_BAD_INPUT, EXIT_BY_SIGNAL, EXIT_FAILED, UserError, require_root
from scripts.records import MANIFEST_FILE, write_json
from scripts.testbed import NICE, Testbed, check
from topologies.delay_measurement import describe
from topologies.endpoints.probe_plan import Direction, Flow, ProbePlan, Site
from topologies.endpoints.probe_session import ProbeError
from topologies.errors import TopologyError
from topologies.isolation import run_isolated, scratch_dir
from topologies.linux import set_priority
from topologies.network import Network
from topologies.spec import TopologySpec, UesSpec, load_topology
from upf.features import Features, probe

EVIDENCE_FILE = "evidence.jsonl"
STATE_FOLDER = "state"  # of the control plane; there only while a run lasts, or after it failed
STATUS_FILE = "status.json"
FIRST_PORT = 9_000
DRAIN_MS = 1_000  # longer than any stall of the control plane on a busy machine
BUILT_IN_CATALOGUE = Path(__file__).parents[2] / "topologies" / "catalogue.yaml"

# The probes' sender spins: where there are two CPUs it has one to itself.
CPUS = frozenset(os.sched_getaffinity(0))
SENDER_CPU = max(CPUS) if len(CPUS) > 1 else None

console = Console(stderr=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Common:
    """Options of every experiment."""

    topology: str
    catalogue: Path
    task: str
    rate_pps: int = 0  # of the probes, if it has any
    ues: int | None
    ip: int  # 4 or 6
    seed: int
    out: Path


@dataclass(frozen=True, slots=True)
class Scenario:
    """A scenario as resolved: read, checked, and consistent."""

    spec: TopologySpec
    catalogue: Catalogue
    features: Features
    random: random.Random


def resolve(common: Common) -> Scenario:
    """Read and check everything that is given, before anything is made. Raises on bad input."""
    spec = load_topology(common.topology)
    if common.ues is not None:
        spec = spec.model_copy(update={"ues": UesSpec(count=common.ues)})
    catalogue = load_catalogue(common.catalogue)
    check(spec, catalogue)
    if common.out.exists() and (not common.out.is_dir() or any(common.out.iterdir())):
        raise UserError(
            f"{common.out} exists and is not empty: name a new folder with --out", EXIT_BAD_INPUT
        )
    require_root("an experiment")
    return Scenario(spec, catalogue, probe(), random.Random(common.seed))


def run(
    common: Common,
    scenario: Scenario,
    body: Callable[[Testbed], None],
    *,
    break_allowed: bool,
    drain_ms: int = DRAIN_MS,
) -> None:
    """Run `body` on a testbed of its own, in a run that the kernel cleans up. Raises UserError."""
    common.out.mkdir(parents=True, exist_ok=True)
    folder = common.out.resolve()

    def isolated() -> int:
        set_priority(0, NICE)
        os.sched_setaffinity(0, CPUS - {SENDER_CPU})
        try:
            with ExitStack() as stack:
                with console.status("building the network") as status:
                    network = stack.enter_context(Network(scenario.spec, status.update))
                    status.update("starting anchors and the controller")
                    testbed = Testbed(
                        network,
                        scenario.catalogue,
                        scenario.features,
                        scratch_dir(),
                        folder / STATE_FOLDER,
                        settings=Settings(drain_ms=drain_ms, allow_break_before_make=break_allowed),
                    )
                    stack.enter_context(testbed)
                body(testbed)
                write_json(folder / STATUS_FILE, testbed.request("GET", "/status"))
                testbed.export(folder / EVIDENCE_FILE)
            shutil.rmtree(folder / STATE_FOLDER)  # its keys are of no use to a reader of results
        except (UserError, TopologyError, ProbeError) as error:
            console.print(f"error: {error}", style="red", markup=False, highlight=False)
            return EXIT_FAILED
        return 0

    status = run_isolated(isolated)
    if status > EXIT_BY_SIGNAL:
        raise UserError(f"the run was ended by a signal; what it left is in {common.out}", status)
    if status != 0:
        raise UserError(f"the run failed; what it left is in {common.out}")


def write_manifest(
    common: Common,
    experiment: str,
    scenario: Scenario,
    network: Network,
    plan: ProbePlan | None,
    traffic: Mapping[str, Any] | None = None,
) -> None:
    """Write the manifest, before the first packet."""
    options = {name: str(v) if isinstance(v, Path) else v for name, v in asdict(common).items()}
    described = manifest.build(
        experiment=experiment,
        seed=common.seed,
        options=options,
        spec=scenario.spec,
        catalogue=scenario.catalogue,
        features=scenario.features,
        network=network,
        plan=plan,
        traffic=traffic or {},
    )
    write_json(common.out / MANIFEST_FILE, described)
    for line in describe(described["link_delays"]):
        console.print(line, markup=False, highlight=False)


def probe_plan(
    common: Common,
    network: Network,
    answers: dict[str, dict[str, Any]],
    anchors: Sequence[str],
    directions: Sequence[Direction],
    max_duration_s: float,
) -> ProbePlan:
    """Plan one flow per UE and direction, to the service address that each UE was answered.

    `answers`: by UE name, the answer to its page. `anchors` hold the probe's sockets; the one a
    UE was given comes first.
    """
    flows: list[Flow] = []
    for ue in network.ues:
        answer = answers[ue.name]
        given = answer["commit"]["anchor"]
        for direction in directions:
            number = len(flows)
            flows.append(
                Flow(
                    id=number,
                    ue=ue.name,
                    direction=direction,
                    ue_address=str(ue.address4 if common.ip == 4 else ue.address6),
                    ue_port=FIRST_PORT + number,
                    service_address=answer["serviceAddress"][f"ipv{common.ip}"],
                    service_port=FIRST_PORT + number,
                    anchors=(given, *(name for name in anchors if name != given)),
                )
            )
    hosts = [*network.ues, *(network.anchors[name] for name in anchors)]
    return ProbePlan(
        sites=tuple(Site(name=host.name, netns=host.netns) for host in hosts),
        flows=tuple(flows),
        rate_pps=common.rate_pps,
        max_duration_s=max_duration_s,
        sender_cpu=SENDER_CPU,
    )


def schedule(
    scenario: Scenario, arms: Sequence[str], rounds: int, network: Network
) -> list[tuple[str, str]]:
    """Return (arm, UE) by episode: every arm once a round, in random order; UEs take turns."""
    ues = [ue.name for ue in network.ues]
    found: list[tuple[str, str]] = []
    for number in range(rounds):
        shuffled = list(arms)
        scenario.random.shuffle(shuffled)
        found += [(arm, ues[number % len(ues)]) for arm in shuffled]
    return found


def progress() -> Progress:
    """Return a progress bar for long work, on stderr."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )
