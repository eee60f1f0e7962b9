"""Ordinary pages are answered by a shorter way, and as they would be by the longer one."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from served import Api

DIRECT = "application/json"
BY_THE_APPLICATION = "application/json; charset=utf-8"  # the same, but not to the letter


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    folder: Path = tmp_path_factory.mktemp("api")
    with Api(folder) as served:
        yield served


def both(api: Api, body: bytes, by: str = "operator") -> tuple[Any, Any]:
    """What each way answers, without what differs between any two grants; both are undone."""
    return _answer(api, body, by, DIRECT), _answer(api, body, by, BY_THE_APPLICATION)


def _answer(api: Api, body: bytes, by: str, media_type: str) -> Any:
    answer = api.call(
        "POST", "/sessions", by=by, content=body, headers={"content-type": media_type}
    )
    document = answer.json()
    headers = {name: value for name, value in answer.headers.items() if name != "content-length"}
    if answer.status_code == 201:
        session_id = document.pop("sessionId")
        assert headers.pop("location") == f"/sessions/{session_id}"
        for unique in ("startedAt", "expiresAt", "aist", "timeline"):
            assert document.pop(unique)
        for unique in ("leaseId", "epoch", "expiresAt"):
            assert document["commit"].pop(unique)
        assert api.call("DELETE", f"/sessions/{session_id}").status_code == 204
    return answer.status_code, headers, document


def page(**members: Any) -> bytes:
    return json.dumps({"ue": "ue1", "intent": {"task": "text-generation"}, **members}).encode()


@pytest.mark.parametrize("by", ["operator", "ue1", "ue2", "clinic", "edge1", "192.0.2.1"])
def test_whoever_asks(api: Api, by: str) -> None:
    direct, other = both(api, page(), by)
    assert direct == other


def test_it_is_taken(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tests here compare the application with itself."""
    monkeypatch.setattr("fastapi.routing.APIRoute.handle", None)
    with pytest.raises(TypeError):
        api.call("POST", "/sessions", {"ue": "ue3"})
    answer = api.call("POST", "/sessions", json.loads(page(ue="ue3")))
    monkeypatch.undo()
    assert answer.status_code == 201
    api.call("DELETE", answer.headers["location"])


NAMES = st.sampled_from(["ue1", "ue9", "", "é", 1, None, ["ue1"]])
NUMBERS = st.one_of(
    st.sampled_from([0, 1, 50, 1_000, 60_000, 86_400_001, 10**30, 0.5, 1e400, -1, True, "1"]),
    st.floats(allow_nan=True),
)
INTENTS = st.fixed_dictionaries(
    {"task": st.sampled_from(["text-generation", "translation", "", 3])},
    optional={
        "description": st.sampled_from(["small talk", "x" * 1_001, None, "\ud800", "\0"]),
        "regions": st.sampled_from([[], ["north"], ["south"], ["nowhere"], "north", [1]]),
        "onPremises": st.sampled_from([True, False, 1, "true"]),
        "minTrustTier": st.sampled_from([0, 2, 3, 11, 2.0, "2"]),
        "maxLatencyMs": NUMBERS,
        "maxCost": NUMBERS,
        "minAccuracy": NUMBERS,
        "qosProfile": st.sampled_from(["QOS_E", "QOS_OLD", "QOS_X", "", None]),
        "requiredRates": st.sampled_from([{}, {"downlinkBps": 1_000}, {"downlinkBps": 1.0}, None]),
        "durationMs": NUMBERS,
        "unknown": st.just(1),
    },
)
BODIES = st.fixed_dictionaries(
    {},
    optional={
        "ue": NAMES,
        "intent": INTENTS,
        "ueAddress": st.sampled_from(["10.45.0.2", "fd00:45::2", "10.45.0.99", "x", 1]),
        "sink": st.sampled_from(["https://sink.example/", "x", None]),
        "other": st.none(),
    },
)
ODD = st.sampled_from(
    [
        *(b"", b"{", b"null", b"[]", b"\xff", b'{"intent":{"task":"text-generation"}} '),
        page().decode().encode("utf-16"),
        b"\xef\xbb\xbf" + page(),
        b'{"ue":"ue2","ue":"ue1","intent":{"task":"x","task":"text-generation"}}',
        b'{"ue":"ue1","ue":"ue9","intent":{"task":"text-generation"}}',
        b'{"ue":"ue1","intent":{"task":"text-generation","maxCost":NaN}}',
        b"[" * 3_000,
    ]
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.one_of(BODIES.map(lambda body: json.dumps(body).encode()), ODD))
@example(page(intent={"task": "text-generation", "maxLatencyMs": 50}))
@example(page(sink="https://sink.example/"))
def test_whatever_is_asked(api: Api, body: bytes) -> None:
    direct, other = both(api, body)
    assert direct == other
