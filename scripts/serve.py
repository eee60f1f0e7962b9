"""`aipaging serve`: the control plane as a daemon, over the user plane of a Linux router.

It prints one line of JSON when it serves. It may be killed at any instant: leases live on in the
kernel until their deadlines, and the next start rebuilds itself from its store.
"""

import asyncio
import contextlib
import json
import logging
import resource
from collections.abc import AsyncIterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Annotated, Any

import click
import uvloop
from fastapi import FastAPI
from pydantic import Field, TypeAdapter

from controlplane import logs, memory
from controlplane.admission import Rates
from controlplane.body_limit import BodyLimit
from controlplane.catalogue import Catalogue, load_catalogue
from controlplane.clock import Clock
from controlplane.configfile import load_yaml
from controlplane.controller import Settings
from controlplane.fleet import FleetError
from controlplane.http_server import HttpServer
from controlplane.keys import KeyFileError, KeyRing, generate_key, load_private_key
from controlplane.listeners import Listener, ListenError, TcpListener, UnixListener
from controlplane.northbound.app import create_app
from controlplane.northbound.plane import OPERATOR_LISTENER
from controlplane.policy import Tenants, load_tenants
from controlplane.service import Network, Options, Service
from controlplane.sqlite_outbox import SqliteOutbox
from controlplane.sqlite_store import SqliteStore
from controlplane.store import StoreError
from controlplane.tracing import TracingUnavailable, configure_tracing
from controlplane.triggers import TriggerSettings
from scripts import evidence_files, user_plane
from scripts.errors import UserError, require_root
from scripts.http_anchors import HttpAnchors
from scripts.user_plane import REMOVE_OPTION, UserPlaneConfig, remove
from upf.local import LocalUserPlane
from upf.remote import RemoteUserPlane

STORE_FILE = "control.db"
EVIDENCE_KEY_FILE = "evidence.key"
KEYS_FOLDER = "keys"
SOCKET_FILE = "operator.sock"

# What may be wrong with the machine or its state, said in one line.
FAILURES = (
    *(StoreError, ListenError, KeyFileError, FleetError, TracingUnavailable),
    *user_plane.FAILURES,
)


class ServeConfig(UserPlaneConfig):
    """What the daemon is told: its network, its catalogue, and where it keeps its state."""

    state: Path  # folder, readable by its owner only: store and keys
    operator_socket: Path | None = None  # by default in the state folder
    tenants: Path | None = None
    listen: tuple[str, ...] = ()  # ADDRESS:PORT, an IPv6 address in brackets
    upf_socket: Path | None = None  # of `aipaging upf`, if the user plane is a process of its own
    settings: Settings = Settings()
    triggers: TriggerSettings = TriggerSettings()
    failure_detection_ms: Annotated[int, Field(ge=20, le=60_000)] = 200
    key_rotation_s: Annotated[int, Field(ge=60)] = 86_400  # how long a key signs
    traces: str | None = None  # OTLP/HTTP endpoint for traces of transactions (extra `otel`)
    api_root: str = "http://localhost"
    allow_http_sinks: bool = False

    def network(self) -> Network:
        """Describe the network to the control plane."""
        addresses: dict[IPv4Address | IPv6Address, str] = {}
        for anchor in self.anchors:
            addresses[anchor.address4] = addresses[anchor.address6] = anchor.name
        return Network(
            subscribers=self.subscribers,
            cells={
                name: Rates(int(cell.downlink_mbps * 1e6), int(cell.uplink_mbps * 1e6))
                for name, cell in self.cells.items()
            },
            attachment_points=[anchor.name for anchor in self.anchors],
            anchor_addresses=addresses,
        )


@contextlib.asynccontextmanager
async def enforcing(
    config: ServeConfig, local: LocalUserPlane | None
) -> AsyncIterator[LocalUserPlane | RemoteUserPlane]:
    """Yield the user plane: the one in this process, or that behind a socket."""
    if local is not None:
        local.follow_routes(asyncio.get_running_loop())
        yield local
    else:
        assert config.upf_socket is not None
        async with RemoteUserPlane(config.upf_socket) as remote:
            yield remote


