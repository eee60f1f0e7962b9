"""The relocation experiment: what moving a live session between two anchors costs in packets.

Probes run without pause while episodes follow one another, the arms in random order within each
round. In an episode one UE (they take turns) is relocated, or in arm `none` left alone; the others
are bystanders. Arms: `none` (the noise floor), `mbb` (make-before-break), `bbm` (break-before-make,
the negative control: it must lose packets).
"""

import time
from dataclasses import dataclass
from typing import Any

from scripts.errors import EXIT_BAD_INPUT, UserError
from scripts.experiments import common
from scripts.experiments.common import Common
from scripts.records import Episode, write_episodes
from scripts.testbed import Testbed
from topologies.endpoints.probe_plan import Direction
from topologies.endpoints.probe_session import ProbeSession

ARMS = ("none", "mbb", "bbm")
SETTLE_MS = 300  # before the first episode
LEAD_MS = (30, 60)  # an episode's relocation begins somewhere in here
TRAIL_MS = 150  # and lasts at least so much longer
SLACK_S = 60
PAGE_SLACK_S = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(Common):
    """Options of this experiment, beside those of all."""

    arms: tuple[str, ...]
    relocations: int  # per arm
    between: tuple[str, str]  # anchors
    window_ms: int  # of an episode


def run(options: Options) -> None:
    """Run the experiment and leave raw records and manifest in `options.out`."""
    scenario = resolve(options)
    common.run(
        options,
        scenario,
        lambda testbed: Relocations(options, scenario, testbed).run(),
        break_allowed="bbm" in options.arms,
    )


def resolve(options: Options) -> common.Scenario:
    """Check the options against topology and catalogue. Raises on bad input."""
    scenario = common.resolve(options)
    hosting = {anchor.name for anchor in scenario.catalogue.anchors}
    for name in options.between:
        if name not in hosting:
            raise UserError(f"--between: {name} is no anchor of the catalogue", EXIT_BAD_INPUT)
    return scenario


class Relocations:
    """One run: pages, probes, and the episodes."""

    name = "relocation"

    def __init__(self, options: Options, scenario: common.Scenario, testbed: Testbed) -> None:
        self._options = options
        self._scenario = scenario
        self._testbed = testbed
        self._at: dict[str, str] = {}  # UE -> anchor
        self._session: dict[str, str] = {}  # UE -> session id

    def run(self) -> None:
        """Run all episodes, with the probes around them."""
        options, testbed = self._options, self._testbed
        schedule = common.schedule(
            self._scenario, options.arms, options.relocations, testbed.network
        )
        duration_s = len(schedule) * options.window_ms / 1000 + SLACK_S
        answers = {ue.name: self._page(ue.name, duration_s) for ue in testbed.network.ues}
        plan = common.probe_plan(
            options, testbed.network, answers, options.between, tuple(Direction), duration_s
        )
        common.write_manifest(options, self.name, self._scenario, testbed.network, plan)
        episodes = []
        with ProbeSession(plan, options.out) as probe, common.progress() as bar:
            bar_task = bar.add_task("relocating", total=len(schedule))
            self._probe = probe
            time.sleep(SETTLE_MS / 1000)
            for number, (arm, ue) in enumerate(schedule):
                episodes.append(self._episode(number, arm, ue))
                bar.advance(bar_task)
                probe.check()
            testbed.check_alive()
            bar.update(bar_task, description="collecting records")
            probe.stop()
        write_episodes(options.out, episodes)

    def _page(self, name: str, duration_s: float) -> dict[str, Any]:
        """Let a UE page by intent, for as long as the experiment takes, and start at `between`."""
        ue = next(ue for ue in self._testbed.network.ues if ue.name == name)
        paged = self._testbed.page(ue, self._options.task)
        answer: dict[str, Any] = paged["answer"]
        session = answer["sessionId"]
        extension = {"requestedAdditionalDuration": int(duration_s) + PAGE_SLACK_S}
        self._testbed.request("POST", f"/sessions/{session}/extend", extension)
        if answer["commit"]["anchor"] not in self._options.between:
            target = {"target": self._options.between[0]}
            answer = self._testbed.request("POST", f"/sessions/{session}/relocate", target)
        self._session[name] = session
        self._at[name] = answer["commit"]["anchor"]
        return answer

    def _episode(self, number: int, arm: str, ue: str) -> Episode:
        """One window of `window_ms`; packets sent in it by or to `ue` are its own."""
        options = self._options
        start_ns = time.time_ns()
        began = time.monotonic()
        source = target = self._at[ue]
        instants: dict[str, Any] = {}
        if arm != "none":
            target = next(name for name in options.between if name != source)
            time.sleep(self._scenario.random.uniform(*LEAD_MS) / 1000)
            instants = self._move(arm, ue, target)
        # A slow relocation gets a longer episode, so that its stragglers are in it.
        ends = max(began + options.window_ms / 1000, time.monotonic() + TRAIL_MS / 1000)
        time.sleep(ends - time.monotonic())
        return Episode(
            episode=number,
            arm=arm,
            ue=ue,
            source=source,
            target=target,
            start_ns=start_ns,
            end_ns=time.time_ns(),
            **instants,
        )

    def _move(self, arm: str, ue: str, target: str) -> dict[str, Any]:
        """Do what the arm is about; return the instants (fields of Episode)."""
        return self._relocate(ue, target, break_before_make=arm == "bbm")

    def _relocate(self, ue: str, target: str, *, break_before_make: bool) -> dict[str, int]:
        """Relocate, then have the downlink sent from the target, as its server would."""
        path = f"/sessions/{self._session[ue]}/relocate"
        body = {"target": target, "breakBeforeMake": break_before_make}
        request_ns = time.time_ns()
        answer = self._testbed.request("POST", path, body)
        answered_ns = time.time_ns()
        self._at[ue] = target
        switched_ns = 0
        for flow in self._probe.plan.flows:
            if flow.ue == ue and flow.direction is Direction.DOWNLINK:
                switched_ns = self._probe.switch_source(flow.id, target).at_ns
        timeline = answer["timeline"]
        return {
            "request_ns": request_ns,
            "prepared_ns": timeline["preparedUnixNs"],
            "committed_ns": timeline["committedUnixNs"],
            "kernel_ack_ns": timeline["enforcedUnixNs"],
            "answered_ns": answered_ns,
            "switched_ns": switched_ns,
            "epoch": answer["commit"]["epoch"],
        }
