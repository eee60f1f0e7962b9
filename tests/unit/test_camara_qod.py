"""CAMARA Quality-on-Demand: the life of a session. All answers are checked by the definition."""

import asyncio
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from camara import DEVICE, SERVER, ask, body, create, error, servers, validate, without
from served import Api
from test_camara_errors import network_ends

from controlplane.enforcement import Move, Operation
from upf.flows import NO_LEASE, FlowState, flow_key, next_state, subject

EVENT = "file:///API_definitions/quality-on-demand.yaml"


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with Api(tmp_path) as api:
        yield api


def listed(api: Api, by: str = "clinic") -> list[str]:
    asked = {} if by.startswith("ue") else {"device": DEVICE}
    found = ask(api, "retrieveSessionsByDevice", asked, by=by).json()
    return [session["sessionId"] for session in found]


def test_a_session_is_created_read_extended_listed_and_deleted(api: Api) -> None:
    created = create(api)
    assert (created["qosStatus"], created["duration"]) == ("AVAILABLE", 600)
    assert {name: created[name] for name in body()} == body()
    binding = next(iter(api.user_plane.open.values()))
    assert binding.anchor is None  # nothing is steered
    assert [str(flow.service) for flow in binding.flows] == [SERVER]
    session_id = created["sessionId"]
    assert ask(api, "getSession", of=session_id).json() == created
    more = {"requestedAdditionalDuration": 100}
    extended = ask(api, "extendQosSessionDuration", more, of=session_id)
    assert extended.json()["duration"] == 700
    assert listed(api) == [session_id]
    assert ask(api, "deleteSession", of=session_id).status_code == 204
    assert not api.user_plane.open
    assert error(ask(api, "getSession", of=session_id)) == (404, "NOT_FOUND")
    assert error(ask(api, "deleteSession", of=session_id)) == (404, "NOT_FOUND")
    assert listed(api) == []
    create(api)  # and may be asked for again


def test_flows_of_both_families_are_from_the_ues_own_addresses(api: Api) -> None:
    create(api, servers("2001:db8::7", SERVER))
    flows = next(iter(api.user_plane.open.values())).flows
    assert [(str(flow.ue), str(flow.service)) for flow in flows] == [
        ("10.45.0.1", SERVER),
        ("fd00:45::1", "2001:db8::7"),
    ]
    both = {"ipv4Address": "203.0.113.8/32", "ipv6Address": "2001:db8::8/128"}
    assert create(api, body(applicationServer=both))["applicationServer"] == both


def test_an_extension_is_capped_at_the_profiles_maximum_and_says_so(api: Api) -> None:
    session_id = create(api)["sessionId"]
    for _ in range(2):
        most = {"requestedAdditionalDuration": 2**31 - 1}
        shown = ask(api, "extendQosSessionDuration", most, of=session_id).json()
        assert shown["duration"] == 3600
    started = datetime.fromisoformat(shown["startedAt"][:26] + "+00:00")
    expires = datetime.fromisoformat(shown["expiresAt"][:26] + "+00:00")
    assert abs(expires - started - timedelta(hours=1)) < timedelta(milliseconds=2)
    assert started <= datetime.now(UTC)


def test_one_of_several_identifiers_is_used_and_named(api: Api) -> None:
    device = {"phoneNumber": "+4912345678", "ipv6Address": "fd00:45::3", **DEVICE}
    assert create(api, body(device=device))["device"] == DEVICE
    del device["ipv4Address"]
    assert create(api, body(device=device))["device"] == {"ipv6Address": "fd00:45::3"}


def test_a_ue_that_calls_for_itself_needs_no_identifier(api: Api) -> None:
    created = create(api, without("device"), by="ue4")
    assert "device" not in created
    assert [str(flow.ue) for b in api.user_plane.open.values() for flow in b.flows] == ["10.45.0.4"]
    assert listed(api, by="ue4") == [created["sessionId"]]


def test_only_who_has_created_a_session_sees_it(api: Api) -> None:
    """The UE that it is about does not, if another tenant has created it."""
    session_id = create(api)["sessionId"]
    more = {"requestedAdditionalDuration": 1}
    for by in ("garage", "ue1", "ue2"):
        for operation, asked in (
            ("getSession", None),
            ("deleteSession", None),
            ("extendQosSessionDuration", more),
        ):
            answer = ask(api, operation, asked, by=by, of=session_id)
            assert error(answer) == (404, "NOT_FOUND")
        assert listed(api, by=by) == []
    assert ask(api, "getSession", of=session_id).status_code == 200


def test_a_session_that_was_paged_for_is_not_there(api: Api) -> None:
    paged = api.page("ue1", by="clinic")["sessionId"]
    assert error(ask(api, "getSession", of=paged)) == (404, "NOT_FOUND")
    assert listed(api) == []


