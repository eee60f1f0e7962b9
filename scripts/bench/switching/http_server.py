"""The anchors' HTTP servers: one program with a listening socket in every anchor's namespace.

    python -m scripts.bench.switching.http_server NETNS0 NETNS1 [NETNS0 NETNS1 ...]

A pair for each network. An answer takes `ANSWER_S` and is the number of the anchor, so that some
requests are always under way. Says a line when it listens; ends with its standard input.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn

from scripts.bench.switching.network import HTTP_PORT
from topologies.endpoints.probe_sockets import in_namespace

ANSWER_S = 0.02
Send = Callable[[dict[str, Any]], Awaitable[None]]


class Anchor:
    """An ASGI application that says which anchor it is."""

    def __init__(self, number: int) -> None:
        self._body = str(number).encode()

    async def __call__(self, _scope: Any, _receive: Any, send: Send) -> None:
        """Answer, after a while."""
        await asyncio.sleep(ANSWER_S)
        headers = [(b"content-type", b"text/plain"), (b"content-length", b"1")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": self._body})


def _listen(netns: str) -> socket.socket:
    with in_namespace(netns):
        return socket.create_server(("0.0.0.0", HTTP_PORT), backlog=1024)


async def _serve(namespaces: list[str]) -> None:
    serving = []
    for number in range(2):
        config = uvicorn.Config(Anchor(number), lifespan="off", log_level="error")
        sockets = [_listen(netns) for netns in namespaces[number::2]]
        serving.append(asyncio.create_task(uvicorn.Server(config).serve(sockets)))
    print("listening", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    for task in serving:
        task.cancel()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1:]))
