"""The testbed: an emulated network with its anchors and its controller running in it."""

import json
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import httpx

from controlplane.catalogue import Catalogue
from controlplane.configfile import ConfigError
from controlplane.controller import Settings
from controlplane.parties import Subscription
from scripts.errors import UserError
from scripts.evidence_files import CHECKPOINT_FILE, VKEY_FILE, write
from scripts.serve import write_config
from scripts.testbed_config import CONTROL_PORT, serve_config, with_n6_capacity
from topologies.hosts import Host, Ue
from topologies.linux import set_priority
from topologies.network import Network
from topologies.spec import TopologySpec
from upf.features import Features

OPERATOR_SOCKET = "controller.sock"
# The probes' load shares the machine's few cores with the control plane, as it would not outside
# an emulation. Controller and anchors go before it.
NICE = -15
# The network is emulated on few cores: an anchor's silence of 200 ms may be the machine's.
FAILURE_DETECTION_MS = 2_000
START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 10.0


def check(spec: TopologySpec, catalogue: Catalogue) -> None:
    """Raise ConfigError if the catalogue names anchors that the topology does not have."""
    have = {anchor.name for anchor in spec.anchors}
    for anchor in catalogue.anchors:
        if anchor.name not in have:
            raise ConfigError(
                f"the catalogue has an anchor {anchor.name}; topology {spec.name} has "
                f"{', '.join(sorted(have))}"
            )


