"""A user plane function in this very process, as the control plane sees one."""

import asyncio
import logging
from collections.abc import Iterable, Sequence

from controlplane.enforcement import Binding, Enforced, Operation, Reconciliation, Usage
from upf.gate import Gate
from upf.nft_socket import BatchError

log = logging.getLogger(__name__)


class LocalUserPlane:
    """Implements `controlplane.enforcement.Enforcer` over a gate.

    The kernel answers within tens of microseconds per lease, so that waiting for it costs less
    than going to a thread and back.
    """

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def follow_routes(self, loop: asyncio.AbstractEventLoop) -> None:
        """Keep the fast path's way to each UE as the router's routes are, while the loop runs."""
        if self._gate.paths is not None:
            loop.add_reader(self._gate.paths.fileno(), self._follow_routes)

    def _follow_routes(self) -> None:
        try:
            self._gate.follow_routes()
        except (BatchError, OSError) as error:
            log.error("routes to UEs changed, and the fast path could not follow: %s", error)

    async def apply(self, operations: Sequence[Operation]) -> None:
        """See Gate.apply."""
        self._gate.apply(operations)

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
