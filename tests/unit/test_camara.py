"""CAMARA Quality-on-Demand and QoS Profiles: answers and errors as the definitions have them."""

import asyncio
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openapi_schema_validator import OAS30Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT4
from served import Api

from controlplane.policy import Policy, Tenant

DEFINITIONS = Path(__file__).parents[1] / "data" / "camara"
QOD, PROFILES = "/quality-on-demand/vwip", "/qos-profiles/vwip"
FILES = {QOD: "quality-on-demand", PROFILES: "qos-profiles"}
SERVER = "203.0.113.7"
MANY = [Tenant(name="garage", policy=Policy(max_sessions=0, pages_per_s=1000, pages_burst=1000))]


def _load() -> tuple[dict[str, Any], Registry[Any]]:
    documents, registry = {}, Registry()
    for path in DEFINITIONS.glob("*/*.yaml"):
        document = yaml.safe_load(path.read_text())
        uri = f"file:///{path.relative_to(DEFINITIONS)}"
        documents[path.stem] = document
        registry = registry.with_resource(uri, Resource(document, DRAFT4))
    return documents, registry


DOCUMENTS, REGISTRY = _load()


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with Api(tmp_path, tenants=MANY) as api:
        yield api


def conforming(prefix: str, method: str, path: str, answer: httpx.Response) -> Any:
    """Check an answer against what the definition says of this operation and status."""
    name = FILES[prefix]
    operation = DOCUMENTS[name]["paths"][path][method.lower()]
    described = operation["responses"].get(str(answer.status_code))
    assert described is not None, f"{answer.status_code} is not documented: {answer.text}"
    if answer.status_code == 204:
        assert not answer.content
        return None
    root = f"file:///API_definitions/{name}.yaml"
    pointer = f"/paths/{path.replace('/', '~1')}/{method.lower()}/responses/{answer.status_code}"
    resolver = REGISTRY.resolver(root)
    found = resolver.lookup(f"#{pointer}")
    while "$ref" in found.contents:
        found = found.resolver.lookup(found.contents["$ref"])
    schema = found.contents["content"]["application/json"]["schema"]
    # References within it are relative to the file that it stands in.
    base = found.resolver._base_uri
    absolute = _absolute(schema, base)
    OAS30Validator(
        absolute, registry=REGISTRY, format_checker=OAS30Validator.FORMAT_CHECKER
    ).validate(answer.json())
    return answer.json()


def _absolute(schema: Any, base: str) -> Any:
    if isinstance(schema, dict):
        made = {key: _absolute(value, base) for key, value in schema.items()}
        if isinstance(schema.get("$ref"), str):
            ref = schema["$ref"]
            made["$ref"] = base + ref if ref.startswith("#") else str(httpx.URL(base).join(ref))
        return made
    return [_absolute(item, base) for item in schema] if isinstance(schema, list) else schema


def body(**members: Any) -> dict[str, Any]:
    return {
        "device": {"ipv4Address": {"publicAddress": "10.45.0.1", "privateAddress": "10.45.0.1"}},
        "applicationServer": {"ipv4Address": SERVER},
        "qosProfile": "QOS_E",
        "duration": 600,
        **members,
    }


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in body().items() if key != name}


def create(api: Api, by: str = "clinic", **members: Any) -> Any:
    answer = api.call("POST", f"{QOD}/sessions", body(**members), by=by)
    assert answer.status_code == 201, answer.text
    return conforming(QOD, "POST", "/sessions", answer)


def error(answer: httpx.Response) -> tuple[int, str]:
    shown = answer.json()
    assert set(shown) == {"status", "code", "message"}
    assert shown["status"] == answer.status_code
    return answer.status_code, shown["code"]


