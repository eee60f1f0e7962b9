"""The HTTP API: who may what, and what is answered."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import Api

from controlplane import checkpoint
from controlplane.checkpoint import Verifier
from controlplane.event_stream import Filter
from controlplane.policy import Policy, Tenant
from controlplane.verification import verify_log
from controlplane.verifier import Reason, TokenError
from controlplane.verifier import Verifier as AistVerifier

TENANTS = [Tenant(name="garage", policy=Policy(regions=("south",), max_sessions=1))]
NOBODY = "192.0.2.1"


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with Api(tmp_path, tenants=TENANTS) as api:
        yield api


def cause(answer: Any) -> tuple[int, str]:
    assert answer.headers["content-type"] == "application/problem+json"
    shown = answer.json()
    assert shown["status"] == answer.status_code
    return answer.status_code, shown["cause"]


def body(**members: Any) -> dict[str, Any]:
    return {"intent": {"task": "text-generation"}, **members}


# Sessions


def test_a_ue_pages_for_itself_and_is_told_why_it_is_served_there(api: Api) -> None:
    answer = api.call("POST", "/sessions", body(), by="ue1")
    granted = answer.json()
    assert answer.status_code == 201
    assert answer.headers["location"] == f"/sessions/{granted['sessionId']}"
    assert (granted["ue"], granted["tenant"], granted["commit"]["anchor"]) == (
        *("ue1", "default"),
        "edge1",
    )
    assert (granted["qosStatus"], granted["duration"]) == ("AVAILABLE", 60)
    assert [c["anchor"] for c in granted["candidates"]] == ["edge1", "edge1", "edge2"]
    verifier = AistVerifier("ai-paging", api.call("GET", "/.well-known/jwks.json").json())
    claims = verifier.check(granted["aist"], granted["aisi"], "10.45.0.1")
    assert (claims.lease_id, claims.epoch) == (granted["commit"]["leaseId"], 1)


def test_exclusions_name_their_constraint(api: Api) -> None:
    intent = {"task": "text-generation", "regions": ["north"], "maxCost": 1}
    answer = api.call("POST", "/sessions", {"ue": "ue1", "intent": intent})
    assert cause(answer) == (503, "NO_CANDIDATE")
    excluded = {(e["aisi"], e["anchor"]): e["constraint"] for e in answer.json()["excluded"]}
    assert excluded == {
        ("chat", "edge1"): "cost",
        ("chat", "edge2"): "region",
        ("code", "edge1"): "cost",
    }


def test_a_description_ranks_and_never_decides(api: Api) -> None:
    assert api.page("ue1", description="helps me to write a computer program")["aisi"] == "code"
    assert api.page("ue2", description="small talk, please")["aisi"] == "chat"
    assert api.page("ue3", regions=["south"], description="computer programs")["aisi"] == "chat"


def test_a_session_is_extended_relocated_and_released(api: Api) -> None:
    granted = api.page("ue1", regions=[], minTrustTier=0, description="small talk")
    path = f"/sessions/{granted['sessionId']}"
    more = {"requestedAdditionalDuration": 30}
    extended = api.call("POST", f"{path}/extend", more, by="ue1").json()
    assert extended["duration"] == 90
    too_much = {"requestedAdditionalDuration": 3600}
    assert cause(api.call("POST", f"{path}/extend", too_much, by="ue1")) == (
        *(422,),
        "DURATION_OUT_OF_RANGE",
    )
    better = api.call("POST", f"{path}/relocate", {"target": "better"}, by="ue1")
    assert cause(better) == (409, "NO_BETTER_ANCHOR")
    moved = api.call("POST", f"{path}/relocate", {"target": "edge2"}, by="ue1").json()
    assert (moved["commit"]["anchor"], moved["commit"]["epoch"]) == ("edge2", 2)
    states = [c["state"] for c in api.call("GET", path, by="ue1").json()["commits"]]
    assert states == ["DRAINING", "COMMITTED"]
    assert api.call("DELETE", path, by="ue1").status_code == 204
    ended = api.call("GET", path, by="ue1").json()
    assert (ended["qosStatus"], ended["statusInfo"]) == ("UNAVAILABLE", "DELETE_REQUESTED")
    assert ended["commits"][1]["usage"]["uplinkPackets"] == 7
    assert cause(api.call("DELETE", path, by="ue1")) == (409, "SESSION_ENDED")


def test_the_same_request_under_a_key_is_granted_once(api: Api) -> None:
    headers = {"idempotency-key": "k1"}
    first = api.call("POST", "/sessions", body(), by="ue1", headers=headers)
    again = api.call("POST", "/sessions", body(), by="ue1", headers=headers)
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json()["sessionId"] == again.json()["sessionId"]
    other = {"intent": {"task": "text-generation", "durationMs": 1000}}
    answer = api.call("POST", "/sessions", other, by="ue1", headers=headers)
    assert cause(answer) == (422, "KEY_REUSED")
    # Another tenant's key is another key, whatever it is called.
    assert api.call("POST", "/sessions", body(ue="ue2"), headers=headers).status_code == 201


# Who may what


def test_tenants_never_see_each_others_sessions(api: Api) -> None:
    mine = api.page("ue1", by="clinic")["sessionId"]
    for method, path, asked in (
        ("GET", f"/sessions/{mine}", None),
        ("DELETE", f"/sessions/{mine}", None),
        ("POST", f"/sessions/{mine}/extend", {"requestedAdditionalDuration": 1}),
        ("POST", f"/sessions/{mine}/relocate", {}),
    ):
        assert cause(api.call(method, path, asked, by="garage")) == (404, "SESSION_UNKNOWN")
    assert api.call("GET", "/sessions", by="garage").json()["total"] == 0
    asked = {"ue": "ue1"}
    assert api.call("POST", "/retrieve-sessions", asked, by="garage").json()["total"] == 0
    assert api.call("POST", "/retrieve-sessions", asked, by="clinic").json()["total"] == 1
    assert api.call("GET", "/sessions", by="ue2").json()["total"] == 0
    assert api.call("GET", f"/sessions/{mine}", by="ue1").status_code == 200  # it is its UE


def test_a_tenants_policy_holds(api: Api) -> None:
    assert api.page("ue1", by="garage")["commit"]["anchor"] == "edge2"  # not in the north
    answer = api.call("POST", "/sessions", body(ue="ue2"), by="garage")
    assert cause(answer) == (429, "SESSION_QUOTA_EXCEEDED")
    north = {"ue": "ue3", "intent": {"task": "text-generation", "regions": ["north"]}}
    assert api.call("PUT", "/tenants/garage/policy", {"regions": ["south"]}).status_code == 200
    answer = api.call("POST", "/sessions", north, by="garage")
    assert cause(answer) == (503, "NO_CANDIDATE")
    constraints = {e["constraint"] for e in answer.json()["excluded"]}
    assert constraints == {"region", "tenantRegion"}


def test_nobody_is_nobody(api: Api) -> None:
    for method, path in (("GET", "/sessions"), ("GET", "/anchors"), ("GET", "/events")):
        answer = api.call(method, path, by=NOBODY)
        assert cause(answer) == (401, "UNAUTHENTICATED")
        assert answer.headers["www-authenticate"].startswith("Bearer")
    forged = {"x-forwarded-for": "10.45.0.1", "forwarded": "for=10.45.0.1"}
    assert api.call("GET", "/sessions", by=NOBODY, headers=forged).status_code == 401
    wrong = {"authorization": "Bearer abc.def.ghi"}
    assert api.call("GET", "/sessions", by="ue1", headers=wrong).status_code == 401


@pytest.mark.parametrize("by", ["ue1", "edge1", "clinic"])
def test_what_is_the_operators_is_nobody_elses(api: Api, by: str) -> None:
    for method, path, asked in (
        ("GET", "/status", None),
        ("GET", "/metrics", None),
        ("GET", "/evidence/export", None),
        ("GET", "/evidence/entries", None),
        ("POST", "/keys/rotate", None),
        ("POST", "/mobility-reports", {"ue": "ue1", "gnb": "gnb2"}),
        ("PUT", "/tenants/garage/policy", {}),
    ):
        assert cause(api.call(method, path, asked, by=by)) == (403, "NOT_ALLOWED")


def test_a_ue_asks_for_itself_only_and_an_anchor_for_none(api: Api) -> None:
    assert cause(api.call("POST", "/sessions", body(ue="ue2"), by="ue1")) == (403, "NOT_ALLOWED")
    assert cause(api.call("POST", "/sessions", body(ue="ue2"), by="edge1")) == (403, "NOT_ALLOWED")
    assert cause(api.call("POST", "/sessions", body())) == (400, "INVALID")
    assert cause(api.call("POST", "/sessions", body(ue="ue99"))) == (403, "UE_UNKNOWN")
    answer = api.call("POST", "/sessions", body(ueAddress="fd00:45::5"), by="clinic")
    assert answer.json()["ue"] == "ue5"


def test_a_token_without_the_scope_is_not_enough(api: Api) -> None:
    secret = api._secrets["clinic"]
    form = {
        "grant_type": "client_credentials",
        "scope": "sessions:read",
        "client_id": "clinic",
        "client_secret": secret,
    }
    granted = api.call("POST", "/oauth2/token", by=NOBODY, data=form)
    assert granted.headers["cache-control"] == "no-store"
    headers = {"authorization": f"Bearer {granted.json()['access_token']}"}
    assert api.call("GET", "/sessions", by=NOBODY, headers=headers).status_code == 200
    answer = api.call("POST", "/sessions", body(ue="ue1"), by=NOBODY, headers=headers)
    assert cause(answer) == (403, "NOT_ALLOWED")
    form["client_secret"] = "guess"
    wrong = api.call("POST", "/oauth2/token", by=NOBODY, data=form)
    assert (wrong.status_code, wrong.json()["error"]) == (401, "invalid_client")


def test_the_operator_sees_how_often_tokens_are_refused(api: Api) -> None:
    forged = {"authorization": "Bearer abc.def.ghi"}
    for _ in range(2):
        api.call("GET", "/sessions", by=NOBODY, headers=forged)
    api.call("POST", "/oauth2/token", by=NOBODY, data={"grant_type": "client_credentials"})
    exposed = api.call("GET", "/metrics").text.splitlines()
    refusals = [line for line in exposed if line.startswith("aipaging_token_refusals_total")]
    assert refusals == [
        'aipaging_token_refusals_total{reason="invalid_token"} 2.0',
        'aipaging_token_refusals_total{reason="invalid_client"} 1.0',
    ]


# Anchors


def test_a_session_keeps_its_token_where_it_is_and_while_it_drains(api: Api) -> None:
    old = api.page("ue1", description="small talk")
    jwks = api.call("GET", "/.well-known/jwks.json").json()
    verifiers = {name: AistVerifier("ai-paging", jwks) for name in ("edge1", "edge2")}
    cursors: dict[str, str | None] = {"edge1": None, "edge2": None}
    beat: dict[str, Any] = {"load": 0.1, "readyAisis": ["chat", "code"], "bootId": "b"}

    def heard(name: str) -> list[dict[str, Any]]:
        body = {**beat, "since": cursors[name]}
        answer = api.call("POST", f"/anchors/{name}/heartbeat", body, by=name).json()
        cursors[name] = answer["cursor"]
        verifiers[name].update(revocations=answer["revocations"])
        revocations: list[dict[str, Any]] = answer["revocations"]
        return revocations

    def good(name: str, answer: dict[str, Any], now_unix_s: float | None = None) -> bool:
        try:
            verifiers[name].check(answer["aist"], "chat", "10.45.0.1", now_unix_s=now_unix_s)
        except TokenError as refused:
            assert refused.reason is Reason.REVOKED
            return False
        return True

    assert heard("edge1") == heard("edge2") == []
    path = f"/sessions/{old['sessionId']}"
    new = api.call("POST", f"{path}/relocate", {"target": "edge2"}).json()
    [left] = heard("edge1")
    assert ["10.45.0.1", "198.18.0.1"] in left["flows"]
    [_] = heard("edge2")
    assert good("edge1", old, left["nbf"] - 0.01)
    assert not good("edge1", old, left["nbf"])
    assert good("edge2", old, left["nbf"])
    assert good("edge2", new)
    api.call("DELETE", path)
    for name in ("edge1", "edge2"):
        heard(name)
        assert not good(name, old)
        assert not good(name, new)


def test_a_provider_registers_its_own_anchor_and_nobody_elses(api: Api) -> None:
    anchor = {
        **{"name": "edge3", "region": "south", "trustTier": 2, "slots": 5, "cost": 0},
        "hosts": [{"aisi": "chat", "serviceTimeMs": 1}],
    }
    registered = api.call("PUT", "/anchors/edge3", anchor, by="clinic")
    assert registered.json()["provider"] == "clinic"
    assert cause(api.call("PUT", "/anchors/edge3", anchor, by="garage")) == (
        *(404,),
        "ANCHOR_UNKNOWN",
    )
    assert cause(api.call("PUT", "/anchors/edge1", {**anchor, "name": "edge1"}, by="clinic")) == (
        *(404,),
        "ANCHOR_UNKNOWN",
    )
    elsewhere = {**anchor, "name": "edge9"}
    assert cause(api.call("PUT", "/anchors/edge9", elsewhere)) == (404, "ATTACHMENT_POINT_UNKNOWN")
    assert [a["name"] for a in api.call("GET", "/anchors", by="clinic").json()["anchors"]] == [
        "edge3"
    ]
    assert api.page("ue1")["commit"]["anchor"] == "edge3"  # it costs nothing
    drained = api.call("POST", "/anchors/edge3/drain", by="clinic").json()
    assert drained["state"] == "DRAINING"
    api.run(asyncio.sleep(0.05))
    session = api.call("GET", "/sessions").json()["sessions"][0]
    assert [(c["anchor"], c["cause"]) for c in session["commits"]] == [
        ("edge3", "PAGE"),
        ("edge1", "DRAIN"),
    ]
    assert api.call("DELETE", "/anchors/edge3", by="clinic").status_code == 204


def test_the_sessions_of_an_anchor_that_falls_silent_are_anchored_anew(api: Api) -> None:
    granted = api.page("ue1", description="small talk")
    beat = {"load": 0.1, "readyAisis": ["chat"], "bootId": "b"}
    assert api.call("POST", "/anchors/edge1/heartbeat", beat, by="edge1").status_code == 200

    async def recovered() -> None:
        async with asyncio.timeout(3):
            while len(api.plane.controller.session(granted["sessionId"]).lease_ids) < 2:
                await asyncio.sleep(0.01)

    api.run(recovered())
    api.run(asyncio.sleep(0.02))
    commits = api.call("GET", f"/sessions/{granted['sessionId']}").json()["commits"]
    assert [(c["anchor"], c["state"], c["cause"]) for c in commits] == [
        ("edge1", "ENDED", "PAGE"),
        ("edge2", "COMMITTED", "FAILURE"),
    ]
    assert commits[0]["endReason"] == "ANCHOR_FAILED"


# Evidence, events, errors


def test_the_exported_log_verifies_against_its_checkpoint(api: Api) -> None:
    granted = api.page("ue1")
    api.call("POST", f"/sessions/{granted['sessionId']}/relocate", {"target": None})
    api.call("DELETE", f"/sessions/{granted['sessionId']}")
    verifier = Verifier.parse(api.call("GET", "/evidence/key").text)
    signed = checkpoint.verify(verifier, api.call("GET", "/evidence/checkpoint").text)
    lines = api.call("GET", "/evidence/export").content.splitlines(keepends=True)
    verdict = verify_log(lines, signed)
    assert not verdict.problems
    assert verdict.size >= signed.size > 5
    proof = api.call("GET", "/evidence/proof/inclusion?index=1").json()
    assert proof["leafHash"] == api.plane.log.tree.leaf(1).hex()
    assert cause(api.call("GET", "/evidence/proof/inclusion?index=999")) == (404, "NO_SUCH_ENTRY")


def test_everyone_follows_their_own_events(api: Api) -> None:
    async def follow(wanted: Filter) -> list[tuple[str, str]]:
        seen = []
        async for message in api.plane.stream.subscribe(wanted, 0):
            told = json.loads(message.raw_data or "{}")
            if "ue" in told:
                seen.append((message.event or "", told["ue"]))
            if len(seen) >= 2:
                break
        return seen

    api.page("ue1", by="clinic")
    api.page("ue2", by="garage")
    assert api.run(follow(Filter(tenant="garage"))) == [("Prepared", "ue2"), ("Committed", "ue2")]
    assert api.run(follow(Filter(ue="ue1"))) == [("Prepared", "ue1"), ("Committed", "ue1")]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"intent": {"task": "text-generation", "colour": 1}}, (400, "INVALID")),
        ({"intent": {"task": "text-generation"}, "colour": 1}, (400, "INVALID")),
        ({"intent": {"task": "text-generation", "durationMs": "60000"}}, (400, "INVALID")),
        ({"intent": {"task": "Text Generation"}}, (400, "INVALID")),
        ({"intent": {"task": "no-such-task"}}, (404, "TASK_UNKNOWN")),
        (
            {"intent": {"task": "text-generation", "qosProfile": "NOPE"}},
            (404, "QOS_PROFILE_UNKNOWN"),
        ),
        ({"intent": {"task": "text-generation", "regions": ["a"] * 65}}, (400, "INVALID")),
        ([], (400, "INVALID")),
    ],
)
def test_what_is_asked_wrongly_is_named(api: Api, asked: Any, expected: tuple[int, str]) -> None:
    assert cause(api.call("POST", "/sessions", asked, by="ue1")) == expected


def test_bodies_and_parameters_are_bounded_and_known(api: Api) -> None:
    huge = {"intent": {"task": "text-generation", "description": "x" * 70_000}}
    assert cause(api.call("POST", "/sessions", huge, by="ue1")) == (413, "TOO_LARGE")
    json_type = {"content-type": "application/json"}
    answer = api.call("POST", "/sessions", by="ue1", content=b"{not json", headers=json_type)
    assert cause(answer) == (400, "MALFORMED")
    assert cause(api.call("GET", "/sessions?colour=1")) == (400, "INVALID")
    assert cause(api.call("GET", "/nowhere")) == (404, "NO_SUCH_RESOURCE")
    wrong = api.call("PATCH", "/sessions")
    assert cause(wrong) == (405, "METHOD_NOT_ALLOWED")
    assert wrong.headers["allow"] == "GET, POST"


def test_the_openapi_document_is_served_and_describes_every_operation(api: Api) -> None:
    document = api.call("GET", "/openapi.json").json()
    assert document["openapi"].startswith("3.1.")
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert operation["summary"], f"{method} {path}"
    assert "Problem" in document["components"]["schemas"]
