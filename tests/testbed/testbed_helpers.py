"""Tests of emulated networks run their bodies inside isolated runs; pytest stays outside."""

import faulthandler
import socket
import traceback
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from tempfile import TemporaryFile

import pytest

from controlplane.catalogue import Catalogue, load_catalogue
from controlplane.controller import Settings
from scripts.experiments.common import BUILT_IN_CATALOGUE, STATE_FOLDER
from scripts.testbed import FAILURE_DETECTION_MS, Testbed
from scripts.testbed_config import subscriptions
from topologies.hosts import Host
from topologies.isolation import run_isolated, scratch_dir
from topologies.network import Network
from topologies.spec import load_topology
from upf.features import probe
from upf.netns import in_namespace

_IP_TRANSPARENT, _IPV6_TRANSPARENT = 19, 75


def in_isolation(body: Callable[[], None], deadline_s: float = 60) -> None:
    """Run `body` in an isolated run of its own; fail with its traceback if it fails."""
    with TemporaryFile("w+") as failure:

        def main() -> int:
            faulthandler.dump_traceback_later(deadline_s, exit=True, file=failure)
            try:
                body()
            except BaseException:
                traceback.print_exc(file=failure)
                failure.flush()
                return 1
            return 0

        status = run_isolated(main)
        failure.seek(0)
        text = failure.read()
    if status != 0:
        pytest.fail(f"in the isolated run (status {status}):\n{text}", pytrace=False)


def on_a_testbed(
    body: Callable[[Testbed], None],
    *,
    catalogue: Catalogue | None = None,
    failure_detection_ms: int = FAILURE_DETECTION_MS,
    settings: Settings | None = None,
    subscribe: bool = False,
) -> None:
    """Run `body` on a testbed of its own: the topology two-edge."""

    def inside() -> None:
        folder = scratch_dir()
        services = catalogue or load_catalogue(BUILT_IN_CATALOGUE)
        with (
            Network(load_topology("two-edge")) as network,
            Testbed(
                network,
                services,
                probe(),
                folder,
                folder / STATE_FOLDER,
                failure_detection_ms=failure_detection_ms,
                settings=settings,
                subscriptions=subscriptions(services) if subscribe else (),
            ) as testbed,
        ):
            body(testbed)

    in_isolation(inside)


def udp(
    host: Host, address: IPv4Address | IPv6Address, *, port: int = 0, foreign: bool = False
) -> socket.socket:
    """A datagram socket in the host, bound to an address; `foreign`: one that is not its own."""

    def make() -> socket.socket:
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        made = socket.socket(family, socket.SOCK_DGRAM)
        if foreign and family == socket.AF_INET:
            made.setsockopt(socket.SOL_IP, _IP_TRANSPARENT, 1)
        elif foreign:
            made.setsockopt(socket.IPPROTO_IPV6, _IPV6_TRANSPARENT, 1)
        made.bind((str(address), port))
        made.settimeout(2)
        return made

    return in_namespace(host.netns, make)


def processes_with(token: str) -> list[int]:
    """The pids of all processes whose environment holds the token."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if token.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found