def test_a_session_is_created_read_extended_listed_and_deleted(api: Api) -> None:
    created = create(api)
    assert (created["qosStatus"], created["duration"]) == ("AVAILABLE", 600)
    assert created["device"] == body()["device"]
    assert created["applicationServer"] == {"ipv4Address": SERVER}
    binding = next(iter(api.user_plane.open.values()))
    assert binding.anchor is None  # nothing is steered
    assert [str(flow.service) for flow in binding.flows] == [SERVER]
    path = f"{QOD}/sessions/{created['sessionId']}"
    read = api.call("GET", path, by="clinic", headers={"x-correlator": "my-call:1"})
    assert conforming(QOD, "GET", "/sessions/{sessionId}", read) == created
    assert read.headers["x-correlator"] == "my-call:1"
    more = {"requestedAdditionalDuration": 100}
    extended = api.call("POST", f"{path}/extend", more, by="clinic")
    assert conforming(QOD, "POST", "/sessions/{sessionId}/extend", extended)["duration"] == 700
    listed = api.call("POST", f"{QOD}/retrieve-sessions", {"device": body()["device"]}, by="clinic")
    assert [s["sessionId"] for s in conforming(QOD, "POST", "/retrieve-sessions", listed)] == [
        created["sessionId"]
    ]
    assert api.call("DELETE", path, by="clinic").status_code == 204
    assert not api.user_plane.open
    gone = api.call("GET", path, by="clinic")
    assert error(gone) == (404, "NOT_FOUND")
    conforming(QOD, "GET", "/sessions/{sessionId}", gone)


def test_an_extension_is_capped_at_the_profiles_maximum_and_says_so(api: Api) -> None:
    path = f"{QOD}/sessions/{create(api)['sessionId']}/extend"
    answer = api.call("POST", path, {"requestedAdditionalDuration": 2**31 - 1}, by="clinic")
    shown = conforming(QOD, "POST", "/sessions/{sessionId}/extend", answer)
    assert shown["duration"] == 3600
    started = datetime.fromisoformat(shown["startedAt"][:26] + "+00:00")
    expires = datetime.fromisoformat(shown["expiresAt"][:26] + "+00:00")
    assert abs(expires - started - timedelta(hours=1)) < timedelta(milliseconds=2)
    assert started <= datetime.now(UTC)


def test_one_of_several_identifiers_is_used_and_named(api: Api) -> None:
    device = {"phoneNumber": "+4912345678", "ipv6Address": "fd00:45::3"}
    assert create(api, device=device)["device"] == {"ipv6Address": "fd00:45::3"}


def test_a_ue_that_calls_for_itself_needs_no_identifier(api: Api) -> None:
    answer = api.call("POST", f"{QOD}/sessions", without("device"), by="ue4")
    shown = conforming(QOD, "POST", "/sessions", answer)
    assert answer.status_code == 201
    assert "device" not in shown
    assert [str(flow.ue) for b in api.user_plane.open.values() for flow in b.flows] == ["10.45.0.4"]


def test_tenants_do_not_see_each_others_sessions(api: Api) -> None:
    created = create(api)
    path = f"{QOD}/sessions/{created['sessionId']}"
    for method, where in (("GET", path), ("DELETE", path)):
        assert error(api.call(method, where, by="garage")) == (404, "NOT_FOUND")
    device = {"device": body()["device"]}
    assert api.call("POST", f"{QOD}/retrieve-sessions", device, by="garage").json() == []
    assert api.call("GET", path, by="clinic").status_code == 200


def test_a_session_that_the_network_ended_is_there_until_it_is_deleted(api: Api) -> None:
    created = create(api)
    strict = {"qosProfiles": ["QOS_P"]}
    assert api.call("PUT", "/tenants/clinic/policy", strict).status_code == 200
    api.run(_settled(api, created["sessionId"]))
    path = f"{QOD}/sessions/{created['sessionId']}"
    shown = conforming(QOD, "GET", "/sessions/{sessionId}", api.call("GET", path, by="clinic"))
    assert (shown["qosStatus"], shown["statusInfo"]) == ("UNAVAILABLE", "NETWORK_TERMINATED")
    more = {"requestedAdditionalDuration": 1}
    answer = api.call("POST", f"{path}/extend", more, by="clinic")
    assert error(answer) == (409, "QUALITY_ON_DEMAND.SESSION_EXTENSION_NOT_ALLOWED")
    conforming(QOD, "POST", "/sessions/{sessionId}/extend", answer)
    assert api.call("DELETE", path, by="clinic").status_code == 204
    assert api.call("GET", path, by="clinic").status_code == 404


