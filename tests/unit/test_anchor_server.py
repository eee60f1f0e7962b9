"""The anchor answers bearers of a valid AIST, from the right address, and refuses the rest."""

import asyncio
import json
import time
from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from controlplane import aist, keys
from controlplane.keys import SigningKey
from controlplane.verifier import Verifier
from topologies.endpoints.anchor_load import Load
from topologies.endpoints.anchor_server import MAX_BODY_BYTES, AnchorConfig, Service, create_app
from topologies.endpoints.chat import MAX_TOKENS, token_number
from topologies.endpoints.ue import Answer, TokenArrival, analyse

KEY = SigningKey(Ed25519PrivateKey.generate())
UE, UE6, SERVICE = "10.45.0.1", "fd00:45::1", "198.18.0.1"
AISI, TASK = "aisi-1", "text-generation"
CHAT = "/v1/chat/completions"
S = 1_000_000_000


def service(*addresses: str, **changes: Any) -> Service:
    options: dict[str, Any] = {"task": TASK, "model": "tiny", **changes}
    return Service(addresses=frozenset(map(ip_address, addresses)), **options)


def config(slots: int = 64, **changes: Any) -> AnchorConfig:
    options: dict[str, Any] = {
        "name": "edge1",
        "services": {
            AISI: service(SERVICE, "fd00:a151::1"),
            "aisi-2": service("198.18.0.2", "fd00:a151::2", model="large"),
        },
        "load": Load(slots),
        "verifier": Verifier(aist.ISSUER, keys.jwks([KEY.public])),
        "token_interval_ms": 0,
    }
    return AnchorConfig(**{**options, **changes})


class Client:
    """Calls an anchor in this process, as the UE at `ue` that connects to the address `at`."""

    def __init__(self, ue: str = UE, at: str = SERVICE, **changes: Any) -> None:
        host = f"[{at}]" if ":" in at else at
        self._url = f"http://{host}:8000"
        self._transport = httpx.ASGITransport(create_app(config(**changes)), client=(ue, 40000))

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def call() -> httpx.Response:
            async with httpx.AsyncClient(transport=self._transport, base_url=self._url) as client:
                return await client.request(method, path, **options)

        return asyncio.run(call())

    def get(self, path: str) -> httpx.Response:
        return self.request("GET", path)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return self.request("POST", path, **options)


def token(key: SigningKey = KEY, *, lives_s: int = 3600, **changes: Any) -> str:
    now_ns = time.time_ns()
    options: dict[str, Any] = {
        "ue": "ue1",
        "addresses": [UE, UE6],
        "aisi": AISI,
        "task": TASK,
        "lease_id": "l",
        "epoch": 1,
    }
    return aist.issue(
        key,
        **{**options, **changes},
        now_unix_ns=now_ns,
        lease_expires_unix_ns=now_ns + lives_s * S,
    )


def bearer(value: str | None = None) -> dict[str, str]:
    return {"authorization": f"Bearer {value or token()}"}


def chat(**changes: Any) -> dict[str, Any]:
    body = {"model": AISI, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    return {**body, **changes}


def test_ready_needs_no_token() -> None:
    response = Client(ue="192.0.2.1", at="192.0.2.9").get("/ready")
    assert response.json() == {"name": "edge1", "ready": True, "load": 0, "slots": 64}
    assert response.headers["x-aipaging-anchor"] == "edge1"


def test_whole_answer() -> None:
    response = Client().post(CHAT, json=chat(), headers=bearer())
    assert response.status_code == 200
    assert response.headers["x-aipaging-anchor"] == "edge1"
    body = response.json()
    assert body["choices"][0]["message"]["content"] == "tok0 tok1 tok2"
    assert (body["model"], body["usage"]["completion_tokens"]) == ("tiny", 3)


def test_streamed_answer_is_numbered_and_ends() -> None:
    one = Client()
    got = one.post(CHAT, json=chat(max_tokens=50, stream=True), headers=bearer())
    lines = [line for line in got.text.splitlines() if line]
    assert got.headers["content-type"].startswith("text/event-stream")
    assert lines[-1] == "data: [DONE]"
    assert [n for n in map(token_number, lines) if n is not None] == list(range(50))
    last = json.loads(lines[-2].removeprefix("data: "))
    assert last["choices"][0]["finish_reason"] == "length"
    assert one.get("/ready").json()["load"] == 0


def test_first_token_takes_the_service_time_and_is_measured() -> None:
    load = Load(1)
    services = {AISI: service(SERVICE, service_time_ms=30)}
    assert Client(services=services, load=load).post(CHAT, json=chat(), headers=bearer()).is_success
    latency_ms = load.latency_ms(time.monotonic_ns())
    assert latency_ms is not None
    assert 30 <= latency_ms < 130


def test_ipv6_and_model_by_name() -> None:
    response = Client(ue=UE6, at="fd00:a151::1").post(
        CHAT, json=chat(model="tiny"), headers=bearer()
    )
    assert response.status_code == 200


def refusals() -> Iterator[Any]:
    good, other = token(), SigningKey(Ed25519PrivateKey.generate())
    head, body, signature = good.split(".")
    nested = "W1tb" * 4000  # [[[ ...
    yield pytest.param({}, 401, "missing_token", id="missing")
    yield pytest.param({"authorization": f"Basic {good}"}, 401, "missing_token", id="scheme")
    yield pytest.param(bearer("x"), 401, "invalid_token", id="not-a-token")
    yield pytest.param(bearer(f"{nested}.{body}.{signature}"), 401, "invalid_token", id="nested")
    yield pytest.param(bearer(f"{head}.{nested}.{signature}"), 401, "invalid_token", id="nested2")
    yield pytest.param(bearer(token(lives_s=-1)), 401, "invalid_token", id="expired")
    yield pytest.param(bearer(token(other)), 401, "invalid_token", id="other-key")
    yield pytest.param(
        bearer(f"{head}.{body}.{signature[:-6]}AAAAAA"), 401, "invalid_token", id="tampered"
    )
    yield pytest.param(bearer(token(aisi="aisi-3")), 403, "wrong_service", id="audience")
    yield pytest.param(bearer(token(addresses=["10.45.0.2"])), 403, "wrong_ue", id="address")
    yield pytest.param(bearer(token(addresses=[])), 403, "wrong_ue", id="no-address")
    yield pytest.param(bearer(token(task="ocr")), 403, "insufficient_scope", id="scope")


@pytest.mark.parametrize(("headers", "status", "code"), list(refusals()))
def test_refused_without_the_right_token(headers: dict[str, str], status: int, code: str) -> None:
    response = Client().post(CHAT, json=chat(), headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert response.headers["x-aipaging-anchor"] == "edge1"
    assert ("www-authenticate" in response.headers) == (status == 401)


@pytest.mark.parametrize("at", ["192.0.2.9", "198.18.0.2"])  # the anchor's, another service's
def test_token_is_good_at_the_service_address_only(at: str) -> None:
    answer = Client(at=at).post(CHAT, json=chat(), headers=bearer())
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "wrong_service")


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"model": "large"}, 404, "model"),
        ({"model": None}, 400, "model"),
        ({"messages": []}, 400, "messages"),
        ({"messages": "hi"}, 400, "messages"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": "3"}, 400, "max_tokens"),
        ({"max_tokens": MAX_TOKENS + 1}, 400, "max_tokens"),
        ({"stream": "yes"}, 400, "stream"),
        ({"temperature": "hot", "made_up": [1]}, 200, None),
    ],
)
def test_fields(changes: dict[str, Any], status: int, param: str | None) -> None:
    response = Client().post(CHAT, json=chat(**changes), headers=bearer())
    assert response.status_code == status
    if status != 200:
        assert response.json()["error"]["param"] == param


