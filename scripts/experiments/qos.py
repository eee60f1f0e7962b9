"""The QoS experiment: are QoS flows kept to while eight greedy connections congest their cell?

Four UEs in one cell. One has a GBR flow that sends at its GFBR, one a GBR flow that would exceed
its MFBR, one a flow of small packets of 5QI 80; the fourth fills the cell with TCP, best effort. In
the arm `qos` each page asks for its QoS profile; in the arm `none`, the negative control, all of
them have best effort, and what is guaranteed nobody must not be had. Downlink and uplink apart.
"""

import itertools
from dataclasses import asdict, dataclass, replace
from typing import Any

from controlplane.catalogue import Catalogue
from controlplane.five_qi import FIVE_QIS
from scripts.experiments import common
from scripts.experiments.common import Common
from scripts.records import write_qos
from scripts.testbed import Testbed
from topologies.endpoints import congestion
from topologies.endpoints.congestion import GreedyStreams, PacedFlow, Records
from topologies.hosts import Ue
from topologies.spec import UesSpec

ARMS = ("qos", "none")
DIRECTIONS = ("downlink", "uplink")
WARM_UP_S = 1.5
SLACK_S = 60
FULL_BYTES, SMALL_BYTES = 1_500, 200  # of IP packets
FIRST_PORT, STREAM_PORT = 9_000, 9_100
VIDEO, LOW_LATENCY, BEST_EFFORT = "QOS_EXPERIMENT_GBR", "QOS_EXPERIMENT_80", "QOS_EXPERIMENT_BE"
# Of the cell, in hundredths: what is guaranteed and what is allowed each GBR flow, and what the one
# that would exceed it and the flow of small packets send.
GFBR, MFBR, EXCESS, SMALL = 20, 24, 36, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(Common):
    """Options of this experiment, beside those of all."""

    cell_mbps: int
    streams: int
    seconds: int  # of each arm and direction
    rounds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowPlan:
    """A measured flow: whose, under which profile, at which rate, and what it may expect."""

    number: int
    name: str
    profile: str
    five_qi: int
    rate_bps: int
    ip_bytes: int
    gfbr_bps: int | None
    mfbr_bps: int | None
    packet_delay_budget_ms: int


def flow_plans(cell_bps: int) -> tuple[FlowPlan, ...]:
    """Return the measured flows in a cell of this capacity."""
    part = cell_bps // 100
    rates: dict[str, Any] = {"gfbr_bps": GFBR * part, "mfbr_bps": MFBR * part}
    video = {"profile": VIDEO, "five_qi": 4, "ip_bytes": FULL_BYTES, **rates}
    small = {"profile": LOW_LATENCY, "five_qi": 80, "ip_bytes": SMALL_BYTES}
    return tuple(
        FlowPlan(
            number=number,
            rate_bps=share * part,
            packet_delay_budget_ms=FIVE_QIS[described["five_qi"]].packet_delay_budget_ms,
            name=name,
            **described,
        )
        for number, (name, share, described) in enumerate(
            (
                ("gbr at GFBR", GFBR, video),
                ("gbr above MFBR", EXCESS, video),
                ("5QI 80", SMALL, {**small, "gfbr_bps": None, "mfbr_bps": None}),
            )
        )
    )


def with_profiles(catalogue: Catalogue, cell_bps: int) -> Catalogue:
    """Return the catalogue with the experiment's QoS profiles."""
    part = cell_bps // 100
    rates = {}
    for direction in DIRECTIONS:
        rates[f"guaranteed_{direction}_bps"] = GFBR * part
        rates[f"max_{direction}_bps"] = MFBR * part
    described = catalogue.model_dump()
    described["qos_profiles"] += [
        {"name": VIDEO, "five_qi": 4, **rates},
        {"name": LOW_LATENCY, "five_qi": 80},
        {"name": BEST_EFFORT},
    ]
    return Catalogue.model_validate(described)