async def serve(config: ServeConfig, catalogue: Catalogue, local: LocalUserPlane | None) -> None:
    """Serve until SIGTERM or SIGINT; `local`: None if the user plane is that of `upf_socket`."""
    tenants = load_tenants(config.tenants) if config.tenants else Tenants()
    config.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    store = SqliteStore(config.state / STORE_FILE)
    async with contextlib.AsyncExitStack() as undo:
        undo.enter_context(contextlib.closing(store))
        enforcer = await undo.enter_async_context(enforcing(config, local))
        clock = Clock()
        service = Service(
            catalogue=catalogue,
            network=config.network(),
            tenants=tenants,
            store=store,
            outbox=SqliteOutbox(store),
            keys=KeyRing.open(config.state / KEYS_FOLDER, clock.to_unix_ns(clock.now_ns())),
            evidence_key=_evidence_key(config.state / EVIDENCE_KEY_FILE),
            enforcer=enforcer,
            first_packets=enforcer,
            gateway=HttpAnchors(catalogue, config.anchors),
            clock=clock,
            options=Options(
                settings=config.settings,
                triggers=config.triggers,
                failure_detection_ms=config.failure_detection_ms,
                key_rotation_s=config.key_rotation_s,
                api_root=config.api_root,
                allow_http_sinks=config.allow_http_sinks,
            ),
        )
        if isinstance(enforcer, RemoteUserPlane):
            enforcer.reconnected = service.plane.controller.disagree
        evidence_files.check_continues(config.state, service.plane.log, service.plane.signer)
        evidence_files.publish(config.state, service.plane.log, service.plane.signer)

        @contextlib.asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[None]:
            async with service.running():
                yield

        app = create_app(service.plane, lifespan)
        app.add_middleware(BodyLimit)
        try:
            await HttpServer(app, _listeners(config)).serve(_ready)
        finally:
            evidence_files.publish(config.state, service.plane.log, service.plane.signer)


def _listeners(config: ServeConfig) -> list[Listener]:
    listeners: list[Listener] = [
        UnixListener(
            name=OPERATOR_LISTENER, path=config.operator_socket or config.state / SOCKET_FILE
        )
    ]
    for place in config.listen:
        host, _, port = place.rpartition(":")
        address = ip_address(host.strip("[]"))
        listeners.append(TcpListener(name=place, host=address, port=int(port)))
    return listeners


def _evidence_key(path: Path) -> Any:
    return load_private_key(path) if path.exists() else generate_key(path)


def _raise_file_limit() -> None:
    """Allow as many connections as the machine lets us."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _ready() -> None:
    memory.settle()
    print(json.dumps({"event": "ready"}), flush=True)


def write_config(path: Path, config: ServeConfig) -> None:
    """Write a configuration as JSON, which is YAML."""
    path.write_bytes(TypeAdapter(ServeConfig).dump_json(config, by_alias=True))


@click.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@REMOVE_OPTION
@click.option(
    "--log-level",
    type=click.Choice(["DEBUG", "INFO", "WARNING", "ERROR"]),
    default="INFO",
    show_default=True,
    help="DEBUG has a line for every page.",
)
def command(file: Path, only_remove: bool, log_level: str) -> None:
    """Serve the control plane over this machine's user plane, as FILE (YAML) says.

    FILE names the N3 and N6 interfaces, the anchors, the UEs and the folder for the daemon's state;
    docs/serving.md shows one. It prints a line of JSON when it serves, logs to stderr, and ends on
    SIGTERM. Leases outlive it in the kernel until they expire; the next start adopts them.

    \b
    Example:
      aipaging serve router.yaml
      aipaging sessions --socket /var/lib/aipaging/operator.sock
      aipaging serve router.yaml --remove
    """
    config = load_yaml(file, ServeConfig)
    if config.upf_socket is None:
        require_root("the user plane")
    elif only_remove:
        raise UserError(f"{file} has upf_socket: 'aipaging upf ... --remove' takes that away")
    if only_remove:
        try:
            remove(config)
        except FAILURES as error:
            raise UserError(str(error)) from error
        return
    logs.configure(level=logging.getLevelNamesMapping()[log_level])
    _raise_file_limit()
    if config.traces is not None:
        configure_tracing(config.traces)
    try:
        catalogue = load_catalogue(config.catalogue)
        with contextlib.ExitStack() as undo:
            local = None
            if config.upf_socket is None:  # before the event loop: pyroute2 runs one of its own
                local = undo.enter_context(user_plane.user_plane(config, catalogue))
            uvloop.run(serve(config, catalogue, local))
    except FAILURES as error:
        raise UserError(str(error)) from error
