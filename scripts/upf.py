"""`aipaging upf`: the user plane of a Linux router as a process of its own.

It prints one line of JSON when the gate stands. It may be killed at any instant: leases live on in
the kernel until their deadlines, and the next start adopts them.
"""

import asyncio
import contextlib
import json
import logging
import signal
import socket
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import orjson
import uvloop

from controlplane import logs
from controlplane.catalogue import Catalogue, load_catalogue
from controlplane.configfile import load_yaml
from controlplane.listeners import ListenError, UnixListener, listen, owned
from scripts.errors import UserError, require_root
from scripts.user_plane import FAILURES, REMOVE_OPTION, UserPlaneConfig, remove, user_plane
from upf import protocol, status
from upf.agent import Agent
from upf.features import probe
from upf.local import LocalUserPlane

STATUS_TIMEOUT_S = 10.0

log = logging.getLogger(__name__)


class UpfConfig(UserPlaneConfig):
    """The user plane, and the socket by which the control plane reaches it."""

    upf_socket: Path


def run(config: UpfConfig, catalogue: Catalogue) -> None:
    """Hold the gate until SIGTERM or SIGINT."""
    config.upf_socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.ExitStack() as undo:
        # First of all: where there is an agent already, nothing is touched.
        listening = undo.enter_context(listen(UnixListener("upf", config.upf_socket)))
        undo.enter_context(owned(config.upf_socket))
        # Before the event loop: pyroute2 runs one of its own.
        local = undo.enter_context(user_plane(config, catalogue))
        uvloop.run(_serve(local, listening))


async def _serve(user_plane: LocalUserPlane, listening: socket.socket) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    user_plane.follow_routes(asyncio.get_running_loop())
    print(json.dumps({"event": "ready"}), flush=True)
    about = {"version": version("ai-paging"), "table": user_plane.table}
    await Agent(user_plane, about).serve(listening, stop)


def describe(config: UpfConfig, catalogue: Catalogue) -> dict[str, Any]:
    """Return what the running agent says of itself and its kernel; without one, what we read."""
    features = probe()
    found = asyncio.run(_ask(config.upf_socket))
    if found is None:
        queue = config.packet_queue or features.packet_queue()
        wanted = config.gate(catalogue, queue if config.parks(catalogue) else None)
        found = {
            "agent": None,
            "version": version("ai-paging"),
            **status.of_kernel(config.upf_netns, wanted),
        }
    return {**found, "features": features.to_json()}


async def _ask(path: Path) -> Any:
    """Return an agent's status; None if there is no agent."""
    try:
        reader, writer = await asyncio.open_unix_connection(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        return None
    greeting = protocol.Greeting(
        protocol=protocol.PROTOCOL, role="status", now_ns=time.monotonic_ns()
    )
    try:
        async with asyncio.timeout(STATUS_TIMEOUT_S):
            writer.write(protocol.encode(greeting.model_dump()))
            return protocol.result(await protocol.read(reader))
    except (OSError, EOFError, protocol.ProtocolError) as error:
        raise UserError(f"the agent at {path} does not answer: {error or repr(error)}") from error
    finally:
        writer.close()


@click.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@REMOVE_OPTION
@click.option(
    "--status",
    "only_status",
    is_flag=True,
    help="Print as JSON what the running agent, or else the kernel, says of it, and end.",
)
@click.option(
    "--log-level",
    type=click.Choice(["DEBUG", "INFO", "WARNING", "ERROR"]),
    default="INFO",
    show_default=True,
)
def command(file: Path, only_remove: bool, only_status: bool, log_level: str) -> None:
    """Hold the user plane of this machine for a control plane beside it, as FILE (YAML) says.

    FILE names the N3 and N6 interfaces, the anchors, the UEs and the socket (mode 0600) by which
    'aipaging serve' reaches the gate, if its own file has the same upf_socket; docs/serving.md
    shows both. It prints a line of JSON when the gate stands, logs to stderr, and ends on SIGTERM.
    Leases outlive it in the kernel until they expire; the next start adopts them. What else this
    machine forwards it leaves alone.

    \b
    Example:
      aipaging upf upf.yaml
      aipaging upf upf.yaml --status
      aipaging upf upf.yaml --remove
    """
    if only_remove and only_status:
        raise click.UsageError("--remove and --status exclude one another")
    require_root("the user plane")
    config = load_yaml(file, UpfConfig)
    catalogue = load_catalogue(config.catalogue)
    try:
        if only_status:
            found = describe(config, catalogue)
            click.echo(orjson.dumps(found, option=orjson.OPT_INDENT_2, default=str))
            return
        if only_remove:
            if asyncio.run(_ask(config.upf_socket)) is not None:
                raise UserError(f"an agent is running at {config.upf_socket}: stop it first")
            remove(config)
            return
        logs.configure(level=logging.getLevelNamesMapping()[log_level])
        run(config, catalogue)
    except (*FAILURES, ListenError) as error:
        raise UserError(str(error)) from error
