"""A user plane function in a process of its own, as the control plane sees it (see `upf.agent`).

When the agent goes away, what was asked and not answered fails: nobody knows whether the kernel had
it. What is asked next waits a little for an agent that only restarts. When it is back, its owner is
told, and has to reconcile.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

from controlplane.enforcement import (
    Binding,
    Enforced,
    EnforcementError,
    Flow,
    Operation,
    Parked,
    Reconciliation,
    Usage,
)
from upf import protocol
from upf.protocol import ProtocolError

PATIENCE_S = 5.0  # for which an agent may be away before what is asked of it fails
RETRY_S, MOST_RETRY_S = 0.02, 0.1
ANSWER_TIMEOUT_S = 30.0  # more than the largest reconciliation takes; then the agent is stuck

log = logging.getLogger(__name__)


class RemoteUserPlane:
    """Implements `controlplane.enforcement.Enforcer` and `FirstPackets` over an agent's socket.

    An async context manager; not thread-safe: one event loop owns it.
    """

    def __init__(self, path: Path) -> None:
        """`path`: the agent's socket."""
        self.path = path
        self.reconnected: Callable[[], None] = lambda: None  # the kernel may not be as one left it
        self._connection: _Connection | None = None
        self._report: Callable[[Flow], None] = lambda flow: None
        self._back = asyncio.Event()
        self._lost_at = 0.0  # loop time
        self._keeper: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Connect. Raises EnforcementError if nobody is there, or the agent wants no part of us."""
        try:
            self._connection = await _Connection.open(self.path, self._first_packet)
        except OSError as error:
            raise EnforcementError(
                f"no user plane at {self.path} ({error.strerror}): start 'aipaging upf', as root"
            ) from error
        self._back.set()
        self._keeper = asyncio.create_task(self._keep(), name="user plane")
        return self

    async def __aexit__(self, *_: object) -> None:
        """Hang up; leases live on."""
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        if self._connection is not None:
            self._connection.close()

    # Enforcer

    async def apply(self, operations: Sequence[Operation]) -> None:
        """See Gate.apply."""
        await self._ask("apply", protocol.tagged(operations))

    async def usage(self, bindings: Sequence[Binding]) -> dict[str, Usage]:
        """See Gate.usage."""
        return protocol.USAGE.validate_python(await self._ask("usage", bindings))

    async def enforced(self) -> list[Enforced]:
        """See Gate.enforced."""
        return protocol.ENFORCED.validate_python(await self._ask("enforced", None))

    async def reconcile(self, live: Iterable[Binding]) -> Reconciliation:
        """See Gate.reconcile."""
        return protocol.RECONCILIATION.validate_python(await self._ask("reconcile", list(live)))

    async def drops(self) -> dict[str, int]:
        """See Gate.drops."""
        return protocol.DROPS.validate_python(await self._ask("drops", None))

    # FirstPackets

    def on_first_packet(self, report: Callable[[Flow], None]) -> None:
        """See FirstPackets."""
        self._report = report

    async def refuse(self, flows: Sequence[Flow], backoff_ms: int) -> None:
        """See FirstPackets."""
        await self._ask("refuse", (flows, backoff_ms))

    async def parked(self) -> Parked:
        """See FirstPackets."""
        return protocol.PARKED.validate_python(await self._ask("parked", None))

    def _first_packet(self, flow: Flow) -> None:
        self._report(flow)

    async def _ask(self, kind: str, value: object) -> Any:
        if self._connection is None:
            left_s = self._lost_at + PATIENCE_S - asyncio.get_running_loop().time()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(left_s, 2 * MOST_RETRY_S)):
                    await self._back.wait()
        if self._connection is None:
            raise EnforcementError(f"the user plane's agent at {self.path} is away")
        return await self._connection.ask(kind, value)

    async def _keep(self) -> None:
        """Hear answers; connect anew when the agent has gone."""
        while True:
            assert self._connection is not None
            why = await self._connection.hear()
            self._connection.close()
            self._connection = None
            self._back.clear()
            self._lost_at = asyncio.get_running_loop().time()
            log.error("the user plane's agent has gone (%s); leases live on in the kernel", why)
            self._connection = await self._connect()
            self._back.set()
            log.info("the user plane's agent is back")
            self.reconnected()

    async def _connect(self) -> "_Connection":
        retry_s, said = RETRY_S, ""
        while True:
            try:
                return await _Connection.open(self.path, self._first_packet)
            except (OSError, EnforcementError) as error:
                if isinstance(error, EnforcementError) and str(error) != said:
                    said = str(error)
                    log.error("%s", said)
            await asyncio.sleep(retry_s)
            retry_s = min(2 * retry_s, MOST_RETRY_S)


class _Connection:
    """One connection: questions out, their answers in the same order."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        report: Callable[[Flow], None],
    ) -> None:
        self._report = report
        self._reader = reader
        self._writer = writer
        self._waiting: deque[asyncio.Future[Any]] = deque()
        self._over = False

    @classmethod
    async def open(cls, path: Path, report: Callable[[Flow], None]) -> Self:
        """Connect and greet. Raises OSError; EnforcementError if the agent refuses."""
        reader, writer = await asyncio.open_unix_connection(str(path))
        made = cls(reader, writer, report)
        try:
            greeting = protocol.Greeting(
                protocol=protocol.PROTOCOL, role="controller", now_ns=time.monotonic_ns()
            )
            writer.write(protocol.encode(greeting.model_dump()))
            protocol.result(await protocol.read(reader))
        except BaseException as error:
            made.close()
            if isinstance(error, EOFError):
                raise ConnectionResetError(0, "it hung up") from error
            if isinstance(error, ProtocolError):
                raise EnforcementError(f"{path} is no user plane agent's: {error}") from error
            raise
        return made

    def close(self) -> None:
        self._over = True
        self._writer.close()

    async def ask(self, kind: str, value: object) -> Any:
        """Return the result of a question. Raises EnforcementError."""
        if self._over:
            raise EnforcementError("the user plane's agent has gone")
        answer = asyncio.get_running_loop().create_future()
        self._waiting.append(answer)
        self._writer.write(protocol.encode((kind, value)))
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                return protocol.result(await answer)
        except TimeoutError:
            self.close()
            raise EnforcementError("the user plane's agent does not answer") from None

    async def hear(self) -> str:
        """Pass answers on until the connection ends; fail what is not answered; return why."""
        try:
            while True:
                answer = await protocol.read(self._reader)
                if (flow := protocol.first_packet(answer)) is not None:
                    self._report(flow)
                    continue
                waiting = self._waiting.popleft()
                if not waiting.done():  # it may have been cancelled
                    waiting.set_result(answer)
        except EOFError:
            why = "it hung up"
        except (OSError, ProtocolError, IndexError) as error:
            why = str(error)
        finally:
            self._over = True
            lost = EnforcementError("the user plane's agent has gone, with or without doing it")
            for waiting in self._waiting:
                if not waiting.done():
                    waiting.set_exception(lost)
        return why
