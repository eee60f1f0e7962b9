"""Any history: everything that can be asked and can happen, interleaved wherever there is a wait.

Work stops on its way to the disk, to the kernel and to anchors, until a rule lets it on, in any
order and with any outcome. Promises hold at every stop; and whenever all has come to rest, memory,
kernel and log agree, nothing has leaked, and the audit finds nothing.
"""

import asyncio
import json
from collections import Counter, defaultdict
from collections.abc import Coroutine
from typing import Any

from fakes import UES, World, cancelled
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from controlplane.admission import Rates, Resource
from controlplane.answers import Refusal
from controlplane.clock import NS_PER_MS, parse_rfc3339
from controlplane.controller import Settings
from controlplane.enforcement import EnforcementError
from controlplane.fleet import FleetError
from controlplane.lease import Lease, State
from controlplane.parties import AnchorRefusedError
from controlplane.policy import Policy
from controlplane.store import StoreError

CATALOGUE = """
qos_profiles:
  - {name: QOS_E}
  - {name: QOS_G, five_qi: 4, guaranteed_downlink_bps: 4, guaranteed_uplink_bps: 1}
  - {name: QOS_P, five_qi: 4, guaranteed_downlink_bps: 2, priority_level: 2,
     preemption_capability: true}
services:
  - {aisi: chat, task: text-generation, model: m, address4: 198.18.0.1, address6: "fd00:a151::1"}
  - {aisi: write, task: text-generation, model: m, address4: 198.18.0.2, address6: "fd00:a151::2"}
  - {aisi: ears, task: automatic-speech-recognition, model: m, address4: 198.18.0.3,
     address6: "fd00:a151::3"}
anchors:
  - {name: edge1, region: north, trust_tier: 3, slots: 2, cost: 0, n6_downlink_bps: 6,
     hosts: [{aisi: chat, service_time_ms: 1}, {aisi: ears, service_time_ms: 1}]}
  - {name: edge2, region: south, trust_tier: 3, slots: 2, cost: 2,
     hosts: [{aisi: chat, service_time_ms: 1}, {aisi: ears, service_time_ms: 1}]}
  - {name: cloud, region: south, trust_tier: 1, slots: 1, cost: 9,
     hosts: [{aisi: write, service_time_ms: 1}]}
"""
CELLS = {"gnb1": Rates(8, 8), "gnb2": Rates(5, 2)}
ANCHORS = ("edge1", "edge2", "cloud")
TASKS = {"chat": "text-generation", "ears": "automatic-speech-recognition"}
QUOTA = 3  # sessions of the clinic
POLICIES = [
    Policy(max_sessions=QUOTA),
    Policy(max_sessions=QUOTA, regions=("south",)),
    Policy(max_sessions=QUOTA, tasks=("text-generation",)),
]
# Work may be held up for so long before the audit had reason to complain.
PATIENCE_MS = 180
SHORT_MS = 60  # of a lease that lived no longer the counts may never have been read

ues = st.sampled_from(UES[:4])
services = st.sampled_from(sorted(TASKS))
profiles = st.sampled_from(["QOS_E", "QOS_E", "QOS_G", "QOS_P"])
durations = st.sampled_from([720, 1_500, 60_000])
anchors = st.sampled_from(ANCHORS)
REFUSED = (Refusal, StoreError, EnforcementError, FleetError, asyncio.CancelledError)