def test_a_session_that_the_network_ended_stands_in_the_way_until_it_is_deleted(api: Api) -> None:
    session_id = network_ends(api)
    assert api.call("PUT", "/tenants/clinic/policy", {}).is_success
    shown = ask(api, "getSession", of=session_id).json()
    assert (shown["qosStatus"], shown["statusInfo"]) == ("UNAVAILABLE", "NETWORK_TERMINATED")
    assert listed(api) == [session_id]
    assert error(ask(api, "createSession", body())) == (409, "CONFLICT")
    assert ask(api, "createSession", body(), by="garage").status_code == 201  # it is not theirs
    create(api, servers("203.0.113.8"))  # nor is this the same flow
    assert ask(api, "deleteSession", of=session_id).status_code == 204
    assert error(ask(api, "getSession", of=session_id)) == (404, "NOT_FOUND")
    assert session_id not in listed(api)


def test_a_session_that_expired_is_shown_and_in_nobodys_way(api: Api) -> None:
    session_id = create(api, body(duration=1))["sessionId"]
    api.run(_over(api, session_id))
    shown = ask(api, "getSession", of=session_id).json()
    assert (shown["qosStatus"], shown["statusInfo"]) == ("UNAVAILABLE", "DURATION_EXPIRED")
    assert shown["duration"] == 1
    assert listed(api) == []
    create(api)
    assert ask(api, "deleteSession", of=session_id).status_code == 204


async def _over(api: Api, session_id: str) -> None:
    async with asyncio.timeout(5):
        while api.plane.controller.session(session_id).live:
            await asyncio.sleep(0.005)


def test_another_server_is_no_conflict(api: Api) -> None:
    create(api, servers("203.0.113.9", SERVER))
    assert error(ask(api, "createSession", body())) == (409, "CONFLICT")
    create(api, servers("203.0.113.10"))


def test_no_order_of_server_lists_is_fenced_off(api: Api) -> None:
    """The gate fences by flow: a server's next lease is above its last, in whichever list."""
    states: dict[bytes, FlowState] = {}

    async def apply(operations: list[Operation]) -> None:
        for operation in operations:
            assert not isinstance(operation, Move)
            for key in map(flow_key, subject(operation).flows):
                states[key] = next_state(operation, states.get(key, NO_LEASE), 0)

    api.user_plane.apply = apply  # type: ignore[assignment,method-assign]
    for asked in (servers("203.0.113.1", SERVER), servers("203.0.113.1", SERVER), servers(SERVER)):
        created = create(api, asked)
        assert ask(api, "deleteSession", of=created["sessionId"]).status_code == 204


def test_bandwidth_is_reserved_in_the_cell(api: Api) -> None:
    for number in range(4):  # of 1 Mbit/s each, in a cell of 4
        create(api, servers(f"203.0.113.{number}"))
    answer = ask(api, "createSession", servers("203.0.113.9"))
    assert error(answer) == (422, "SERVICE_NOT_APPLICABLE")
    assert "cellDownlink of gnb1" in answer.json()["message"]


def test_the_same_request_under_a_key_is_granted_once(api: Api) -> None:
    def keyed(asked: dict[str, Any]) -> Any:
        return ask(api, "createSession", asked, headers={"idempotency-key": "k1"})

    first = keyed(body()).json()
    assert keyed(body()).json() == first
    assert error(keyed(body(duration=601))) == (409, "CONFLICT")
    ask(api, "deleteSession", of=first["sessionId"])
    again = keyed(body()).json()
    assert again["sessionId"] == first["sessionId"]
    assert (again["qosStatus"], again["statusInfo"]) == ("UNAVAILABLE", "DELETE_REQUESTED")
    assert not api.user_plane.open


def test_a_sink_is_told_in_camaras_words_only(api: Api) -> None:
    told: list[tuple[str, dict[str, Any]]] = []

    async def sink(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.partition("content-length:")[2].split("\r\n")[0])
        told.append((head, json.loads(await reader.readexactly(length))))
        writer.write(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
        writer.close()

    async def received(count: int) -> None:
        async with asyncio.timeout(5):
            while len(told) < count:
                await asyncio.sleep(0.005)

    server = api.run(asyncio.start_server(sink, "127.0.0.1", 0))
    port = server.sockets[0].getsockname()[1]
    asked = body(
        sink=f"http://127.0.0.1:{port}/",
        sinkCredential={
            "credentialType": "ACCESSTOKEN",
            "accessToken": "secret-token",
            "accessTokenExpiresUtc": "2999-01-01T00:00:00Z",
            "accessTokenType": "bearer",
        },
    )
    # Not `create`: the definition allows https only.
    created = api.call("POST", "/quality-on-demand/vwip/sessions", asked, by="clinic")
    assert created.json()["sink"] == asked["sink"]
    assert "secret-token" not in created.text
    session_id = created.json()["sessionId"]
    api.run(received(1))
    ask(api, "deleteSession", of=session_id)
    api.run(received(2))
    server.close()
    for head, event in told:
        assert "content-type: application/cloudevents+json" in head
        assert "authorization: bearer secret-token" in head
        validate({"$ref": "#/components/schemas/EventQosStatusChanged"}, event, EVENT)
    assert [event["data"] for _, event in told] == [
        {"sessionId": session_id, "qosStatus": "AVAILABLE"},
        {"sessionId": session_id, "qosStatus": "UNAVAILABLE", "statusInfo": "DELETE_REQUESTED"},
    ]
