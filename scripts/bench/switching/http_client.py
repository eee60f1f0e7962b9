"""A UE that sends HTTP requests at a steady pace, each on a connection of its own.

    python -m scripts.bench.switching.http_client '{"netns": ..., "url": ..., "interval_ms": 10}'

Works in the namespace `netns`; with "resolver": true it has a resolv.conf of its own that names
the resolver on its loopback; "cpu" is the CPU that it is to have to itself, or null. Says a line
when it begins; when its standard input ends it waits for what is under way and prints a line of
JSON: [begin_ns, anchor or null, error or null] a request, CLOCK_REALTIME.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from topologies import linux

TIMEOUT_S = 2.0
MS_BIND = 0x1000
NICE = -15


class Client:
    """Requests and what became of them."""

    def __init__(self, url: str, interval_s: float) -> None:
        self._url, self._interval_s = url, interval_s
        self.requests: list[tuple[int, int | None, str | None]] = []

    async def run(self, ended: asyncio.Event) -> None:
        """Send until `ended`, then wait for the answers."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        headers = {"connection": "close"}
        async with (
            httpx.AsyncClient(
                limits=limits, headers=headers, timeout=TIMEOUT_S, trust_env=False
            ) as http,
            asyncio.TaskGroup() as group,
        ):
            due = time.monotonic()
            while not ended.is_set():
                group.create_task(self._request(http))
                due = max(due + self._interval_s, time.monotonic() - self._interval_s)
                await asyncio.sleep(max(0, due - time.monotonic()))

    async def _request(self, http: httpx.AsyncClient) -> None:
        begin_ns = time.time_ns()
        try:
            answer = await http.get(self._url)
            answer.raise_for_status()
            self.requests.append((begin_ns, int(answer.text), None))
        except (httpx.HTTPError, ValueError) as error:
            self.requests.append((begin_ns, None, type(error).__name__))


async def _main(asked: dict[str, Any]) -> None:
    client, ended = Client(asked["url"], asked["interval_ms"] / 1e3), asyncio.Event()
    print("begun", flush=True)
    running = asyncio.create_task(client.run(ended))
    await asyncio.to_thread(sys.stdin.read)
    ended.set()
    await running
    print(json.dumps(sorted(client.requests)))


def _enter(netns: str, resolver: bool) -> None:
    fd = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
    linux.setns(fd, linux.CLONE_NEWNET)
    os.close(fd)
    if resolver:
        linux.unshare(linux.CLONE_NEWNS)
        linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)
        with tempfile.NamedTemporaryFile("w", suffix=".conf") as file:
            file.write("nameserver 127.0.0.1\noptions timeout:1\n")
            file.flush()
            linux.mount(file.name, str(Path("/etc/resolv.conf").resolve()), None, MS_BIND)


if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    if options["cpu"] is not None:
        os.sched_setaffinity(0, {options["cpu"]})
    linux.set_priority(0, NICE)
    _enter(options["netns"], options["resolver"])
    asyncio.run(_main(options))