class AnyHistory(RuleBasedStateMachine):
    """Whatever happens in whatever order, the promises hold after every step."""

    @initialize(sessions=st.integers(0, 4))
    def begin(self, sessions: int) -> None:
        self.world = World(
            catalogue_text=CATALOGUE,
            cells=CELLS,
            tenants={"clinic": POLICIES[0]},
            settings=Settings(prepare_ms=600, drain_ms=720),
        )
        self.world.__enter__()
        self.tasks: list[asyncio.Task[Any]] = []
        self.held_ms = 0
        self.cut_off: set[str] = set()  # leases whose drain a crash kept from the kernel
        for ue in UES[:sessions]:
            self.do(self.world.page(ue, duration_ms=1_500))
        self.come_to_rest()
        self.shut(True)

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        try:
            self.come_to_rest()
            last_ns = max((held.deadline_ns for held in self.world.ledger.live()), default=0)
            self.world.run(self.world.sleep((last_ns - self.world.clock.now) / NS_PER_MS + 1_000))
            assert not self.world.enforcer.steering()
            assert not list(self.world.ledger.live())
            self.comes_to_rest()
        finally:
            self.world.close()

    # How things go on

    def shut(self, shut: bool) -> None:
        world = self.world
        for gate in (world.store.gate, world.enforcer.gate, world.gateway.gate):
            if shut:
                gate.shut = True
            else:
                gate.open()

    def do(self, work: Coroutine[Any, Any, Any]) -> None:
        self.tasks.append(self.world.loop.create_task(work))
        self.world.loop.settle()
        self.reap()

    def reap(self) -> None:
        for task in self.tasks:
            if task.done() and not task.cancelled() and task.exception() is not None:
                assert isinstance(task.exception(), REFUSED), task.exception()
        self.tasks = [task for task in self.tasks if not task.done()]

    def come_to_rest(self) -> None:
        """Let everything on, with success, until nothing is under way."""
        world = self.world
        self.shut(False)
        self.held_ms = 0
        for _ in range(100):
            world.loop.settle()
            self.reap()
            if not self.tasks and not world.keeper._tasks:
                break
            world.run(world.sleep(1))
        assert not self.tasks, "somebody waits for ever"
        world.run(world.sleep(25))  # acknowledgements, repairs
        world.loop.settle()

    def session_id(self, which: int) -> str:
        sessions = self.world.ledger.sessions()
        return sessions[which % len(sessions)].session_id if sessions else "none"

    # What is asked

    @rule(
        ue=ues,
        aisi=services,
        profile=profiles,
        duration_ms=durations,
        tenant=st.sampled_from(["default", "clinic"]),
        key=st.sampled_from([None, None, "k1", "k2"]),
    )
    def page(
        self, ue: str, aisi: str, profile: str, duration_ms: int, tenant: str, key: str | None
    ) -> None:
        asked = {"task": TASKS[aisi], "qosProfile": profile, "duration_ms": duration_ms}
        self.do(self.world.page(ue, tenant=tenant, key=key, **asked))

    @rule(ue=ues, profile=st.sampled_from(["QOS_G", "QOS_P"]), duration_ms=durations)
    def qos(self, ue: str, profile: str, duration_ms: int) -> None:
        self.do(self.world.qos(ue, profile, duration_ms=duration_ms))

    @rule(which=st.integers(0, 9), where=st.sampled_from([None, "better", *ANCHORS]))
    def relocate(self, which: int, where: str | None) -> None:
        self.do(self.world.plane.relocator.relocate(self.session_id(which), where))

    @rule(which=st.integers(0, 9), more_ms=durations)
    def extend(self, which: int, more_ms: int) -> None:
        self.do(self.world.controller.extend(self.session_id(which), more_ms))

    @rule(which=st.integers(0, 9))
    def release(self, which: int) -> None:
        self.do(self.world.controller.release(self.session_id(which)))

    @precondition(lambda self: self.tasks)
    @rule(which=st.integers(0, 9))
    def client_gives_up(self, which: int) -> None:
        self.tasks[which % len(self.tasks)].cancel()
        self.world.loop.settle()
        self.reap()

    # What happens

    @rule(ue=ues, cell=st.sampled_from(["gnb1", "gnb2"]))
    def ue_moves(self, ue: str, cell: str) -> None:
        self.do(self.world.keeper.moved(ue, cell))

    @rule(
        anchor=anchors,
        load=st.sampled_from([0.0, 0.5, 1.0]),
        boot_id=st.sampled_from(["first", "first", "second"]),
    )
    def heartbeat(self, anchor: str, load: float, boot_id: str) -> None:
        self.do(self.world.heartbeat(anchor, load=load, boot_id=boot_id))

    @rule(anchor=anchors, drains=st.booleans())
    def anchor_drains_or_comes_back(self, anchor: str, drains: bool) -> None:
        fleet = self.world.ledger.fleet
        described = fleet.anchor(anchor)
        assert described is not None
        events = fleet.drain(anchor) if drains else fleet.register(described, "operator")
        self.do(self.world.keeper.record(events))

    @rule(policy=st.sampled_from(POLICIES), rarely=st.integers(0, 3))
    def policy_changes(self, policy: Policy, rarely: int) -> None:
        if not rarely:
            self.do(self.world.keeper.set_policy("clinic", policy))

    @rule(turns=st.integers(1, 8))
    def goes_on(self, turns: int) -> None:
        world = self.world
        for _ in range(turns):
            for gate in (world.gateway.gate, world.store.gate, world.enforcer.gate):
                if gate.waiting:
                    gate.let()
                    world.loop.settle()
                    break
        self.reap()

    @rule(works=st.booleans())
    def disk(self, works: bool) -> None:
        if self.world.store.gate.waiting:
            self.world.store.gate.let(None if works else StoreError("full"))
            self.world.loop.settle()
            self.reap()

    @rule(works=st.booleans())
    def kernel(self, works: bool) -> None:
        if self.world.enforcer.gate.waiting:
            self.world.enforcer.gate.let(None if works else EnforcementError("no"))
            self.world.loop.settle()
            self.reap()

    @rule(which=st.integers(0, 3), says=st.sampled_from(["yes", "yes", "no", "refuses"]))
    def an_anchor_answers(self, which: int, says: str) -> None:
        waiting = self.world.gateway.gate.waiting
        if waiting:
            answer = AnchorRefusedError("nobody") if says == "refuses" else says == "yes"
            self.world.gateway.gate.let(answer, which % len(waiting))
            self.world.loop.settle()
            self.reap()

    @rule(
        ms=st.sampled_from([1, 60, 120, 720, 1_500, 61_000]),
        alive=st.sampled_from([ANCHORS, ANCHORS, ("edge1", "edge2"), ("edge2",), ()]),
    )
    def time_passes(self, ms: int, alive: tuple[str, ...]) -> None:
        """Meanwhile some anchors say that they live."""
        world = self.world
        if self.held_ms + ms > PATIENCE_MS:
            self.come_to_rest()
            beating = world.loop.create_task(world.heartbeats(*alive))
            world.run(world.sleep(ms))
            world.run(cancelled(beating))
            self.shut(True)
        else:
            self.held_ms += ms
            world.run(world.sleep(ms))

    @rule(ms=st.sampled_from([1, 900]), rarely=st.integers(0, 3))
    def crash(self, ms: int, rarely: int) -> None:
        world = self.world
        if rarely:
            return
        world.run(world.crash())
        self.tasks, self.held_ms = [], 0
        world.clock.advance(ms)
        world.run(world.start())
        draining = {h.terms.lease_id for h in world.ledger.live() if h.state is State.DRAINING}
        self.cut_off |= draining - world.enforcer.drains().keys()
        self.shut(True)

    @rule()
    def comes_to_rest(self) -> None:
        self.come_to_rest()
        self.agreed()
        self.shut(True)

    # What holds at every instant

    @invariant()
    def promises(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        failed = world.controller.committer._failed
        assert failed is None, failed
        self.nothing_is_enforced_that_is_not_granted()
        live = list(world.ledger.live())
        self.nothing_is_granted_twice(live)
        sessions = [(session.ue, session.aisi) for session in world.ledger.sessions()]
        assert len(sessions) == len(set(sessions))
        committed = [h.terms.session_id for h in live if h.state is State.COMMITTED]
        assert len(committed) == len(set(committed))

    def nothing_is_enforced_that_is_not_granted(self) -> None:
        """By the log alone, as somebody else reads it."""
        world, until = self.world, dict[str, int]()
        for line in world.lines():
            entry = json.loads(line)
            if entry["type"] in ("Committed", "Renewed"):
                until[entry["lease_id"]] = parse_rfc3339(entry["until"])
        for lease_id, expires_ns in world.enforcer.steering().items():
            assert world.clock.to_unix_ns(expires_ns) <= until[lease_id]

    def nothing_is_granted_twice(self, live: list[Lease]) -> None:
        taken = self.taken(live)
        for anchor in self.world.catalogue.anchors:
            assert taken[Resource.ANCHOR_SLOTS, anchor.name] <= anchor.slots
            most = anchor.n6_downlink_bps
            assert most is None or taken[Resource.N6_DOWNLINK, anchor.name] <= most
        for name, cell in CELLS.items():
            for resource, rate in (
                (Resource.CELL_DOWNLINK, cell.downlink_bps),
                (Resource.CELL_UPLINK, cell.uplink_bps),
            ):
                assert rate is not None
                assert taken[resource, name] <= rate

    def taken(self, live: list[Lease]) -> Counter[tuple[Resource, str]]:
        """What live leases hold, counted anew."""
        taken: Counter[tuple[Resource, str]] = Counter()
        rates: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
        ue_of = {}
        for held in live:
            terms = held.terms
            if terms.anchor is not None:
                taken[Resource.ANCHOR_SLOTS, terms.anchor] += 1
                taken[Resource.N6_DOWNLINK, terms.anchor] += terms.downlink_bps
                taken[Resource.N6_UPLINK, terms.anchor] += terms.uplink_bps
            rates[terms.session_id].append((terms.downlink_bps, terms.uplink_bps))
            ue_of[terms.session_id] = terms.ue
        for session_id, some in rates.items():
            cell = self.world.controller.cell(ue_of[session_id])
            assert cell is not None
            taken[Resource.CELL_DOWNLINK, cell] += max(down for down, _ in some)
            taken[Resource.CELL_UPLINK, cell] += max(up for _, up in some)
        return taken

    # What holds when all has come to rest

    def agreed(self) -> None:
        world, now = self.world, self.world.clock.now
        live = list(world.ledger.live())
        by_state = {
            state: {
                held.terms.lease_id: held
                for held in live
                if held.state is state and held.deadline_ns > now
            }
            for state in State
        }
        steering = world.enforcer.bindings()
        assert steering == {
            lease_id: held.binding() for lease_id, held in by_state[State.COMMITTED].items()
        }
        draining = {lease_id: h.deadline_ns for lease_id, h in by_state[State.DRAINING].items()}
        kept = world.enforcer.drains()
        assert kept.items() <= draining.items()
        assert draining.keys() - kept.keys() <= self.cut_off
        taken, pools = self.taken(live), world.ledger.pools
        for resource in Resource:
            for where in (*ANCHORS, *CELLS):
                assert pools.used(resource, where) == taken[resource, where], (resource, where)
        sessions = Counter(session.tenant for session in world.ledger.sessions())
        for tenant in ("default", "clinic"):
            assert world.ledger.held_by(tenant).sessions == sessions[tenant]
        assert sessions["clinic"] <= QUOTA
        assert not world.controller.locks._queues, "a lock is held by nobody"
        self.audit()

    def audit(self) -> None:
        world = self.world
        entries = [json.loads(line) for line in world.lines()]
        begun = {e["lease_id"]: parse_rfc3339(e["at"]) for e in entries if e["type"] == "Committed"}
        for problem in world.verdict().problems:
            assert problem.index is not None
            entry = entries[problem.index]
            if problem.rule == "closing-counts":
                lived_ns = parse_rfc3339(entry["at"]) - begun[entry["lease_id"]]
                if lived_ns < SHORT_MS * NS_PER_MS:
                    continue
            raise AssertionError(str(problem))


AnyHistory.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestAnyHistory = AnyHistory.TestCase
