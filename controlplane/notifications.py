"""What sinks are told: events of sessions as CloudEvents 1.0, structured mode, JSON.

Pure: facts in, event out. An event's `id` follows from the entry of the evidence log that it tells
of and from its type, so an event that is sent again, or made again, has the same id.
"""

import json
from enum import StrEnum
from typing import Any

from controlplane.clock import rfc3339

CONTENT_TYPE = "application/cloudevents+json"  # structured mode (CloudEvents JSON format 1.0.2, 3)
QOS_STATUS_CHANGED = "org.camaraproject.quality-on-demand.v1.qos-status-changed"
SESSION_EVENTS = "org.ai-paging.session.v1"  # followed by a dot and a `Change`


class QosStatus(StrEnum):
    """CAMARA Quality-on-Demand, EventQosStatus."""

    AVAILABLE = "AVAILABLE"
    UNAVAILABLE = "UNAVAILABLE"


class StatusInfo(StrEnum):
    """CAMARA Quality-on-Demand, StatusInfo: why a session is UNAVAILABLE."""

    DURATION_EXPIRED = "DURATION_EXPIRED"
    NETWORK_TERMINATED = "NETWORK_TERMINATED"
    DELETE_REQUESTED = "DELETE_REQUESTED"


class Change(StrEnum):
    """What happened to a session."""

    COMMITTED = "committed"
    RELOCATED = "relocated"
    EXTENDED = "extended"
    ENDED = "ended"
    PREEMPTED = "preempted"
    RECOVERED = "recovered"


def qos_status_changed(
    *,
    api_root: str,
    index: int,
    at_unix_ns: int,
    session_id: str,
    status: QosStatus,
    info: StatusInfo | None = None,
) -> dict[str, Any]:
    """Return CAMARA's EventQosStatusChanged, told by entry `index`.

    ValueError if there is an `info` although the session is available.
    """
    if info is not None and status is not QosStatus.UNAVAILABLE:
        raise ValueError(f"statusInfo {info} does not go with {status}")
    data = {"sessionId": session_id, "qosStatus": status, "statusInfo": info}
    return _event(api_root, QOS_STATUS_CHANGED, index, at_unix_ns, data)


def session_changed(
    change: Change,
    *,
    api_root: str,
    index: int,
    at_unix_ns: int,
    session_id: str,
    lease_id: str,
    epoch: int,
    anchor: str | None = None,
    reason: str | None = None,
    expires_unix_ns: int | None = None,
) -> dict[str, Any]:
    """Return our own event of a session, told by entry `index`.

    What is None is left out: `anchor` of a session about QoS alone, `expires_unix_ns` of a lease
    that is over, a `reason` where there is none.
    """
    data = {
        "sessionId": session_id,
        "leaseId": lease_id,
        "epoch": epoch,
        "anchor": anchor,
        "reason": reason,
        "at": rfc3339(at_unix_ns),
        "expiresAt": None if expires_unix_ns is None else rfc3339(expires_unix_ns),
    }
    return _event(api_root, f"{SESSION_EVENTS}.{change}", index, at_unix_ns, data)


def encode(event: dict[str, Any]) -> bytes:
    """Return the body of a notice."""
    return json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode()


def _event(
    source: str, kind: str, index: int, at_unix_ns: int, data: dict[str, Any]
) -> dict[str, Any]:
    return {
        "specversion": "1.0",
        "id": f"{index}-{kind.rpartition('.')[2]}",
        "source": source,
        "type": kind,
        "time": rfc3339(at_unix_ns),
        "datacontenttype": "application/json",
        "data": {name: value for name, value in data.items() if value is not None},
    }