async def _settled(api: Api, session_id: str) -> None:
    async with asyncio.timeout(5):
        while api.plane.controller.session(session_id).live:
            await asyncio.sleep(0.005)


PHONE = {"phoneNumber": "+4912345678"}
STRANGER = {"ipv4Address": {"publicAddress": "192.0.2.9", "publicPort": 4}}
TOKEN = {
    "credentialType": "ACCESSTOKEN",
    "accessToken": "abc",
    "accessTokenExpiresUtc": "2999-01-01T00:00:00Z",
    "accessTokenType": "bearer",
}
SINK = "https://client.example/sink"
CREATE_ERRORS: list[tuple[str, dict[str, Any], int, str]] = [
    ("clinic", body(colour="red"), 400, "INVALID_ARGUMENT"),
    ("clinic", body(duration="600"), 400, "INVALID_ARGUMENT"),
    ("clinic", body(duration=0), 400, "INVALID_ARGUMENT"),
    ("clinic", body(device={}), 400, "INVALID_ARGUMENT"),
    ("clinic", body(device={"ipv4Address": {"publicAddress": "x"}}), 400, "INVALID_ARGUMENT"),
    ("clinic", body(applicationServer={}), 400, "INVALID_ARGUMENT"),
    ("clinic", body(applicationServer={"ipAddresses": ["1.2.3"]}), 400, "INVALID_ARGUMENT"),
    ("clinic", body(qosProfile="NO_SUCH"), 400, "INVALID_ARGUMENT"),
    ("clinic", without("qosProfile"), 400, "INVALID_ARGUMENT"),
    ("clinic", body(duration=3601), 400, "QUALITY_ON_DEMAND.DURATION_OUT_OF_RANGE"),
    ("clinic", body(sink="gopher://x/"), 400, "INVALID_SINK"),
    (
        "clinic",
        body(sink=SINK, sinkCredential={"credentialType": "PLAIN"}),
        400,
        "INVALID_CREDENTIAL",
    ),
    (
        "clinic",
        body(sink=SINK, sinkCredential={**TOKEN, "accessTokenType": "mac"}),
        400,
        "INVALID_TOKEN",
    ),
    ("192.0.2.1", body(), 401, "UNAUTHENTICATED"),
    ("edge1", body(), 403, "PERMISSION_DENIED"),
    ("clinic", body(device=STRANGER), 404, "IDENTIFIER_NOT_FOUND"),
    ("clinic", without("device"), 422, "MISSING_IDENTIFIER"),
    ("ue1", body(), 422, "UNNECESSARY_IDENTIFIER"),
    ("clinic", body(device=PHONE), 422, "UNSUPPORTED_IDENTIFIER"),
    ("clinic", body(devicePorts={"ports": [80]}), 422, "SERVICE_NOT_APPLICABLE"),
    (
        "clinic",
        body(applicationServer={"ipv4Address": "203.0.113.0/24"}),
        422,
        "SERVICE_NOT_APPLICABLE",
    ),
    (
        "clinic",
        body(applicationServer={"ipv4Address": "198.18.0.1"}),
        422,
        "SERVICE_NOT_APPLICABLE",
    ),
    ("clinic", body(qosProfile="QOS_OLD"), 422, "QUALITY_ON_DEMAND.QOS_PROFILE_NOT_APPLICABLE"),
    (
        "clinic",
        body(sink=SINK, sinkCredential={"credentialType": "PRIVATE_KEY_JWT"}),
        422,
        "PRIVATE_KEY_JWT_NOT_CONFIGURED",
    ),
    ("garage", body(), 429, "QUOTA_EXCEEDED"),
]


@pytest.mark.parametrize(("by", "asked", "status", "code"), CREATE_ERRORS)
def test_what_cannot_be_created_is_refused_as_documented(
    api: Api, by: str, asked: dict[str, Any], status: int, code: str
) -> None:
    headers = {"x-correlator": "c-1"}
    answer = api.call("POST", f"{QOD}/sessions", asked, by=by, headers=headers)
    assert error(answer) == (status, code)
    conforming(QOD, "POST", "/sessions", answer)
    assert answer.headers["x-correlator"] == "c-1"
    assert not api.user_plane.open