class Testbed:
    """The programs on an emulated network; a context manager.

    `folder` is for inputs, sockets and logs; `state` is the control plane's own, on a real disk:
    its store and keys. Raises UserError with a program's own words if one does not start or has
    died.
    """

    def __init__(
        self,
        network: Network,
        catalogue: Catalogue,
        features: Features,
        folder: Path,
        state: Path,
        *,
        settings: Settings | None = None,
        failure_detection_ms: int = FAILURE_DETECTION_MS,
        subscriptions: tuple[Subscription, ...] = (),
    ) -> None:
        """`subscriptions`: of every UE."""
        self.catalogue = with_n6_capacity(
            catalogue, (anchor.spec for anchor in network.anchors.values())
        )
        self.network = network
        self._features = features
        self._folder = folder
        self.state = state
        self._settings = settings or Settings()
        self._failure_detection_ms = failure_detection_ms
        self._subscriptions = subscriptions
        self._stack = ExitStack()
        self._programs: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._write_inputs()
            self.start_controller()
            stack.callback(self._stop_controller)
            for anchor in self.catalogue.anchors:
                for hosting in anchor.hosts:
                    service = self.catalogue.service(hosting.aisi)
                    self.network.add_service(anchor.name, service.address4, service.address6)
            self.start_anchors(*(anchor.name for anchor in self.catalogue.anchors))
            self.operator = stack.enter_context(
                httpx.Client(
                    transport=httpx.HTTPTransport(uds=str(self.operator_socket)),
                    base_url="http://controller",
                    timeout=REQUEST_TIMEOUT_S,
                    trust_env=False,
                )
            )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def operator_socket(self) -> Path:
        """The operator's way to the controller."""
        return self._folder / OPERATOR_SOCKET

    @property
    def core_url(self) -> str:
        """The UEs' way to the controller."""
        return f"http://{self.network.core.address4}:{CONTROL_PORT}"

    # The controller

    def start_controller(self) -> None:
        """Start the controller and wait until it serves."""
        command = [sys.executable, "-m", "scripts.cli", "serve", str(self._folder / "serve.yaml")]
        self._launch("controller", self.network.core, command)
        self._await_start("controller")

    def kill_controller(self) -> int:
        """SIGKILL the controller; return the Unix time in ns at which it was dead."""
        return self._kill("controller")

    def request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Ask the controller as the operator; return the JSON of its answer.

        Raises UserError with the problem's detail if it refuses.
        """
        answer = self._ask(method, path, body)
        return answer.json() if answer.content else None

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> httpx.Response:
        try:
            answer = self.operator.request(method, path, json=body)
        except httpx.HTTPError as error:
            words = self._words("controller")
            raise UserError(f"the controller does not answer ({error}){words}") from error
        if answer.is_error:
            detail = answer.json().get("detail", answer.text)
            raise UserError(f"{method} {path}: {answer.status_code}: {detail}")
        return answer

    def export(self, file: Path) -> None:
        """Write the evidence log as it is now to a file, checkpoint and public key beside it."""
        key, note = self._ask("GET", "/evidence/key"), self._ask("GET", "/evidence/checkpoint")
        with self.operator.stream("GET", "/evidence/export") as answer, file.open("wb") as lines:
            for chunk in answer.iter_bytes():
                lines.write(chunk)
        write(file.with_name(VKEY_FILE), key.text)
        write(file.with_name(CHECKPOINT_FILE), note.text)

    # Anchors

    def start_anchors(self, *names: str) -> None:
        """Start anchors, and wait until each serves and the controller has heard of it."""
        for name in names:
            anchor, described = self.network.anchors[name], self.catalogue.anchor(name)
            command = [
                *(sys.executable, "-m", "topologies.endpoints.anchor", "--name", name),
                *("--address", str(anchor.address4), "--core", self.core_url),
                *("--services", str(self._services_file(name))),
                *("--slots", str(described.slots)),
            ]
            self._launch(_anchor_program(name), anchor, command)
        for name in names:
            self._await_start(_anchor_program(name))

    def kill_anchor(self, name: str) -> int:
        """SIGKILL an anchor's server; return the Unix time in ns at which it was dead."""
        return self._kill(_anchor_program(name))

    # User equipment

    def page(self, ue: Ue, task: str, max_tokens: int = 1) -> dict[str, Any]:
        """Let the UE's own agent page by intent, over the network, and read a few tokens."""
        command = [
            *(sys.executable, "-m", "topologies.endpoints.ue", "--core", self.core_url),
            *("--task", task, "--max-tokens", str(max_tokens)),
        ]
        agent = ue.popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        out, errors = agent.communicate(timeout=START_TIMEOUT_S)
        if agent.returncode != 0:
            raise UserError(f"{ue.name} could not page: {(errors or out).decode().strip()}")
        answer: dict[str, Any] = json.loads(out)
        return answer

    def check_alive(self) -> None:
        """Raise UserError if one of the testbed's programs has died."""
        self.network.check_alive()
        for name, program in self._programs.items():
            if program.poll() is not None:
                raise UserError(f"{name} died with status {program.returncode}{self._words(name)}")

    # How it starts

    def _launch(self, name: str, host: Host, command: list[str]) -> None:
        """Start a program."""
        with (self._folder / f"{name}.log").open("ab") as log:
            program = host.popen(command, stdout=subprocess.PIPE, stderr=log)
        set_priority(program.pid, NICE)
        self._programs[name] = program

    def _await_start(self, name: str) -> None:
        """Wait for a program's first line of output, which says that it is ready."""
        program = self._programs[name]
        assert program.stdout is not None
        ready, _, _ = select.select([program.stdout], [], [], START_TIMEOUT_S)
        if not ready or not program.stdout.readline():
            program.kill()
            program.wait()
            raise UserError(f"{name} did not start{self._words(name)}")

    def _kill(self, name: str) -> int:
        program = self._programs[name]
        program.kill()
        program.wait()
        return time.time_ns()

    def _words(self, name: str) -> str:
        log = self._folder / f"{name}.log"
        words = log.read_text(errors="replace").strip()[-2000:] if log.exists() else ""
        return f":\n{words}" if words else ""

    def _write_inputs(self) -> None:
        folder = self._folder
        (folder / "catalogue.json").write_text(self.catalogue.model_dump_json())
        for anchor in self.catalogue.anchors:
            services = {}
            for hosting in anchor.hosts:
                service = self.catalogue.service(hosting.aisi)
                services[service.aisi] = {
                    "task": service.task,
                    "model": service.model,
                    "addresses": [str(service.address4), str(service.address6)],
                    "port": service.port,
                    "service_time_ms": hosting.service_time_ms,
                }
            self._services_file(anchor.name).write_text(json.dumps(services))
        network = self.network
        self.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        config = serve_config(
            network,
            catalogue=folder / "catalogue.json",
            state=self.state,
            operator_socket=self.operator_socket,
            settings=self._settings,
            failure_detection_ms=self._failure_detection_ms,
            features=self._features,
            subscriptions=self._subscriptions,
        )
        write_config(folder / "serve.yaml", config)

    def _services_file(self, anchor: str) -> Path:
        return self._folder / f"services-{anchor}.json"

    def _stop_controller(self) -> None:
        """Let the control plane finish what it has begun."""
        program = self._programs["controller"]
        program.terminate()
        try:
            program.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            program.kill()
            program.wait()


def _anchor_program(anchor: str) -> str:
    return f"anchor-{anchor}"
