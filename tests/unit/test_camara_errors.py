"""Every error that CAMARA's definitions document, or why it does not occur; and no other form."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from camara import (
    DEVICE,
    NO_SESSION,
    OPERATIONS,
    PROFILES,
    QOD,
    SERVER,
    ask,
    body,
    conforms,
    create,
    documented,
    error,
    without,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served import Api

from controlplane.policy import Policy, Tenant

FULL = [Tenant(name="garage", policy=Policy(max_sessions=0))]  # it may have none
UNSCOPED = "unscoped"  # a client whose token has another scope
STRANGER = {"ipv4Address": {"publicAddress": "192.0.2.9", "publicPort": 4}}
PORT_0 = {"ipv4Address": {"publicAddress": "10.45.0.1", "publicPort": 0}}
PHONE = {"phoneNumber": "+4912345678"}
SINK = "https://client.example/sink"
TOKEN = {
    "credentialType": "ACCESSTOKEN",
    "accessToken": "abc",
    "accessTokenExpiresUtc": "2999-01-01T00:00:00Z",
    "accessTokenType": "bearer",
}
MORE = {"requestedAdditionalDuration": 1}
NOBODY, ANCHOR, UE = "192.0.2.1", "edge1", "ue1"


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with Api(tmp_path, tenants=FULL) as api:
        yield api


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """For requests that change nothing."""
    with Api(tmp_path_factory.mktemp("camara"), tenants=FULL) as api:
        yield api
        assert not api.user_plane.open


def network_ends(api: Api) -> str:
    """Return a session that the network has ended."""
    session_id: str = create(api)["sessionId"]
    assert api.call("PUT", "/tenants/clinic/policy", {"qosProfiles": ["QOS_P"]}).is_success

    async def ended() -> None:
        async with asyncio.timeout(5):
            while api.plane.controller.session(session_id).live:
                await asyncio.sleep(0.005)

    api.run(ended())
    return session_id


def too_often(api: Api) -> str:
    slow = {"pagesPerS": 0.001, "pagesBurst": 1}
    assert api.call("PUT", "/tenants/clinic/policy", slow).is_success
    create(api)
    return ""


def is_taken(api: Api) -> str:
    create(api, body(applicationServer={"ipAddresses": ["203.0.113.9", SERVER]}))
    return ""


class Case(NamedTuple):
    operation: str
    status: int
    code: str
    body: Any = None
    by: str = "clinic"
    of: str = NO_SESSION
    before: Callable[[Api], str] | None = None  # what it returns, if anything, is `of`


def _sink(**credential: str) -> dict[str, Any]:
    return body(sink=SINK, sinkCredential=credential)


INVALID, RANGE = "INVALID_ARGUMENT", "OUT_OF_RANGE"
MALFORMED: list[Any] = [
    body(colour="red"),
    body(device={"ipv4Address": {**DEVICE["ipv4Address"], "colour": "red"}}),
    body(applicationServer={"ipv4Address": SERVER, "port": 80}),
    body(applicationServerPorts={"ranges": [{"from": 1, "to": 2, "by": 1}]}),
    _sink(**TOKEN, colour="red"),
    body(sinkCredential={}),
    body(duration="600"),
    body(duration=True),
    body(device={}),
    body(device=None),
    body(sink=None),
    body(devicePorts={}),
    body(device={"ipv4Address": {"publicAddress": "10.45.0.1"}}),
    body(device={"phoneNumber": "4912345678"}),
    body(applicationServer={}),
    body(applicationServer={"ipAddresses": []}),
    body(applicationServer={"ipAddresses": [SERVER, SERVER]}),
    body(applicationServer={"ipAddresses": [f"203.0.113.{n}" for n in range(17)]}),
    body(applicationServer={"ipAddresses": ["203.0.113.0/32"]}),
    body(applicationServer={"ipAddresses": ["fe80::1%eth0"]}),
    body(applicationServer={"ipAddresses": [SERVER], "ipv4Address": SERVER}),
    body(applicationServer={"ipv4Address": "1.1.1.1/0.0.0.0"}),
    body(qosProfile="NO_SUCH"),
    without("qosProfile"),
    [],
    None,
]
CASES = [
    *(Case("createSession", 400, INVALID, asked) for asked in MALFORMED),
    Case("createSession", 400, RANGE, body(duration=0)),
    Case("createSession", 400, RANGE, body(duration=2**31)),
    Case("createSession", 400, RANGE, body(devicePorts={"ports": [65_536]})),
    Case("createSession", 400, "QUALITY_ON_DEMAND.DURATION_OUT_OF_RANGE", body(duration=3601)),
    Case("createSession", 400, "INVALID_SINK", body(sink="gopher://x/")),
    Case("createSession", 400, "INVALID_CREDENTIAL", _sink(credentialType="PLAIN")),
    Case("createSession", 400, "INVALID_CREDENTIAL", body(sinkCredential=TOKEN)),
    Case("createSession", 400, "INVALID_TOKEN", _sink(**(TOKEN | {"accessTokenType": "mac"}))),
    Case("createSession", 401, "UNAUTHENTICATED", body(), NOBODY),
    Case("createSession", 403, "PERMISSION_DENIED", body(), UNSCOPED),
    Case("createSession", 403, "PERMISSION_DENIED", body(), ANCHOR),
    Case("createSession", 404, "IDENTIFIER_NOT_FOUND", body(device=STRANGER)),
    Case("createSession", 409, "CONFLICT", body(), before=is_taken),
    Case("createSession", 422, "MISSING_IDENTIFIER", without("device")),
    Case("createSession", 422, "UNNECESSARY_IDENTIFIER", body(), UE),
    Case("createSession", 422, "UNSUPPORTED_IDENTIFIER", body(device=PHONE)),
    *(
        Case("createSession", 422, "SERVICE_NOT_APPLICABLE", asked)
        for asked in (
            body(devicePorts={"ports": [80]}),
            body(applicationServerPorts={"ranges": [{"from": 1, "to": 2}]}),
            body(applicationServer={"ipv4Address": "203.0.113.0/24"}),
            body(applicationServer={"ipv6Address": "2001:db8::/64"}),
            body(applicationServer={"ipv4Address": "198.18.0.1"}),  # an AI service
            body(applicationServer={"ipv4Address": "10.47.1.2"}),  # an anchor's own
        )
    ),
    Case(
        "createSession",
        422,
        "QUALITY_ON_DEMAND.QOS_PROFILE_NOT_APPLICABLE",
        body(qosProfile="QOS_OLD"),
    ),
    Case(
        "createSession",
        422,
        "PRIVATE_KEY_JWT_NOT_CONFIGURED",
        _sink(credentialType="PRIVATE_KEY_JWT"),
    ),
    Case("createSession", 429, "QUOTA_EXCEEDED", body(), "garage"),
    Case(
        "createSession",
        429,
        "TOO_MANY_REQUESTS",
        body(applicationServer={"ipv4Address": "203.0.113.8"}),
        before=too_often,
    ),
    *(
        case
        for operation, asked in (
            ("getSession", None),
            ("deleteSession", None),
            ("extendQosSessionDuration", MORE),
        )
        for case in (
            Case(operation, 400, INVALID, asked, of="1"),
            Case(operation, 401, "UNAUTHENTICATED", asked, NOBODY),
            Case(operation, 403, "PERMISSION_DENIED", asked, UNSCOPED),
            Case(operation, 404, "NOT_FOUND", asked),
        )
    ),
    Case("extendQosSessionDuration", 400, INVALID, {}),
    Case("extendQosSessionDuration", 400, INVALID, {**MORE, "colour": "red"}),
    Case("extendQosSessionDuration", 400, RANGE, {"requestedAdditionalDuration": 0}),
    Case(
        "extendQosSessionDuration",
        409,
        "QUALITY_ON_DEMAND.SESSION_EXTENSION_NOT_ALLOWED",
        MORE,
        before=network_ends,
    ),
    *(
        case
        for operation in ("retrieveSessionsByDevice", "retrieveQosProfiles")
        for case in (
            Case(operation, 400, INVALID, {"colour": "red"}),
            Case(operation, 400, INVALID, {"device": {}}),
            Case(operation, 400, RANGE, {"device": PORT_0}),
            Case(operation, 401, "UNAUTHENTICATED", {"device": DEVICE}, NOBODY),
            Case(operation, 403, "PERMISSION_DENIED", {"device": DEVICE}, UNSCOPED),
            Case(operation, 404, "IDENTIFIER_NOT_FOUND", {"device": STRANGER}),
            Case(operation, 422, "UNSUPPORTED_IDENTIFIER", {"device": PHONE}),
            Case(operation, 422, "UNNECESSARY_IDENTIFIER", {"device": DEVICE}, UE),
        )
    ),
    Case("retrieveSessionsByDevice", 422, "MISSING_IDENTIFIER", {}),
    Case("retrieveQosProfiles", 400, INVALID, {"status": "OLD"}),
    Case("getQosProfile", 400, INVALID, of="a"),
    Case("getQosProfile", 401, "UNAUTHENTICATED", by=NOBODY, of="QOS_E"),
    Case("getQosProfile", 403, "PERMISSION_DENIED", by=UNSCOPED, of="QOS_E"),
    Case("getQosProfile", 404, "NOT_FOUND", of="NO_SUCH"),
]
ONLY_CREATION_COUNTS = "rates and quotas are those of sessions that are asked for"
EVERY_UE = "the network offers QoS to each of its UEs"
NEVER = {
    ("createSession", 404, "NOT_FOUND"): "the collection is always there",
    ("retrieveSessionsByDevice", 404, "NOT_FOUND"): "the collection is always there",
    ("retrieveQosProfiles", 404, "NOT_FOUND"): "the collection is always there",
    ("retrieveSessionsByDevice", 422, "SERVICE_NOT_APPLICABLE"): EVERY_UE,
    ("retrieveQosProfiles", 422, "SERVICE_NOT_APPLICABLE"): EVERY_UE,
    ("getQosProfile", 400, RANGE): "nothing in the request has a range",
    (
        "extendQosSessionDuration",
        400,
        "QUALITY_ON_DEMAND.DURATION_OUT_OF_RANGE",
    ): "the definition notes that this operation cannot return it: it caps",
} | {
    (operation, 429, code): ONLY_CREATION_COUNTS
    for operation in OPERATIONS
    if operation != "createSession"
    for code in ("QUOTA_EXCEEDED", "TOO_MANY_REQUESTS")
}


def test_every_documented_error_has_a_case_or_a_reason_why_it_never_occurs() -> None:
    made = {(case.operation, case.status, case.code) for case in CASES}
    assert not made & NEVER.keys()
    assert made | NEVER.keys() == documented()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.operation}-{case.code}")
def test_what_cannot_be_done_is_refused_as_documented(
    request: pytest.FixtureRequest, case: Case
) -> None:
    api: Api = request.getfixturevalue("api" if case.before else "untouched")
    before = case.before(api) if case.before else ""
    opened = dict(api.user_plane.open)
    by, headers = case.by, {}
    if by == UNSCOPED:
        by, headers["authorization"] = NOBODY, f"Bearer {api.token('clinic', scope='events:read')}"
    answer = ask(api, case.operation, case.body, by=by, of=before or case.of, headers=headers)
    assert error(answer) == (case.status, case.code)
    assert ("www-authenticate" in answer.headers) == (case.status == 401)
    assert ("retry-after" in answer.headers) == (case.code == "TOO_MANY_REQUESTS")
    assert api.user_plane.open == opened


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("GET", f"{QOD}/nothing", (404, "NOT_FOUND")),
        ("PUT", f"{QOD}/sessions", (405, "METHOD_NOT_ALLOWED")),
        ("GET", f"{PROFILES}/retrieve-qos-profiles", (405, "METHOD_NOT_ALLOWED")),
        ("POST", f"{QOD}/sessions?colour=red", (400, "INVALID_ARGUMENT")),
    ],
)
def test_where_there_is_no_operation_errors_have_the_same_form(
    untouched: Api, method: str, path: str, expected: tuple[int, str]
) -> None:
    answer = untouched.call(method, path, by="clinic", headers={"x-correlator": "c-1"})
    assert error(answer) == expected
    assert answer.headers["x-correlator"] == "c-1"


@pytest.mark.parametrize("sent", [b"{", b'{"a":"\xff"}', b"[" * 30_000, b'{"a":' + b"9" * 5_000])
def test_what_is_no_json_is_an_invalid_argument(untouched: Api, sent: bytes) -> None:
    headers = {"content-type": "application/json"}
    answer = ask(untouched, "createSession", content=sent, headers=headers)
    assert error(answer) == (400, "INVALID_ARGUMENT")


@pytest.mark.parametrize("correlator", ["a b", "x" * 257, "a,b"])
def test_a_malformed_correlator_is_refused_and_not_returned(
    untouched: Api, correlator: str
) -> None:
    headers = {"x-correlator": correlator}
    answer = untouched.call("GET", f"{PROFILES}/qos-profiles/QOS_E", by="clinic", headers=headers)
    assert error(answer) == (400, "INVALID_ARGUMENT")
    assert "x-correlator" not in answer.headers


def test_the_openapi_document_has_every_documented_status(untouched: Api) -> None:
    paths = untouched.call("GET", "/openapi.json").json()["paths"]
    for name, (prefix, method, path, responses) in OPERATIONS.items():
        described = paths[prefix + path][method.lower()]["responses"]
        assert described.keys() == responses.keys() | {"default"}, name


def test_the_conformance_check_notices_what_does_not_conform(api: Api) -> None:
    created = create(api)
    del created["qosStatus"]
    with pytest.raises(Exception, match="qosStatus"):
        conforms("createSession", httpx.Response(201, json=created))
    wrong = {"status": 400, "code": "NO_SUCH_CODE", "message": "x"}
    with pytest.raises(Exception, match="NO_SUCH_CODE"):
        conforms("createSession", httpx.Response(400, json=wrong))
    with pytest.raises(AssertionError, match="418"):
        conforms("createSession", httpx.Response(418, json=wrong))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3)
    ),
    max_leaves=6,
)
NAMES = st.sampled_from(
    [
        *("device", "applicationServer", "qosProfile", "duration", "sink", "sinkCredential"),
        *("devicePorts", "requestedAdditionalDuration", "name", "status", "zzz"),
    ]
)


def test_no_body_makes_the_server_fail(api: Api) -> None:
    session_id = create(api)["sessionId"]

    @settings(
        max_examples=120,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(
        operation=st.sampled_from([n for n, o in OPERATIONS.items() if o.method == "POST"]),
        right=st.booleans(),
        members=st.dictionaries(NAMES, JSON, max_size=3),
    )
    def fuzz(operation: str, right: bool, members: dict[str, Any]) -> None:
        asked = (body() if right else {}) | members
        try:
            ask(api, operation, asked, of=session_id)  # which checks the answer
        except ValueError:  # a float that JSON cannot hold
            return

    fuzz()
