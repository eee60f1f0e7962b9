"""A user plane function in this very process, as the control plane sees one."""

from collections.abc import Iterable, Sequence

from controlplane.enforcement import Binding, Enforced, Operation, Reconciliation, Usage
from upf.gate import Gate


class LocalUserPlane:
    """Implements `controlplane.enforcement.Enforcer` over a gate.

    The kernel answers within tens of microseconds per lease, so that waiting for it costs less
    than going to a thread and back.
    """

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

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
