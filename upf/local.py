"""A user plane function in this very process, as the control plane sees one."""

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence

from controlplane.enforcement import (
    Binding,
    Enforced,
    Flow,
    Operation,
    Parked,
    Reconciliation,
    Usage,
)
from upf.buffering import PacketBuffer
from upf.gate import Gate
from upf.nft_socket import BatchError

log = logging.getLogger(__name__)


class LocalUserPlane:
    """Implements `controlplane.enforcement.Enforcer` over a gate, `FirstPackets` over a buffer.

    The kernel answers within tens of microseconds per lease, so that waiting for it costs less
    than going to a thread and back.
    """

    def __init__(self, gate: Gate, buffer: PacketBuffer | None = None) -> None:
        """`buffer`: where packets wait; None: nothing waits, what has no lease is dropped."""
        self._gate = gate
        self._buffer = buffer

    @property
    def table(self) -> str:
        """What tells the gate's tables from those of another version or configuration."""
        return self._gate.comment

    def follow_routes(self, loop: asyncio.AbstractEventLoop) -> None:
        """While the loop runs, keep the fast path's ways as the router's routes to UEs are."""
        if self._gate.paths is not None:
            loop.add_reader(self._gate.paths.fileno(), self._follow_routes)

    def _follow_routes(self) -> None:
        try:
            self._gate.follow_routes()
        except (BatchError, OSError) as error:
            log.error("routes to UEs changed, and the fast path could not follow: %s", error)

    async def apply(self, operations: Sequence[Operation]) -> None:
        """See Gate.apply; what waits and may go on after it does."""
        (self._buffer or self._gate).apply(operations)

    async def usage(self, bindings: Sequence[Binding]) -> dict[str, Usage]:
        """See Gate.usage."""
        return self._gate.usage(bindings)

    async def enforced(self) -> list[Enforced]:
        """See Gate.enforced."""
        return self._gate.enforced()

    async def reconcile(self, live: Iterable[Binding]) -> Reconciliation:
        """See Gate.reconcile."""
        return self._gate.reconcile(live)

    async def drops(self) -> dict[str, int]:
        """See Gate.drops."""
        return self._gate.drops()

    def on_first_packet(self, report: Callable[[Flow], None]) -> None:
        """See FirstPackets."""
        if self._buffer is not None:
            self._buffer.report_to(report)
            self._buffer.start(asyncio.get_running_loop())

    async def refuse(self, flows: Sequence[Flow], backoff_ms: int) -> None:
        """See FirstPackets."""
        if self._buffer is not None:
            self._buffer.refuse(flows, backoff_ms)

    async def parked(self) -> Parked:
        """See FirstPackets."""
        return Parked() if self._buffer is None else self._buffer.counts
