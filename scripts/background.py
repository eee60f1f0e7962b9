"""`aipaging up`, `shell`, `page` and `down`: a network that runs in the background, to try out."""

import json
import os
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import click

from controlplane.catalogue import load_catalogue
from scripts.errors import EXIT_FAILED, UserError, require_root
from scripts.experiments.common import BUILT_IN_CATALOGUE, STATE_FOLDER
from scripts.testbed import Testbed, check
from scripts.testbed_config import CONTROL_PORT, subscriptions
from topologies import addressing, lifecycle
from topologies.endpoints import ue
from topologies.isolation import scratch_dir
from topologies.network import Network
from topologies.spec import load_topology
from upf.features import probe


@click.command()
@click.argument("file", default="two-edge")
@click.option(
    "--catalogue",
    type=click.Path(dir_okay=False, path_type=Path),
    default=BUILT_IN_CATALOGUE,
    help="Services and anchors; by default topologies/catalogue.yaml.",
)
@click.option(
    "--state",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where the control plane keeps its store and keys; by default they go with the network.",
)
@click.option(
    "--subscribe",
    is_flag=True,
    help="Every UE has a subscription to every service: it just sends, and is paged for.",
)
@click.option("--json", "as_json", is_flag=True, help="Print what was built as JSON.")
def up(file: str, catalogue: Path, state: Path | None, subscribe: bool, as_json: bool) -> None:
    """Start the network of FILE (or a built-in one), its anchors and its controller.

    \b
    Then, for example:
      aipaging shell ue1 aipaging page --task text-generation --max-tokens 500
      aipaging watch            (in another terminal; also: sessions --watch, anchors --watch)
      aipaging relocate ue1     (the stream goes on; new connections go to the other anchor)
      aipaging shell upf nft list table inet aipaging
      aipaging down
    """
    require_root("an emulated network")
    spec = load_topology(file)
    services = load_catalogue(catalogue)
    check(spec, services)
    features = probe()
    if subscribe and features.packet_queue() is None:
        raise UserError("--subscribe: this kernel has no packet queue; see aipaging doctor")
    kept = state.resolve() if state else None

    def furnish(network: Network) -> AbstractContextManager[object]:
        folder = scratch_dir()
        return Testbed(
            *(network, services, features, folder, kept or folder / STATE_FOLDER),
            subscriptions=subscriptions(services) if subscribe else (),
        )

    registration = lifecycle.up(spec, furnish)
    if as_json:
        click.echo(registration.model_dump_json(indent=2))
    else:
        click.echo("\n".join(registration.describe()))


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("host")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def shell(host: str, command: tuple[str, ...]) -> int:
    """Run COMMAND (by default your shell) in HOST of the network that is up."""
    require_root("entering an emulated host")
    # So that `aipaging` means this one there, too.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return lifecycle.shell(host, command)


@click.command()
def down() -> None:
    """Stop the network that is up."""
    require_root("stopping an emulated network")
    for registration in lifecycle.down():
        click.echo(f"stopped {registration.topology} (run {registration.run_id})")


@click.command()
@click.option("--task", required=True, help="Hugging Face pipeline tag, such as text-generation.")
@click.option("--duration-ms", type=int, help="How long a lease to ask for.")
@click.option("--max-tokens", type=click.IntRange(1), default=16, show_default=True)
@click.option("--core", metavar="URL", help="The controller; by default the core host's.")
def page(task: str, duration_ms: int | None, max_tokens: int, core: str | None) -> int:
    """Ask for a service by intent, then read tokens from wherever the network put it.

    To be run in a UE: aipaging shell ue1 aipaging page --task text-generation
    """
    intent: dict[str, Any] = {"task": task}
    if duration_ms is not None:
        intent["durationMs"] = duration_ms
    core = core or f"http://{addressing.core().address4}:{CONTROL_PORT}"
    try:
        result = ue.ask(core, intent, max_tokens)
    except ue.PagingError as error:
        raise UserError(str(error)) from error
    click.echo(json.dumps(result, indent=2))
    return 0 if result["stream"]["complete"] else EXIT_FAILED
