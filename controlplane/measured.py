"""What every transaction leaves for those who run the system: metrics, a log line, a span."""

import logging
import time
from collections.abc import Awaitable
from typing import TypeVar

from controlplane import logs, tracing
from controlplane.answers import Grant, Refusal
from controlplane.metrics import SUCCESS, Metrics, Transaction
from controlplane.triggers import Trigger

Answer = TypeVar("Answer")
KIND_OF_TRIGGER = {
    Trigger.HANDOVER: Transaction.RELOCATION_HANDOVER,
    Trigger.LOAD: Transaction.RELOCATION_LOAD,
    Trigger.LATENCY: Transaction.RELOCATION_LOAD,
    Trigger.FAILURE: Transaction.RELOCATION_RECOVERY,
}  # of the others, RELOCATION_PLANNED
# Pages are many, and all of them are in the evidence log.
_LEVELS = {Transaction.PAGE: logging.DEBUG, Transaction.FIRST_PACKET: logging.DEBUG}
_NO_STEPS: dict[str, int] = {}

log = logging.getLogger(__name__)


class Measured:
    """Runs transactions and tells how they went."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    async def run(
        self, kind: Transaction, work: Awaitable[Answer], **context: str | None
    ) -> Answer:
        """Return the answer of `work`. `context` says what it is about: UE, session, tenant."""
        known = {name: value for name, value in context.items() if value is not None}
        started_ns = time.monotonic_ns()
        with logs.bind(**known), tracing.span(kind.value, **known):
            try:
                answer = await work
            except Refusal as refusal:
                took_ns = time.monotonic_ns() - started_ns
                self._metrics.transaction(kind, refusal.cause, took_ns, _NO_STEPS)
                if refusal.cause == "RATE_LIMITED" and "tenant" in known:
                    self._metrics.rate_limited(known["tenant"])
                log.info("%s refused: %s", kind, refusal.cause)
                raise
            took_ns = time.monotonic_ns() - started_ns
            steps = _steps(answer) if isinstance(answer, Grant) else _NO_STEPS
            self._metrics.transaction(kind, SUCCESS, took_ns, steps)
            level = _LEVELS.get(kind, logging.INFO)
            if log.isEnabledFor(level):
                log.log(level, "%s done", kind, extra=_what(answer))
            return answer


def _steps(grant: Grant) -> dict[str, int]:
    times = grant.timeline
    if times is None:
        return _NO_STEPS
    return {
        "prepare": times.prepared_ns - times.requested_ns,
        "commit": times.committed_ns - times.prepared_ns,
        "enforce": times.enforced_ns - times.committed_ns,
    }


def _what(answer: object) -> dict[str, object]:
    if not isinstance(answer, Grant):
        return {}
    terms = answer.lease.terms
    return {
        "session_id": terms.session_id,
        "lease_id": terms.lease_id,
        "epoch": terms.epoch,
        "anchor": terms.anchor,
        "cause": terms.cause,
    }
