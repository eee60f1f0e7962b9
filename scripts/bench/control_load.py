"""The load of `bench control` over HTTP, in a process of its own.

    python -m scripts.bench.control_load SOCKET '{"mode": "closed", "clients": 64, ...}'

Requests go over the operator's Unix socket, on connections that are kept. An open loop takes each
latency from when the request was due, so that a stall is counted for all that it delayed. One line
of JSON at the end.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import orjson
import uvloop

from scripts.bench.control_world import ANCHOR, TASKS
from scripts.http_connection import HttpConnection

LEASE_MS = 3_600_000


class Client:
    """Pages and releases over one connection, one request at a time."""

    def __init__(self, connection: HttpConnection) -> None:
        self._connection = connection

    @classmethod
    async def open(cls, path: str) -> Client:
        """Connect to a Unix socket."""
        return cls(await HttpConnection.open_unix(path))

    async def request(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        """Return status and body of the answer."""
        data = b"" if body is None else orjson.dumps(body)
        head = (
            f"{method} {path} HTTP/1.1\r\nhost: bench\r\ncontent-length: {len(data)}\r\n"
            "content-type: application/json\r\n\r\n"
        )
        return await self._connection.request(head.encode() + data)

    async def page(self, number: int) -> str:
        """Page for UE `number`; return the session id."""
        intent = {"task": TASKS[0], "durationMs": LEASE_MS}
        body = {"ue": f"ue{number}", "intent": intent}
        status, answer = await self.request("POST", "/sessions", body)
        if status != 201:
            raise RuntimeError(f"page {number}: {status}: {answer[:500]!r}")
        session_id: str = orjson.loads(answer)["sessionId"]
        return session_id

    async def release(self, session_id: str) -> None:
        """Release a session."""
        status, answer = await self.request("DELETE", f"/sessions/{session_id}")
        if status != 204:
            raise RuntimeError(f"release: {status}: {answer[:500]!r}")

    async def beat(self) -> None:
        """Send the anchor's heartbeat for it."""
        ready = [f"bench.{task}" for task in TASKS]
        body = {"load": 0.1, "readyAisis": ready, "bootId": "bench"}
        await self.request("POST", f"/anchors/{ANCHOR}/heartbeat", body)


async def run(path: str, load: dict[str, Any]) -> dict[str, Any]:
    """Apply a load; return latencies (ms), what it took (s), and of CPU here (s)."""
    keeper = await Client.open(path)
    await keeper.beat()
    numbers = iter(range(load["first"], load["first"] + load["count"]))
    clients = [await Client.open(path) for _ in range(load["clients"])]
    latencies_ms: list[float] = []
    started, cpu = time.perf_counter(), time.process_time()

    async def closed(client: Client) -> None:
        for number in numbers:
            began = time.perf_counter()
            session_id = await client.page(number)
            if load["mode"] == "pairs":
                await client.release(session_id)
            latencies_ms.append((time.perf_counter() - began) * 1000)

    async def opened() -> None:
        free: asyncio.Queue[Client] = asyncio.Queue()
        for client in clients:
            free.put_nowait(client)
        tasks: list[asyncio.Task[None]] = []

        async def one(number: int, due: float) -> None:
            client = await free.get()
            await client.page(number)
            latencies_ms.append((time.perf_counter() - due) * 1000)
            free.put_nowait(client)

        def start(number: int, due: float) -> None:
            tasks.append(asyncio.create_task(one(number, due)))

        loop = asyncio.get_running_loop()

        def schedule() -> None:
            """In a thread: the event loop's own timers are of whole milliseconds."""
            for order, number in enumerate(numbers):
                due = started + order / load["rate_per_s"]
                time.sleep(max(0, due - time.perf_counter()))
                loop.call_soon_threadsafe(start, number, due)

        await asyncio.to_thread(schedule)
        await asyncio.sleep(0)  # the last one has been started
        await asyncio.gather(*tasks)

    if load["mode"] == "open":
        await opened()
    else:
        await asyncio.gather(*map(closed, clients))
    return {
        "took_s": time.perf_counter() - started,
        "cpu_s": time.process_time() - cpu,
        "latencies_ms": latencies_ms,
    }


if __name__ == "__main__":
    print(json.dumps(uvloop.run(run(sys.argv[1], json.loads(sys.argv[2])))))
