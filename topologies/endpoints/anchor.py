"""The AI execution anchor (AEXF) as a program: one process, with all of its services.

What the control plane hears of it (`anchor_agent`) therefore holds for each of them.

    python -m topologies.endpoints.anchor --name edge1 --address 10.47.1.2 \\
        --core http://10.49.0.2:8080 --services services.json
"""

import argparse
import asyncio
import signal
import socket
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

import httpx
import uvloop
from pydantic import TypeAdapter

from controlplane import aist
from controlplane.verifier import Verifier
from topologies.endpoints.anchor_agent import Agent, CoreError, core_client
from topologies.endpoints.anchor_drain import Drainer
from topologies.endpoints.anchor_http import BACKLOG, HttpServer
from topologies.endpoints.anchor_load import Load
from topologies.endpoints.anchor_server import AnchorConfig, Service, create_app

INTRODUCTION_S = 15.0  # how long the control plane may leave the first heartbeat unanswered
EXIT_FAILED = 1


def listen(
    own: IPv4Address | IPv6Address, services: Iterable[Service]
) -> dict[tuple[str, int], socket.socket]:
    """Open listening sockets: at each service's addresses, and at the anchor's own."""
    places = dict.fromkeys(
        (str(address), service.port)
        for service in services
        for address in (own, *sorted(service.addresses, key=str))
    )
    return {
        place: socket.create_server(
            place, family=socket.AF_INET6 if ":" in place[0] else socket.AF_INET, backlog=BACKLOG
        )
        for place in places
    }


async def serve(
    config: AnchorConfig, client: httpx.AsyncClient, sockets: list[socket.socket], ready: str
) -> None:
    """Serve until ended; print `ready` once the control plane knows that we do.

    Raises CoreError if it does not answer.
    """
    drainer = Drainer()
    agent = Agent(config.name, client, config.verifier, config.report, drainer.heed)
    server = HttpServer(create_app(config, agent.ask), drainer)
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    async with client:
        await agent.introduce(INTRODUCTION_S)
        print(ready, flush=True)
        async with asyncio.TaskGroup() as tasks:  # an anchor without its agent must not serve on
            running = [
                tasks.create_task(work)
                for work in (agent.run(), drainer.run(agent.ask), server.serve(sockets))
            ]
            await ended.wait()
            for task in running:
                task.cancel()


def main() -> None:
    """Serve until ended; the first line on stdout says that it serves and that this is known."""
    parser = argparse.ArgumentParser(prog="anchor", description="AI execution anchor")
    parser.add_argument("--name", required=True)
    parser.add_argument(
        "--address", required=True, type=ip_address, help="the anchor's own, known to the core"
    )
    parser.add_argument("--core", required=True, metavar="URL", help="the control plane")
    parser.add_argument(
        "--services",
        required=True,
        type=Path,
        help="JSON: AISI -> {task, model, addresses, port, service_time_ms}",
    )
    parser.add_argument("--token-interval-ms", type=float, default=20)
    parser.add_argument("--slots", type=int, default=64)
    options = parser.parse_args()
    try:
        services = TypeAdapter(dict[str, Service]).validate_json(options.services.read_bytes())
        config = AnchorConfig(
            name=options.name,
            services=services,
            verifier=Verifier(aist.ISSUER, {"keys": []}),
            load=Load(options.slots),
            token_interval_ms=options.token_interval_ms,
        )
        client = core_client(options.core, options.address)
        sockets = listen(options.address, services.values())
    except (OSError, ValueError, httpx.InvalidURL) as error:
        parser.error(str(error))
    places = ", ".join(f"{address} port {port}" for address, port in sockets)
    ready = f"{options.name} listens on {places}"
    try:
        uvloop.run(serve(config, client, list(sockets.values()), ready))
    except CoreError as error:
        parser.exit(EXIT_FAILED, f"error: {options.name}: {error}\n")


if __name__ == "__main__":
    main()
