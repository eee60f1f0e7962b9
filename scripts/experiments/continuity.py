"""The continuity experiment: what clients that read token streams see of a relocation.

Episodes follow one another, the arms in random order within each round. In an episode the clients
of one UE (they take turns) start afresh and read stream after stream over connections that they
keep, while their session is relocated, or in arm `none` left alone. Arms: `none` (the noise floor),
`drain` (make-before-break; connections finish at the old anchor, which tells the clients to connect
anew), `bbm` (break-before-make, the negative control: streams must break).

All episodes of a UE are one session, and its clients bring the token of its first lease throughout.
"""

import importlib.util
import json
import subprocess
import sys
import time
from dataclasses import dataclass, fields
from typing import Any

from scripts.errors import EXIT_BAD_INPUT, UserError
from scripts.experiments import common
from scripts.experiments.common import Common
from scripts.records import Episode, StreamRequest, Token, write_episodes, write_streams
from scripts.testbed import Testbed
from topologies.hosts import Ue

ARMS = ("none", "drain", "bbm")
LEAD_S = (0.0, 0.4)  # an episode's relocation begins so long after all clients read
EPISODE_S = 5.0  # what an episode takes beside its streams, at most, in the long run
SLACK_S = 60
TOKEN_INTERVAL_MS = 20  # of the anchors
NEEDS = ("h2", "httpx2", "openai", "pycurl")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(Common):
    """Options of this experiment, beside those of all."""

    arms: tuple[str, ...]
    relocations: int  # per arm
    between: tuple[str, str]  # anchors
    drain_ms: int
    requests: int  # of each client in an episode
    tokens: int  # of each request


def run(options: Options) -> None:
    """Run the experiment and leave raw records and manifest in `options.out`."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"the clients need {', '.join(missing)}: pip install -c constraints.txt '.[clients]'",
            EXIT_BAD_INPUT,
        )
    scenario = common.resolve(options)
    hosting = {anchor.name for anchor in scenario.catalogue.anchors}
    for name in options.between:
        if name not in hosting:
            raise UserError(f"--between: {name} is no anchor of the catalogue", EXIT_BAD_INPUT)
    common.run(
        options,
        scenario,
        lambda testbed: _Run(options, scenario, testbed).run(),
        break_allowed="bbm" in options.arms,
        drain_ms=options.drain_ms,
    )


class _Clients:
    """The program in a UE that runs the clients."""

    def __init__(self, ue: Ue, settings: dict[str, Any]) -> None:
        """`settings`: those of `stream_clients`, which needs `NEEDS` to be imported."""
        command = [sys.executable, "-m", "topologies.endpoints.stream_clients"]
        self._ue = ue
        self._program = ue.popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._say(json.dumps(settings))
        self._hear()

    def begin(self) -> None:
        """Let the clients begin a round; return when each of them reads."""
        self._say("")
        self._hear()

    def outcomes(self) -> list[dict[str, Any]]:
        """Return what became of the round's requests, when the last is over."""
        found: list[dict[str, Any]] = self._hear()
        return found

    def _say(self, line: str) -> None:
        assert self._program.stdin is not None
        self._program.stdin.write(line + "\n")
        self._program.stdin.flush()

    def _hear(self) -> Any:
        assert self._program.stdout is not None
        line = self._program.stdout.readline()
        if not line:
            raise UserError(f"the clients of {self._ue.name} died; what they said is above")
        return json.loads(line)


class _Run:
    def __init__(self, options: Options, scenario: common.Scenario, testbed: Testbed) -> None:
        self._options = options
        self._scenario = scenario
        self._testbed = testbed
        self._at: dict[str, str] = {}  # UE -> anchor
        self._session: dict[str, str] = {}  # UE -> session id
        self._clients: dict[str, _Clients] = {}
        self._requests: list[StreamRequest] = []
        self._tokens: list[Token] = []

    def run(self) -> None:
        options, testbed = self._options, self._testbed
        schedule = common.schedule(
            self._scenario, options.arms, options.relocations, testbed.network
        )
        common.write_manifest(options, "continuity", self._scenario, testbed.network, None)
        streams_s = options.requests * options.tokens * TOKEN_INTERVAL_MS / 1000
        ues = testbed.network.ues[: options.relocations]
        for ue in ues:
            self._start(ue, len(schedule) * (streams_s + EPISODE_S) + SLACK_S)
        episodes = []
        with common.progress() as bar:
            bar_task = bar.add_task("relocating", total=len(schedule))
            for number, (arm, ue_name) in enumerate(schedule):
                episodes.append(self._episode(number, arm, ue_name))
                bar.advance(bar_task)
            testbed.check_alive()
        write_episodes(options.out, episodes)
        write_streams(options.out, self._requests, self._tokens)

    def _start(self, ue: Ue, duration_s: float) -> None:
        """Have a session granted for all episodes, and start the UE's clients."""
        options = self._options
        intent = {"task": options.task, "durationMs": int(duration_s * 1000)}
        answer = self._testbed.request("POST", "/sessions", {"ue": ue.name, "intent": intent})
        self._session[ue.name], self._at[ue.name] = answer["sessionId"], answer["commit"]["anchor"]
        address = answer["serviceAddress"][f"ipv{options.ip}"]
        host = f"[{address}]" if options.ip == 6 else address
        if self._at[ue.name] not in options.between:
            self._relocate(ue.name, options.between[0], break_before_make=False)
        settings = {
            "url": f"http://{host}:{answer['servicePort']}",
            "model": answer["aisi"],
            "token": answer["aist"],
            "requests": options.requests,
            "tokens": options.tokens,
        }
        self._clients[ue.name] = _Clients(ue, settings)

    def _episode(self, number: int, arm: str, ue: str) -> Episode:
        options = self._options
        source = target = self._at[ue]
        instants: dict[str, Any] = {}
        start_ns = time.time_ns()
        self._clients[ue].begin()
        if arm != "none":
            target = next(name for name in options.between if name != source)
            time.sleep(self._scenario.random.uniform(*LEAD_S))
            instants = self._relocate(ue, target, break_before_make=arm == "bbm")
        for outcome in self._clients[ue].outcomes():
            tokens = outcome.pop("tokens")
            names = {field.name for field in fields(StreamRequest)}
            assert {*outcome, "episode"} == names
            self._requests.append(StreamRequest(episode=number, **outcome))
            self._tokens += [
                Token(
                    episode=number,
                    client=outcome["client"],
                    request=outcome["request"],
                    number=token,
                    at_ns=at_ns,
                )
                for token, at_ns in tokens
            ]
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

    def _relocate(self, ue: str, target: str, *, break_before_make: bool) -> dict[str, int]:
        path = f"/sessions/{self._session[ue]}/relocate"
        body = {"target": target, "breakBeforeMake": break_before_make}
        request_ns = time.time_ns()
        answer = self._testbed.request("POST", path, body)
        answered_ns = time.time_ns()
        self._at[ue] = target
        timeline = answer["timeline"]
        return {
            "request_ns": request_ns,
            "prepared_ns": timeline["preparedUnixNs"],
            "committed_ns": timeline["committedUnixNs"],
            "kernel_ack_ns": timeline["enforcedUnixNs"],
            "answered_ns": answered_ns,
            "epoch": answer["commit"]["epoch"],
        }
