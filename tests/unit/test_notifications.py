"""CloudEvents: as CAMARA defines them, read by the CloudEvents SDK, the same when made again."""

from typing import Any

import pytest
from cloudevents.core.bindings.http import HTTPMessage, from_structured
from cloudevents.core.formats.json import JSONFormat

from controlplane.notifications import (
    CONTENT_TYPE,
    Change,
    QosStatus,
    StatusInfo,
    encode,
    qos_status_changed,
    session_changed,
)

AT = 1_700_000_000_123_456_789


def ended(**changed: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "api_root": "http://core.example/quality-on-demand/v1",
        "index": 4711,
        "at_unix_ns": AT,
        "session_id": "123e4567-e89b-12d3-a456-426614174000",
        "status": QosStatus.UNAVAILABLE,
        "info": StatusInfo.DURATION_EXPIRED,
    }
    return qos_status_changed(**facts | changed)


def test_a_status_change_is_what_camara_defines() -> None:
    assert ended() == {
        "specversion": "1.0",
        "id": "4711-qos-status-changed",
        "source": "http://core.example/quality-on-demand/v1",
        "type": "org.camaraproject.quality-on-demand.v1.qos-status-changed",
        "time": "2023-11-14T22:13:20.123456789Z",
        "datacontenttype": "application/json",
        "data": {
            "sessionId": "123e4567-e89b-12d3-a456-426614174000",
            "qosStatus": "UNAVAILABLE",
            "statusInfo": "DURATION_EXPIRED",
        },
    }
    available = ended(status=QosStatus.AVAILABLE, info=None)
    assert set(available["data"]) == {"sessionId", "qosStatus"}
    with pytest.raises(ValueError, match="statusInfo"):  # CAMARA: only when UNAVAILABLE
        ended(status=QosStatus.AVAILABLE)


def test_a_session_event_says_where_and_why_and_leaves_out_what_is_not() -> None:
    facts: dict[str, Any] = {
        "api_root": "http://core.example/",
        "index": 12,
        "at_unix_ns": AT,
        "session_id": "s",
        "lease_id": "l",
        "epoch": 3,
    }
    moved = session_changed(
        Change.RELOCATED, **facts, anchor="edge2", reason="LOAD", expires_unix_ns=AT + 10**9
    )
    assert moved["type"] == "org.ai-paging.session.v1.relocated"
    assert moved["data"] == {
        "sessionId": "s",
        "leaseId": "l",
        "epoch": 3,
        "anchor": "edge2",
        "reason": "LOAD",
        "at": "2023-11-14T22:13:20.123456789Z",
        "expiresAt": "2023-11-14T22:13:21.123456789Z",
    }
    for_qos_alone = session_changed(Change.COMMITTED, **facts)
    assert set(for_qos_alone["data"]) == {"sessionId", "leaseId", "epoch", "at"}


def test_the_id_is_the_same_again_and_differs_by_entry_and_by_type() -> None:
    facts: dict[str, Any] = {"api_root": "r", "at_unix_ns": AT, "session_id": "s"}
    lease: dict[str, Any] = {"lease_id": "l", "epoch": 1}
    assert encode(ended()) == encode(ended())
    ids = {
        event["id"]
        for index in (1, 11)
        for event in (
            ended(index=index),
            session_changed(Change.ENDED, index=index, **facts, **lease),
            session_changed(Change.PREEMPTED, index=index, **facts, **lease),
        )
    }
    assert len(ids) == 6


def test_the_sdk_reads_it() -> None:
    message = HTTPMessage({"content-type": CONTENT_TYPE}, encode(ended(session_id="größe")))
    event = from_structured(message, JSONFormat())
    attributes = event.get_attributes()
    assert attributes["id"] == "4711-qos-status-changed"
    assert attributes["time"].isoformat() == "2023-11-14T22:13:20.123456+00:00"
    data = event.get_data()
    assert isinstance(data, dict)
    assert data["sessionId"] == "größe"
