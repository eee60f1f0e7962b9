"""The controller as a program: wires the control plane to a UPF's gate and serves the API.

    python -m scripts.controller CONFIG.json

It prints one line of JSON when it serves. It may be killed at any instant: leases live on in the
kernel until their deadlines, and the next start rebuilds itself from the journal.
"""

import asyncio
import gc
import json
import logging
import socket
import sys
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

import httpx
import uvicorn
from pydantic import TypeAdapter

from controlplane import aist
from controlplane.api import Api
from controlplane.catalogue import Catalogue, load_catalogue
from controlplane.checkpoint import Signer
from controlplane.clock import Clock
from controlplane.configfile import ConfigModel, load_yaml
from controlplane.controller import Controller, Settings, Subscriber
from controlplane.evidence import Journal
from controlplane.ledger import Ledger
from scripts.evidence_files import check_continues, publish
from upf import qos, routing
from upf.config import GateConfig
from upf.gate import Gate

READY_TIMEOUT_S = 0.5

log = logging.getLogger("controller")


class ControllerConfig(ConfigModel):
    """What the program is told. Paths are as seen from its mount namespace."""

    upf_netns: str
    gate: GateConfig
    n3_capacities_bps: dict[str, int]  # downlink, by N3 interface
    in_place_renewal: bool  # of the kernel, see upf.features
    catalogue: Path
    anchor_addresses: dict[str, IPv4Address]  # on which anchors say they are ready
    subscribers: tuple[Subscriber, ...]
    journal: Path
    key: Path  # of AISTs
    evidence_key: Path  # of checkpoints of the journal; belongs to it for as long as it grows
    operator_socket: Path
    addresses: tuple[IPv4Address | IPv6Address, ...]  # for UEs
    port: int
    settings: Settings


class HttpAnchors:
    """Asks anchors over HTTP."""

    def __init__(self, catalogue: Catalogue, addresses: dict[str, IPv4Address]) -> None:
        self._catalogue = catalogue
        self._addresses = addresses
        self._client = httpx.AsyncClient(timeout=READY_TIMEOUT_S, trust_env=False)

    async def ready(self, anchor: str, aisi: str) -> bool:
        """Return whether the anchor answers `GET /ready` with 200 in time."""
        port = self._catalogue.service(aisi).port
        try:
            answer = await self._client.get(f"http://{self._addresses[anchor]}:{port}/ready")
        except httpx.HTTPError as error:
            log.warning("anchor %s: %r", anchor, error)
            return False
        return answer.status_code == httpx.codes.OK


class _Server(uvicorn.Server):
    """Says on stdout when it serves; leaves a checkpoint beside the journal when it ends."""

    def __init__(self, config: uvicorn.Config, journal: Journal, signer: Signer) -> None:
        super().__init__(config)
        self._journal = journal
        self._signer = signer

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        gc.collect()
        gc.freeze()  # what is here now stays: keep it out of every later collection
        print(json.dumps({"event": "ready"}), flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        publish(self._journal, self._signer)


def build(config: ControllerConfig) -> Controller:
    """Open the gate, replay the journal, make the kernel agree."""
    catalogue = load_catalogue(config.catalogue)
    clock = Clock()
    ledger = Ledger(Journal(config.journal, clock))
    routing.install(config.upf_netns, config.gate)
    qos.install(config.upf_netns, config.n3_capacities_bps, catalogue.qos_shares())
    gate = Gate(config.upf_netns, config.gate, in_place_renewal=config.in_place_renewal)
    controller = Controller(
        catalogue=catalogue,
        subscribers=config.subscribers,
        ledger=ledger,
        enforcer=gate,
        gateway=HttpAnchors(catalogue, config.anchor_addresses),
        key=aist.load_private_key(config.key),
        clock=clock,
        settings=config.settings,
    )
    reconciled = controller.recover()
    log.info("reconciled with the kernel: %s", reconciled)
    return controller


def _sockets(config: ControllerConfig) -> list[socket.socket]:
    config.operator_socket.unlink(missing_ok=True)
    operator = socket.socket(socket.AF_UNIX)
    operator.bind(str(config.operator_socket))
    config.operator_socket.chmod(0o600)
    sockets = [operator]
    for address in config.addresses:
        family = socket.AF_INET if ip_address(address).version == 4 else socket.AF_INET6
        sockets.append(socket.create_server((str(address), config.port), family=family))
    return sockets


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    config = load_yaml(Path(sys.argv[1]), ControllerConfig)
    controller = build(config)
    journal = controller.ledger.journal
    signer = Signer.of_log(aist.load_private_key(config.evidence_key))
    check_continues(journal, signer)
    publish(journal, signer)
    sockets = _sockets(config)
    app = Api(controller, signer).app()
    server = uvicorn.Config(app, http="httptools", log_level="warning", access_log=False)
    asyncio.run(_Server(server, journal, signer).serve(sockets=sockets))


def write_config(path: Path, config: ControllerConfig) -> None:
    """Write a configuration for `main`."""
    path.write_bytes(TypeAdapter(ControllerConfig).dump_json(config))


if __name__ == "__main__":
    main()