def test_body_is_bounded() -> None:
    body = json.dumps(chat(pad="x" * MAX_BODY_BYTES))
    assert Client().post(CHAT, content=body, headers=bearer()).status_code == 413


@pytest.mark.parametrize(("method", "path"), [("GET", CHAT), ("GET", "/"), ("POST", "/ready")])
def test_other_endpoints(method: str, path: str) -> None:
    response = Client().request(method, path)
    assert response.status_code in (404, 405)
    assert response.json()["error"]["code"] == "no_such_endpoint"


def test_full_anchor_says_so() -> None:
    full = Client(slots=0)
    assert full.get("/ready").json()["ready"] is False
    assert full.post(CHAT, json=chat(), headers=bearer()).status_code == 503


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=10,
)
FIELDS = st.sampled_from(["model", "messages", "max_tokens", "stream", "n"])
SHARED = Client()
SHARED_BEARER = bearer(token(lives_s=3600))


@given(
    st.binary(max_size=200)
    | JSON.map(lambda value: json.dumps(value).encode())
    | st.dictionaries(FIELDS, JSON).map(lambda value: json.dumps(chat(**value)).encode())
    | st.integers(min_value=1, max_value=50_000).map(lambda depth: b"[" * depth)
)
def test_no_body_makes_it_fail(body: bytes) -> None:
    response = SHARED.post(CHAT, content=body, headers=SHARED_BEARER)
    assert response.status_code < 500
    if response.status_code != 200:
        assert response.json()["error"]["message"]


@given(st.text(alphabet=st.characters(min_codepoint=33, max_codepoint=126), max_size=200))
def test_no_token_makes_it_fail(value: str) -> None:
    headers = {"authorization": f"Bearer {value}"}
    assert SHARED.post(CHAT, json=chat(), headers=headers).status_code == 401


def arrivals(*numbers: int) -> list[TokenArrival]:
    return [
        TokenArrival(number=number, at_ns=index * 10_000_000, anchor="edge1")
        for index, number in enumerate(numbers)
    ]


def test_stream_report() -> None:
    report = analyse(arrivals(0, 2, 1, 1, 4), 6, complete=False, error="reset")
    assert (report.lost, report.repeated, report.reordered) == (2, 1, 1)
    assert (report.interval_ms, report.longest_stall_ms) == (10.0, 0.0)
    late = TokenArrival(number=3, at_ns=80_000_000, anchor="edge2")
    assert analyse([*arrivals(0, 1, 2), late], 4, complete=True).longest_stall_ms == 50.0
    assert analyse([], 2, complete=False).lost == 2


def test_answer_is_read_as_the_core_writes_it() -> None:
    answer = Answer.model_validate(
        {
            "sessionId": "s",
            "aisi": AISI,
            "serviceAddress": {"ipv4": SERVICE, "ipv6": "fd00:a151::1"},
            "servicePort": 8000,
            "aist": "t",
            "commit": {
                "leaseId": "l",
                "epoch": 1,
                "anchor": "edge1",
                "qosProfile": "q",
                "expiresAt": "2030-01-01T00:00:00Z",
            },
        }
    )
    assert (answer.service_address.ipv4, answer.commit.lease_id) == (SERVICE, "l")
