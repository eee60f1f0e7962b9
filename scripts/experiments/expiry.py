"""The expiry experiment: does anything pass the gate after a lease's deadline?

Every UE sends and is sent to without pause. Round by round each is granted a lease of random
length, which nobody renews or releases. In half of the rounds the controller is SIGKILLed right
after it granted, so that only the kernel is left to end them; it is started again, on the same
journal, when all of the round's leases are over.
"""

import time
from dataclasses import dataclass, replace
from typing import Any

from controlplane.clock import parse_rfc3339
from scripts.errors import UserError
from scripts.experiments import common
from scripts.experiments.common import Common
from scripts.records import Lease, write_leases
from scripts.testbed import Testbed
from topologies.endpoints.probe_plan import Direction
from topologies.endpoints.probe_session import ProbeSession
from topologies.hosts import Ue

TTL_MS = (200, 1_200)
AFTER_MS = 150  # probes go on past the last deadline of a round, to see what still passes
RESTART_S = 4.0
SLACK_S = 60
DIRECTIONS = (Direction.UPLINK, Direction.DOWNLINK)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(Common):
    """Options of this experiment, beside those of all."""

    leases: int


def run(options: Options) -> None:
    """Run the experiment and leave raw records and manifest in `options.out`."""
    scenario = common.resolve(options)
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
        self._granted: list[Lease] = []

    def run(self) -> None:
        options, testbed = self._options, self._testbed
        ues = testbed.network.ues
        rounds = -(-options.leases // len(ues))
        kills = [number % 2 == 1 for number in range(rounds)]
        self._scenario.random.shuffle(kills)
        # Probes need the service address before the first lease: a first page tells it.
        answers = {ue.name: self._page(ue, TTL_MS[0]) for ue in ues}
        duration_s = rounds * (TTL_MS[1] / 1000 + RESTART_S) + SLACK_S
        anchors = [anchor.name for anchor in self._scenario.catalogue.anchors]
        plan = common.probe_plan(options, testbed.network, answers, anchors, DIRECTIONS, duration_s)
        common.write_manifest(options, "expiry", self._scenario, testbed.network, plan)
        self._sources = {
            flow.ue: (flow.id, flow.anchors[0])
            for flow in plan.flows
            if flow.direction is Direction.DOWNLINK
        }
        with ProbeSession(plan, options.out) as probe, common.progress() as bar:
            self._probe = probe
            bar_task = bar.add_task("leases", total=options.leases)
            for kill in kills:
                bar.advance(bar_task, self._round(ues, kill=kill))
                probe.check()
            testbed.check_alive()
            bar.update(bar_task, description="collecting records")
            probe.stop()
        write_leases(options.out, self._granted)

    def _page(self, ue: Ue, ttl_ms: int) -> dict[str, Any]:
        intent = {"task": self._options.task, "durationMs": ttl_ms}
        body = {"ue": ue.name, "intent": intent}
        answer: dict[str, Any] = self._testbed.request("POST", "/sessions", body)
        return answer

    def _round(self, ues: list[Ue], *, kill: bool) -> int:
        """Grant each UE a lease, perhaps kill the controller, and wait until all are over."""
        self._wait_until_none_is_live()
        first = len(self._granted)
        for ue in ues[: self._options.leases - first]:
            ttl_ms = self._scenario.random.randint(*TTL_MS)
            requested_ns = time.time_ns()
            answer = self._page(ue, ttl_ms)
            commit, timeline = answer["commit"], answer["timeline"]
            self._granted.append(
                Lease(
                    lease=len(self._granted),
                    ue=ue.name,
                    lease_id=commit["leaseId"],
                    requested_ns=requested_ns,
                    kernel_ack_ns=timeline["enforcedUnixNs"],
                    deadline_ns=parse_rfc3339(commit["expiresAt"]),
                    ttl_ms=ttl_ms,
                    controller_killed=False,
                )
            )
            self._send_downlink_from(ue.name, commit["anchor"])
        leases = self._granted[first:]
        if kill:
            killed_ns = self._testbed.kill_controller()
            for number, lease in enumerate(leases, start=first):
                # One that was over before the controller was counts as a live controller's.
                killed = lease.deadline_ns > killed_ns
                self._granted[number] = replace(
                    lease, controller_killed=killed, killed_ns=killed_ns if killed else 0
                )
        last_ns = max(lease.deadline_ns for lease in leases)
        time.sleep(max(0, last_ns - time.time_ns()) / 1e9 + AFTER_MS / 1000)
        if kill:
            self._testbed.start_controller()
        return len(leases)

    def _wait_until_none_is_live(self) -> None:
        """The controller frees a session within moments of its deadline."""
        until = time.monotonic() + 5
        while self._testbed.request("GET", "/sessions")["sessions"]:
            if time.monotonic() > until:
                raise UserError("the controller did not end leases that are overdue")
            time.sleep(0.005)

    def _send_downlink_from(self, ue: str, anchor: str) -> None:
        flow, source = self._sources[ue]
        if anchor != source:
            self._probe.switch_source(flow, anchor)
            self._sources[ue] = (flow, anchor)