def run(options: Options) -> None:
    """Run the experiment and leave raw records and manifest in `options.out`."""
    scenario = common.resolve(options)
    cell = {"downlink_mbps": options.cell_mbps, "uplink_mbps": options.cell_mbps}
    gnbs = tuple(gnb.model_copy(update=cell) for gnb in scenario.spec.gnbs)
    spec = scenario.spec.model_copy(update={"gnbs": gnbs, "ues": UesSpec(count=4)})
    catalogue = with_profiles(scenario.catalogue, options.cell_mbps * 1_000_000)
    scenario = replace(scenario, spec=spec, catalogue=catalogue)
    common.run(
        options,
        scenario,
        lambda testbed: _Run(options, scenario, testbed).run(),
        break_allowed=False,
    )


class _Run:
    def __init__(self, options: Options, scenario: common.Scenario, testbed: Testbed) -> None:
        self._options = options
        self._scenario = scenario
        self._testbed = testbed
        self._plans = flow_plans(options.cell_mbps * 1_000_000)

    def run(self) -> None:
        options, testbed = self._options, self._testbed
        traffic = {
            "cell_bps": options.cell_mbps * 1_000_000,
            "qos_flows": [asdict(plan) for plan in self._plans],
        }
        common.write_manifest(options, "qos", self._scenario, testbed.network, None, traffic)
        parts = list(itertools.product(range(options.rounds), ARMS, DIRECTIONS))
        self._scenario.random.shuffle(parts)
        recorded: list[tuple[int, str, str, Records]] = []
        with common.progress() as bar:
            task = bar.add_task("arms", total=len(parts))
            for number, arm, direction in parts:
                recorded.append((number, arm, direction, self._part(arm, direction)))
                testbed.check_alive()
                bar.advance(task)
        write_qos(options.out, recorded)

    def _part(self, arm: str, direction: str) -> Records:
        """Page for every UE, run the traffic, and release."""
        options, network = self._options, self._testbed.network
        *measured, greedy = network.ues
        profiles = [plan.profile if arm == "qos" else BEST_EFFORT for plan in self._plans]
        answers = [
            self._page(ue, profile)
            for ue, profile in zip(network.ues, [*profiles, BEST_EFFORT], strict=True)
        ]
        uplink = direction == "uplink"
        flows = []
        for ue, plan, answer in zip(measured, self._plans, answers, strict=False):
            ends = self._ends(ue, answer)
            (source, source_address), (sink, sink_address) = ends if uplink else ends[::-1]
            flows.append(
                PacedFlow(
                    number=plan.number,
                    source=source,
                    source_address=source_address,
                    sink=sink,
                    sink_address=sink_address,
                    port=FIRST_PORT + plan.number,
                    rate_bps=plan.rate_bps,
                    ip_bytes=plan.ip_bytes,
                )
            )
        (ue_netns, ue_address), (server, service_address) = self._ends(greedy, answers[-1])
        streams = GreedyStreams(
            streams=options.streams,
            ue=ue_netns,
            ue_address=ue_address,
            server=server,
            service_address=service_address,
            port=STREAM_PORT,
            uplink=uplink,
        )
        records = congestion.run(flows, streams, WARM_UP_S, options.seconds, common.SENDER_CPU)
        for answer in answers:
            self._testbed.request("DELETE", f"/sessions/{answer['sessionId']}")
        return records

    def _page(self, ue: Ue, profile: str) -> dict[str, Any]:
        intent = {
            "task": self._options.task,
            "qosProfile": profile,
            "durationMs": (self._options.seconds + SLACK_S) * 1_000,
        }
        answer: dict[str, Any] = self._testbed.request(
            "POST", "/sessions", {"ue": ue.name, "intent": intent}
        )
        return answer

    def _ends(self, ue: Ue, answer: dict[str, Any]) -> tuple[tuple[str, str], tuple[str, str]]:
        """Return namespace and address of the UE's end and of the service's."""
        version = self._options.ip
        anchor = self._testbed.network.anchors[answer["commit"]["anchor"]]
        address = str(ue.address4 if version == 4 else ue.address6)
        return (ue.netns, address), (anchor.netns, answer["serviceAddress"][f"ipv{version}"])