def test_a_second_session_for_a_flow_is_a_conflict(api: Api) -> None:
    create(api, applicationServer={"ipAddresses": ["203.0.113.9", SERVER]})
    answer = api.call("POST", f"{QOD}/sessions", body(), by="clinic")
    assert error(answer) == (409, "CONFLICT")
    conforming(QOD, "POST", "/sessions", answer)
    create(api, applicationServer={"ipv4Address": "203.0.113.10"})  # another server is none


def test_bandwidth_is_reserved_in_the_cell(api: Api) -> None:
    for number in range(4):  # of 1 Mbit/s each, in a cell of 4
        create(api, applicationServer={"ipv4Address": f"203.0.113.{number}"})
    answer = api.call("POST", f"{QOD}/sessions", body(), by="clinic")
    assert error(answer) == (422, "SERVICE_NOT_APPLICABLE")
    assert "cellDownlink of gnb1" in answer.json()["message"]


def test_the_same_request_under_a_key_is_granted_once(api: Api) -> None:
    headers = {"idempotency-key": "k1"}
    answers = [
        api.call("POST", f"{QOD}/sessions", body(), by="clinic", headers=headers) for _ in range(2)
    ]
    assert answers[0].json()["sessionId"] == answers[1].json()["sessionId"]
    other = api.call("POST", f"{QOD}/sessions", body(duration=601), by="clinic", headers=headers)
    assert error(other) == (409, "CONFLICT")


def test_profiles_are_told_in_camaras_units(api: Api) -> None:
    answer = api.call("POST", f"{PROFILES}/retrieve-qos-profiles", {}, by="clinic")
    shown = conforming(PROFILES, "POST", "/retrieve-qos-profiles", answer)
    assert [profile["name"] for profile in shown] == ["QOS_E", "QOS_P", "QOS_OLD"]
    assert shown[0]["targetMinDownstreamRate"] == {"value": 1000, "unit": "kbps"}
    assert shown[1]["packetDelayBudget"] == {"value": 20, "unit": "Milliseconds"}
    active = api.call(
        "POST", f"{PROFILES}/retrieve-qos-profiles", {"status": "DEPRECATED"}, by="clinic"
    )
    assert [profile["name"] for profile in active.json()] == ["QOS_OLD"]
    one = api.call("GET", f"{PROFILES}/qos-profiles/QOS_P", by="clinic")
    assert conforming(PROFILES, "GET", "/qos-profiles/{name}", one) == shown[1]
    none = api.call("GET", f"{PROFILES}/qos-profiles/NO_SUCH", by="clinic")
    assert error(none) == (404, "NOT_FOUND")
    conforming(PROFILES, "GET", "/qos-profiles/{name}", none)
    bad = api.call("POST", f"{PROFILES}/retrieve-qos-profiles", {"colour": 1}, by="clinic")
    assert error(bad) == (400, "INVALID_ARGUMENT")
    stranger = {"device": STRANGER}
    lost = api.call("POST", f"{PROFILES}/retrieve-qos-profiles", stranger, by="clinic")
    assert error(lost) == (404, "IDENTIFIER_NOT_FOUND")
    conforming(PROFILES, "POST", "/retrieve-qos-profiles", lost)


def test_the_conformance_check_notices_what_does_not_conform(api: Api) -> None:
    created = create(api)
    del created["qosStatus"]
    with pytest.raises(Exception, match="qosStatus"):
        conforming(QOD, "POST", "/sessions", httpx.Response(201, json=created))
    wrong = {"status": 400, "code": "NO_SUCH_CODE", "message": "x"}
    with pytest.raises(Exception, match="NO_SUCH_CODE"):
        conforming(QOD, "POST", "/sessions", httpx.Response(400, json=wrong))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(name=st.sampled_from([*body(), "sink", "sinkCredential", "devicePorts", "zzz"]), value=JSON)
def test_no_body_makes_the_server_fail(api: Api, name: str, value: Any) -> None:
    try:
        answer = api.call("POST", f"{QOD}/sessions", body(**{name: value}), by="clinic")
    except ValueError:  # a float that JSON cannot hold
        return
    assert answer.status_code < 500
    if answer.status_code != 201:
        assert re.fullmatch(r"[A-Z_.]+", answer.json()["code"])
