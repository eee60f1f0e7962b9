"""Drains: a session has moved to another anchor, and what it has open here is to end by a deadline.

Until then connections end by themselves, each in the way of its protocol (`Connection`). What is
left shortly before the deadline is closed from here: at the deadline the kernel of the UPF stops
passing its packets, which is silent for the client.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, NoReturn, Protocol

# So long before the deadline connections are closed: the close, and once its retransmission, has to
# pass while the drain lives.
LEAD_S = 0.25

Address = IPv4Address | IPv6Address
Ends = tuple[Address, Address]  # of a connection: the peer's address, and ours


class Connection(Protocol):
    """What a drain needs of a connection."""

    @property
    def ends(self) -> Ends:
        """Whose it is, and to which service."""

    def drain(self, patience_s: float) -> None:
        """Let what is under way go on, and the client know that it shall connect anew.

        `patience_s`: for a moment that suits every client. May be called again.
        """

    def cut(self) -> None:
        """Close at once, in a way that the client notices."""


@dataclass(frozen=True, slots=True)
class _Drain:
    flows: frozenset[Ends]
    until_unix_s: float


class Drainer:
    """The connections of an anchor, and which of them drain."""

    def __init__(self) -> None:
        self._connections: set[Connection] = set()
        self._drains: dict[tuple[str, str], _Drain] = {}  # by `sub` and `aud`
        self._changed = asyncio.Event()

    def heed(self, revocations: Iterable[Mapping[str, Any]]) -> None:
        """Take in what the control plane says (`controlplane.revocations`).

        ValueError if it cannot be understood.
        """
        for revocation in revocations:
            session = revocation["sub"], revocation["aud"]
            if "flows" not in revocation:  # it has come back, or has ended
                self._drains.pop(session, None)
                continue
            flows = frozenset((ip_address(ue), ip_address(to)) for ue, to in revocation["flows"])
            drain = self._drains[session] = _Drain(flows, revocation["nbf"])
            for connection in self._connections:
                self._tell(connection, drain)
        self._changed.set()

    def opened(self, connection: Connection) -> None:
        """Take it that a connection was made."""
        self._connections.add(connection)
        for drain in self._drains.values():  # it may have begun before the move
            self._tell(connection, drain)

    def closed(self, connection: Connection) -> None:
        """Take it that a connection has ended."""
        self._connections.discard(connection)

    async def run(self, ask: Callable[[], Awaitable[None]]) -> NoReturn:
        """Cut what is left of drains, until cancelled.

        `ask` brings what the control plane knows by now: a session may just have come back.
        """
        while True:
            self._changed.clear()
            due_s = min((drain.until_unix_s for drain in self._drains.values()), default=None)
            with suppress(TimeoutError):
                wait_s = None if due_s is None else max(due_s - LEAD_S - time.time(), 0)
                await asyncio.wait_for(self._changed.wait(), wait_s)
                continue
            await ask()
            self._end(time.time())

    def _end(self, now_unix_s: float) -> None:
        for session, drain in list(self._drains.items()):
            if drain.until_unix_s - LEAD_S <= now_unix_s:
                del self._drains[session]
                for connection in list(self._connections):
                    if connection.ends in drain.flows:
                        connection.cut()

    @staticmethod
    def _tell(connection: Connection, drain: _Drain) -> None:
        if connection.ends in drain.flows:
            connection.drain(max(drain.until_unix_s - LEAD_S - time.time(), 0) / 2)
