"""The user plane as a process of its own: it owns the gate, and one control plane asks it.

The control plane comes over a Unix socket (`upf.protocol`); that it may open it is its authority.
When it dies the agent goes on, and leases end in the kernel. When the agent dies leases live on
there, and the next agent adopts them.
"""

import asyncio
import logging
import os
import select
import socket
import struct
import time
from collections.abc import Mapping
from typing import Any, Protocol

from controlplane.enforcement import EnforcementError, Enforcer, FirstPackets
from upf import protocol, status
from upf.protocol import ProtocolError

GREETING_TIMEOUT_S = 5.0
CLOCK_TOLERANCE_NS = 10_000_000
NS_PER_S = 1_000_000_000

log = logging.getLogger(__name__)


class UserPlane(Enforcer, FirstPackets, Protocol):
    """All that an agent answers for."""


class Agent:
    """Answers for one user plane. All of it runs in one event loop."""

    def __init__(self, user_plane: UserPlane, about: Mapping[str, Any]) -> None:
        """`about`: what a status says beside leases and drops."""
        self._user_plane = user_plane
        self._about = about
        self._controller: socket.socket | None = None  # the connection of the one that there is

    async def serve(self, listening: socket.socket, stop: asyncio.Event) -> None:
        """Answer until `stop` is set."""
        connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            connections[task] = writer
            try:
                await self._serve_one(reader, writer)
            finally:
                del connections[task]
                writer.close()

        server = await asyncio.start_unix_server(accept, sock=listening)
        await stop.wait()
        server.close()
        tasks = list(connections)
        for writer in connections.values():
            writer.transport.abort()  # as if the other end had gone
        await asyncio.gather(*tasks)

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handle: socket.socket = writer.get_extra_info("socket")
        try:
            async with asyncio.timeout(GREETING_TIMEOUT_S):
                hello = await protocol.read(reader, protocol.MAX_GREETING_BYTES)
            greeting = protocol.greeting(hello)
            if greeting.role == "status":
                writer.write(protocol.encode((protocol.DONE, await self._status())))
                await writer.drain()
                return
            self._admit(greeting)
        except (ProtocolError, EnforcementError) as error:
            log.warning("process %d is refused: %s", _pid(handle), error)
            writer.write(protocol.encode((EnforcementError.__name__, str(error))))
            return
        except (EOFError, OSError, TimeoutError):
            return
        self._controller = handle
        log.info("the control plane is process %d", _pid(handle))
        try:
            writer.write(protocol.encode((protocol.DONE, {"protocol": protocol.PROTOCOL})))
            self._user_plane.on_first_packet(
                lambda flow: writer.write(protocol.encode((protocol.FIRST_PACKET, flow)))
            )
            while True:
                question = await protocol.read(reader)
                writer.write(protocol.encode(await self._answer(question)))
                await writer.drain()
        except ProtocolError as error:
            log.error("the control plane is cut off: %s", error)
        except (EOFError, OSError):
            log.warning("the control plane has gone; its leases live on until they expire")
        finally:
            if self._controller is handle:
                self._controller = None
                self._user_plane.on_first_packet(lambda flow: None)

    def _admit(self, greeting: protocol.Greeting) -> None:
        """Raise EnforcementError unless this caller may be the control plane now."""
        if greeting.protocol != protocol.PROTOCOL:
            raise EnforcementError(
                f"this agent speaks protocol {protocol.PROTOCOL}, the control plane "
                f"{greeting.protocol}: install the same version of both"
            )
        age_ns = time.monotonic_ns() - greeting.now_ns
        if not -CLOCK_TOLERANCE_NS <= age_ns <= 2 * GREETING_TIMEOUT_S * NS_PER_S:
            raise EnforcementError(
                "the control plane has another monotonic clock: run it in the time namespace of "
                "the agent"
            )
        if self._controller is not None and not _hung_up(self._controller):
            raise EnforcementError(
                f"process {_pid(self._controller)} is the control plane already: stop it first"
            )

    async def _answer(self, question: Any) -> tuple[str, Any]:
        try:
            kind, value = question
            return (protocol.DONE, await self._result(kind, value))
        except EnforcementError as error:
            return protocol.refusal(error)
        except (ValueError, TypeError, KeyError) as error:
            raise ProtocolError(f"no question: {error!r}") from error

    async def _result(self, kind: str, value: Any) -> Any:
        match kind:
            case "apply":
                return await self._user_plane.apply(protocol.operations(value))
            case "usage":
                return await self._user_plane.usage(protocol.BINDINGS.validate_python(value))
            case "reconcile":
                return await self._user_plane.reconcile(protocol.BINDINGS.validate_python(value))
            case "enforced":
                return await self._user_plane.enforced()
            case "drops":
                return await self._user_plane.drops()
            case "refuse":
                return await self._user_plane.refuse(*protocol.REFUSED.validate_python(value))
            case "parked":
                return await self._user_plane.parked()
            case _:
                raise ValueError(f"nobody knows how to {kind}")

    async def _status(self) -> dict[str, Any]:
        controller = self._controller
        return {
            "agent": {
                "pid": os.getpid(),
                "protocol": protocol.PROTOCOL,
                "controllerPid": None if controller is None else _pid(controller),
            },
            **self._about,
            "enforced": status.leases(await self._user_plane.enforced()),
            "drops": await self._user_plane.drops(),
        }


def _pid(handle: socket.socket) -> int:
    """Return the process at the other end of a Unix socket."""
    credentials = struct.Struct("3i")
    found = handle.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size)
    return int(credentials.unpack(found)[0])


def _hung_up(handle: socket.socket) -> bool:
    """Whether the other end is closed, though we have not come to read that yet."""
    poll = select.poll()
    poll.register(handle.fileno(), 0)
    return any(events & select.POLLHUP for _, events in poll.poll(0))
