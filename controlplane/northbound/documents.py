"""What the API says of things: sessions, grants, anchors, profiles, as JSON values.

Session fields are CAMARA Quality-on-Demand's where it has a word for them.
"""

from typing import Any

import orjson
from starlette.responses import JSONResponse

from controlplane.addresses import text_of
from controlplane.answers import Grant
from controlplane.catalogue import Anchor
from controlplane.clock import NS_PER_S, Clock, rfc3339
from controlplane.controller import Controller
from controlplane.lease import EndReason, Lease, State
from controlplane.ledger import Session
from controlplane.resolver import AnchorView

STATUS_INFO = {
    EndReason.EXPIRED: "DURATION_EXPIRED",
    EndReason.RELEASED: "DELETE_REQUESTED",
}  # CAMARA; everything else is NETWORK_TERMINATED


class Json(JSONResponse):
    """JSON, written in a tenth of the time; dataclasses are objects."""

    def render(self, content: Any) -> bytes:
        """Return the body."""
        return orjson.dumps(content)


def commit(clock: Clock, held: Lease) -> dict[str, Any]:
    """Return a COMMIT."""
    terms = held.terms
    document: dict[str, Any] = {
        "leaseId": terms.lease_id,
        "epoch": terms.epoch,
        "anchor": terms.anchor,
        "qosProfile": terms.qos_profile,
        "cause": terms.cause,
        "state": held.state.value,
        "expiresAt": rfc3339(clock.to_unix_ns(held.deadline_ns)),
    }
    if held.end_reason is not None:
        document["endReason"] = held.end_reason.value
    if held.usage is not None:
        document["usage"] = {
            "uplinkPackets": held.usage.uplink_packets,
            "uplinkBytes": held.usage.uplink_bytes,
            "downlinkPackets": held.usage.downlink_packets,
            "downlinkBytes": held.usage.downlink_bytes,
        }
    return document


def qos_status(controller: Controller, session: Session) -> dict[str, Any]:
    """Return qosStatus, statusInfo, startedAt, expiresAt and duration, as CAMARA defines them."""
    clock, ledger = controller.clock, controller.ledger
    held = ledger.committed(session)
    if held is None:
        held = ledger.leases_of(session)[-1]
    if session.started_ns is None:
        return {"qosStatus": "REQUESTED", "duration": 1}
    document: dict[str, Any] = {"startedAt": rfc3339(clock.to_unix_ns(session.started_ns))}
    if held.state is State.COMMITTED:
        expires_ns = held.deadline_ns
        document["qosStatus"] = "AVAILABLE"
    else:
        expires_ns = session.ended_ns or held.deadline_ns
        reason = held.end_reason
        document["qosStatus"] = "UNAVAILABLE"
        document["statusInfo"] = (
            "NETWORK_TERMINATED"
            if reason is None
            else STATUS_INFO.get(reason, "NETWORK_TERMINATED")
        )
    document["expiresAt"] = rfc3339(clock.to_unix_ns(expires_ns))
    # CAMARA: whole seconds, at least 1
    document["duration"] = max(1, round((expires_ns - session.started_ns) / NS_PER_S))
    return document


def session(controller: Controller, found: Session) -> dict[str, Any]:
    """Return a session and its leases, the oldest first."""
    leases = controller.ledger.leases_of(found)
    return {
        "sessionId": found.session_id,
        "tenant": found.tenant,
        "ue": found.ue,
        "aisi": found.aisi,
        "qosProfile": leases[-1].terms.qos_profile,
        **qos_status(controller, found),
        "commits": [commit(controller.clock, held) for held in leases],
    }


def grant(controller: Controller, granted: Grant) -> dict[str, Any]:
    """Return the answer to a page or a relocation: what was granted, and why it is there."""
    terms = granted.lease.terms
    service = controller.catalogue.service(terms.aisi)
    found = controller.session(terms.session_id)
    document: dict[str, Any] = {
        "sessionId": terms.session_id,
        "tenant": terms.tenant,
        "ue": terms.ue,
        "aisi": terms.aisi,
        "model": service.model,
        "serviceAddress": {"ipv4": text_of(service.address4), "ipv6": text_of(service.address6)},
        "servicePort": service.port,
        "qosProfile": terms.qos_profile,
        **qos_status(controller, found),
        "commit": commit(controller.clock, granted.lease),
        "candidates": [
            {
                "aisi": candidate.service.aisi,
                "anchor": candidate.anchor.name,
                "latencyMs": candidate.latency_ms,
                "score": round(candidate.score, 6),
            }
            for candidate in granted.resolution.candidates
        ],
        "excluded": granted.resolution.excluded,
    }
    if granted.token is not None:
        document["aist"] = granted.token
    if granted.timeline is not None:
        unix, timeline = controller.clock.to_unix_ns, granted.timeline
        document["timeline"] = {
            "requestedUnixNs": unix(timeline.requested_ns),
            "preparedUnixNs": unix(timeline.prepared_ns),
            "committedUnixNs": unix(timeline.committed_ns),
            "enforcedUnixNs": unix(timeline.enforced_ns),
        }
    return document


def anchor(view: AnchorView, provider: str) -> dict[str, Any]:
    """Return an anchor as it is now."""
    described: Anchor = view.anchor
    return {
        **described.model_dump(mode="json", by_alias=True),
        "provider": provider,
        "state": view.state.value,
        "slotsUsed": view.slots_used,
        "load": view.load,
        "measuredLatencyMs": view.latency_ms,
        "readyAisis": None if view.ready_aisis is None else sorted(view.ready_aisis),
    }
