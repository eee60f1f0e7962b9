"""What the control plane answers: a grant, or a refusal with its cause."""

from collections.abc import Sequence

from controlplane.lease import Lease
from controlplane.resolver import Exclusion, Resolution
from controlplane.values import value


@value(frozen=True, slots=True, kw_only=True)
class Timeline:
    """Instants of one transaction, CLOCK_MONOTONIC ns: each is taken when the step was done."""

    requested_ns: int
    prepared_ns: int  # what it needs is reserved, and the anchor ready
    committed_ns: int  # durable in the evidence log
    enforced_ns: int  # acknowledged by the kernel


@value(frozen=True, slots=True, kw_only=True)
class Grant:
    """The answer to a request that was granted."""

    lease: Lease
    token: str | None  # the AIST; none for QoS alone
    resolution: Resolution  # why here, and why not elsewhere
    timeline: Timeline | None  # None: it had been granted before, under the same idempotency key


class Refusal(Exception):
    """A request that cannot be granted; `cause` is for programs, the message for people."""

    def __init__(
        self,
        cause: str,
        why: str,
        excluded: Sequence[Exclusion] = (),
        *,
        retry_after_s: float | None = None,
    ) -> None:
        self.cause = cause
        self.excluded = tuple(excluded)
        self.retry_after_s = retry_after_s
        super().__init__(why)
