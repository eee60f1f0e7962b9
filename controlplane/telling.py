"""Who is told what of an event: notices to a session's sink, and the stream of everything.

Notices are made before the event is durable and become durable with it; the stream is fed after.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from controlplane import notifications
from controlplane.clock import Clock, rfc3339
from controlplane.codec import Record
from controlplane.event_stream import StreamEvent
from controlplane.evidence import EvidenceLog
from controlplane.facts import Acknowledged, PolicySet, Started, UeMoved, UplinkHeld, UplinkResumed
from controlplane.fleet import (
    AnchorDeregistered,
    AnchorDraining,
    AnchorFailed,
    AnchorRecovered,
    AnchorRegistered,
)
from controlplane.lease import (
    Committed,
    DrainStarted,
    Ended,
    EndReason,
    Prepared,
    Renewed,
    State,
    Terms,
)
from controlplane.ledger import Ledger
from controlplane.notifications import Change, QosStatus, StatusInfo
from controlplane.paging import FIRST_PACKET, PAGE
from controlplane.store import Notice
from controlplane.triggers import Trigger

STATUS_INFO = {
    EndReason.EXPIRED: StatusInfo.DURATION_EXPIRED,
    EndReason.RELEASED: StatusInfo.DELETE_REQUESTED,
}  # of every other reason, NETWORK_TERMINATED
CHANGE_OF_REASON = {EndReason.PREEMPTED: Change.PREEMPTED}
RECOVERY = (Trigger.FAILURE.value,)


class Teller:
    """Makes notices."""

    def __init__(
        self, ledger: Ledger, clock: Clock, api_root: str, with_sink: Collection[str]
    ) -> None:
        """`api_root`: what notices name as their source. `with_sink`: sessions that have one."""
        self._ledger = ledger
        self._clock = clock
        self._api_root = api_root
        self._with_sink = set(with_sink)
        self._unsure: set[str] = (
            set()
        )  # sessions that began or ended with the last write, if it was

    def notices(
        self, events: Sequence[Record], first: int, new_sinks: Iterable[str]
    ) -> list[Notice]:
        """Return the notices that a write calls for. `first`: the index of its first entry.

        None of the events has been folded yet. `new_sinks`: sessions whose sink it brings.
        """
        for session_id in self._unsure:
            session = self._ledger.session(session_id)
            if session is None or not session.live:
                self._with_sink.discard(session_id)
        self._unsure = set(new_sinks)
        self._with_sink |= self._unsure
        if not self._with_sink:
            return []
        fresh = {e.terms.lease_id: e.terms for e in events if isinstance(e, Prepared)}
        granted = {
            self._terms(e.lease_id, fresh).session_id for e in events if isinstance(e, Committed)
        }
        at_unix_ns = self._clock.to_unix_ns(self._clock.now_ns())
        notices: list[Notice] = []
        for index, event in enumerate(events, start=first):
            if not isinstance(event, Committed | Renewed | Ended):
                continue
            terms = self._terms(event.lease_id, fresh)
            if terms.session_id not in self._with_sink:
                continue
            if isinstance(event, Ended):
                if self._ledger.lease(event.lease_id).state is not State.COMMITTED:
                    continue  # a drain, or a preparation: the session goes on
                if terms.session_id in granted:
                    continue  # it was anchored anew
            notices += self._of(event, terms, index, at_unix_ns)
        return notices

    def _terms(self, lease_id: str, fresh: Mapping[str, Terms]) -> Terms:
        """Return the terms of a lease, of which `fresh` are not folded yet."""
        return fresh[lease_id] if lease_id in fresh else self._ledger.lease(lease_id).terms

    def _of(
        self, event: Committed | Renewed | Ended, terms: Terms, index: int, at_unix_ns: int
    ) -> Iterator[Notice]:
        common: dict[str, Any] = {
            "api_root": self._api_root,
            "index": index,
            "at_unix_ns": at_unix_ns,
            "session_id": terms.session_id,
        }
        change, reason, expires_unix_ns = Change.EXTENDED, None, None
        status: dict[str, Any] | None = None
        match event:
            case Committed(_, expires_ns):
                expires_unix_ns = self._clock.to_unix_ns(expires_ns)
                reason = terms.cause
                change = change_of(terms)
                if change is Change.COMMITTED:
                    status = {"status": QosStatus.AVAILABLE}
            case Renewed(_, expires_ns):
                expires_unix_ns = self._clock.to_unix_ns(expires_ns)
            case Ended(_, why):
                reason = why.value
                change = CHANGE_OF_REASON.get(why, Change.ENDED)
                info = STATUS_INFO.get(why, StatusInfo.NETWORK_TERMINATED)
                status = {"status": QosStatus.UNAVAILABLE, "info": info}
        told = notifications.session_changed(
            change,
            lease_id=terms.lease_id,
            epoch=terms.epoch,
            anchor=terms.anchor,
            reason=reason,
            expires_unix_ns=expires_unix_ns,
            **common,
        )
        if terms.request is None:  # CAMARA's clients are told in CAMARA's words only
            yield Notice(terms.session_id, notifications.encode(told), at_unix_ns)
        if status is not None:
            camara = notifications.qos_status_changed(**common, **status)
            over = status["status"] is QosStatus.UNAVAILABLE
            if over:
                self._unsure.add(terms.session_id)
            yield Notice(terms.session_id, notifications.encode(camara), at_unix_ns, over)


def change_of(terms: Terms) -> Change:
    """Return what the COMMIT of a lease under these terms is to its session."""
    if terms.cause in (PAGE, FIRST_PACKET):
        return Change.COMMITTED
    return Change.RECOVERED if terms.cause in RECOVERY else Change.RELOCATED


def stream_event(
    event: Record, index: int, at_unix_ns: int, terms_of: Callable[[str], Terms | None]
) -> StreamEvent:
    """Return an entry as the stream tells it. `terms_of`: of a lease, if they are known."""
    data: dict[str, Any] = {"at": rfc3339(at_unix_ns)}
    terms: Terms | None = None
    kind = type(event).__name__
    match event:
        case Prepared(terms, _):
            pass
        case Committed(lease_id, _) | Renewed(lease_id, _) | DrainStarted(lease_id, _):
            terms = terms_of(lease_id)
        case Ended(lease_id, reason, usage, _):
            terms = terms_of(lease_id)
            data["reason"] = reason.value
            if usage is not None:
                data["uplinkPackets"] = usage.uplink_packets
                data["downlinkPackets"] = usage.downlink_packets
        case AnchorRegistered(anchor, provider):
            data |= {"anchor": anchor.name, "provider": provider}
        case AnchorFailed(name, why):
            data |= {"anchor": name, "reason": why}
        case AnchorDraining(name) | AnchorDeregistered(name) | AnchorRecovered(name):
            data["anchor"] = name
        case UeMoved(ue, cell):
            return StreamEvent(index, kind, data | {"ue": ue, "gnb": cell}, None, ue)
        case PolicySet(tenant, _):
            return StreamEvent(index, kind, data, tenant, None)
        case UplinkHeld(lease_id, _) | UplinkResumed(lease_id):
            terms = terms_of(lease_id)
        case Started() | Acknowledged():
            pass
    if terms is None:
        return StreamEvent(index, kind, data, None, None)
    data |= {
        "sessionId": terms.session_id,
        "leaseId": terms.lease_id,
        "epoch": terms.epoch,
        "ue": terms.ue,
        "aisi": terms.aisi,
        "anchor": terms.anchor,
        "cause": terms.cause,
    }
    return StreamEvent(index, kind, data, terms.tenant, terms.ue)


def replayed(log: EvidenceLog, ledger: Ledger, after: int) -> Iterator[StreamEvent]:
    """Yield what the log has after an entry, as the stream would have told it.

    Of leases that are forgotten, and whose preparation is not among these entries, it tells less.
    """
    known: dict[str, Terms] = {}

    def terms_of(lease_id: str) -> Terms | None:
        held = ledger.find_lease(lease_id)
        return known.get(lease_id) if held is None else held.terms

    for entry in log.entries(after + 1):
        if isinstance(entry.event, Prepared):
            known[entry.event.terms.lease_id] = entry.event.terms
        yield stream_event(entry.event, entry.index, entry.at_ns, terms_of)
