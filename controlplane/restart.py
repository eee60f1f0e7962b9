"""A start: what an earlier process left is made whole before anything new is decided."""

import secrets

from controlplane import lease
from controlplane.committer import Change
from controlplane.controller import Controller
from controlplane.enforcement import Reconciliation
from controlplane.facts import Started
from controlplane.lease import Lease, State


async def recover(controller: Controller) -> Reconciliation:
    """Roll back what was only prepared, end what is overdue, reconcile the kernel."""
    now_ns = controller.clock.now_ns()
    outcomes = []
    steering: dict[str, Lease] = {}  # by session
    for held in list(controller.ledger.live()):
        command: lease.Command = lease.Tick()
        if held.state is State.PREPARED:
            command = lease.Abort()
        elif (
            held.state is State.COMMITTED
            and steering.setdefault(held.terms.session_id, held) is not held
        ):
            raise AssertionError("two committed leases of a session: the log is not atomic")
        outcomes.append(lease.step(held, command, now_ns))
    ended = controller.closing(outcomes).events
    await controller.committer.submit(Change([Started(secrets.token_hex(4)), *ended]))
    return await controller.committer.reconcile()
