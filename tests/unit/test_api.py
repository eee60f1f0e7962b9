"""The northbound API: who may do what, and what every answer and every refusal looks like."""

import asyncio
import json
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
import pytest
from fakes import KEY, PREPARE_MS, World
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from controlplane.api import MAX_BODY_BYTES, Api
from controlplane.checkpoint import Signer, verify
from controlplane.clock import parse_rfc3339
from controlplane.enforcement import EnforcementError
from controlplane.evidence import JournalError
from controlplane.evidence_api import MAX_ENTRIES
from controlplane.merkle import leaf_hash, verify_consistency, verify_inclusion
from controlplane.problem import STATUS_OF_CAUSE

UE1, UE1_6, UE2, STRANGER = "10.45.0.1", "fd00:45::1", "10.45.0.2", "192.0.2.1"
OPERATOR = None  # comes through a Unix socket: no address
SIGNER = Signer.of_log(KEY)
INTENT = {"task": "text-generation"}
GRANT_MEMBERS = {
    *("sessionId", "aisi", "model", "serviceAddress", "servicePort", "aist", "commit"),
    *("candidates", "excluded", "timeline"),
}
COMMIT_MEMBERS = {"leaseId", "epoch", "anchor", "qosProfile", "state", "expiresAt"}


class Client:
    """Calls the API in this process, each time from an address."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.app = Api(world.controller, SIGNER).app()

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        at: str | None = UE1,
        content: bytes | None = None,
    ) -> httpx.Response:
        async def call() -> httpx.Response:
            client = None if at is None else (at, 40_000)
            transport = httpx.ASGITransport(self.app, client=client)
            async with httpx.AsyncClient(transport=transport, base_url="http://core") as http:
                data = (
                    json.dumps(body).encode() if content is None and body is not None else content
                )
                return await http.request(method, path, content=data)

        return asyncio.run(call())

    def page(self, at: str | None = UE1, query: str = "", **members: Any) -> dict[str, Any]:
        answer = self.call("POST", f"/sessions{query}", {**INTENT, **members}, at=at)
        assert answer.status_code == 201, answer.text
        return answer.json()

    def session(self, session_id: str) -> dict[str, Any]:
        return self.call("GET", f"/sessions/{session_id}", at=OPERATOR).json()


@pytest.fixture(scope="module", autouse=True)
def quick_disk() -> Iterator[None]:
    """Durability is tested elsewhere."""
    with patch("os.fdatasync"):
        yield


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    world = World(tmp_path)
    yield Client(world)
    world.close()


def cause(answer: httpx.Response) -> str:
    """Check the form of a refusal and return its cause."""
    assert answer.headers["content-type"] == "application/problem+json"
    told = answer.json()
    assert told["status"] == answer.status_code == STATUS_OF_CAUSE[told["cause"]]
    assert told["title"]
    assert told["detail"]
    assert "Traceback" not in answer.text
    return told["cause"]


# Answers


def test_an_intent_is_answered_with_a_lease(client: Client) -> None:
    answer = client.page(durationMs=5_000)
    assert answer.keys() == GRANT_MEMBERS
    assert answer["serviceAddress"] == {"ipv4": "198.18.0.1", "ipv6": "fd00:a151::1"}
    assert (answer["aisi"], answer["model"], answer["servicePort"]) == ("chat", "tokens-1", 8000)
    assert answer["aist"].count(".") == 2
    commit = answer["commit"]
    assert commit.keys() == COMMIT_MEMBERS
    assert (commit["epoch"], commit["anchor"], commit["state"]) == (1, "edge1", "COMMITTED")
    assert commit["qosProfile"] == "QOS_E"
    world = client.world
    (until_ns,) = world.enforcer.steering().values()
    assert parse_rfc3339(commit["expiresAt"]) == world.clock.to_unix_ns(until_ns)
    assert [candidate["anchor"] for candidate in answer["candidates"]] == [
        "edge1",
        "edge2",
        "cloud",
    ]
    assert answer["candidates"][0] == {
        "aisi": "chat",
        "anchor": "edge1",
        "latencyMs": 20.0,
        "score": 0.4,
    }
    assert list(answer["timeline"].values()) == sorted(answer["timeline"].values())
    assert answer["timeline"].keys() == {
        *("requestedUnixNs", "preparedUnixNs", "committedUnixNs", "enforcedUnixNs")
    }


def test_the_operator_gets_the_ues_answer(client: Client) -> None:
    """Same world, same intent: what differs is what is drawn at random, and nothing else."""

    def told(at: str | None, query: str) -> dict[str, Any]:
        answer = client.page(at, query)
        assert client.call("DELETE", f"/sessions/{answer['sessionId']}", at=at).status_code == 204
        for drawn in ("sessionId", "aist"):
            assert answer.pop(drawn)
        assert answer["commit"].pop("leaseId")
        assert answer["commit"].pop("epoch")
        return answer

    assert told(UE1, "") == told(OPERATOR, "?ue=ue1") == told(UE1_6, "")


def test_a_session_through_its_life(client: Client) -> None:
    granted = client.page(durationMs=10_000)
    path = f"/sessions/{granted['sessionId']}"
    moved = client.call("POST", f"{path}/relocate", {"target": "cloud"}).json()
    assert moved.keys() == GRANT_MEMBERS
    assert moved["serviceAddress"] == granted["serviceAddress"]
    assert moved["sessionId"] == granted["sessionId"]
    assert (moved["commit"]["anchor"], moved["commit"]["epoch"]) == ("cloud", 2)
    assert moved["commit"]["expiresAt"] == granted["commit"]["expiresAt"]
    back = client.call("POST", f"{path}/relocate").json()  # no body: to the best
    assert (back["commit"]["anchor"], back["commit"]["epoch"]) == ("edge2", 3)

    client.world.clock.advance(1_000)
    client.world.controller.tick()
    extended = client.call("POST", f"{path}/extend", {"durationMs": 60_000}).json()
    (until_ns,) = client.world.enforcer.steering().values()
    now = extended["commits"][-1]
    assert parse_rfc3339(now["expiresAt"]) == client.world.clock.to_unix_ns(until_ns)
    assert until_ns == client.world.clock.now + 60_000 * 10**6

    seen = client.call("GET", path).json()
    assert seen == extended
    assert seen.keys() == {"sessionId", "ue", "aisi", "commits"}
    assert [c["anchor"] for c in seen["commits"]] == ["edge1", "cloud", "edge2"]
    assert [c.get("endReason") for c in seen["commits"]] == ["RELOCATED", "RELOCATED", None]
    assert client.call("GET", "/sessions").json() == {"sessions": [seen]}

    assert client.call("DELETE", path).status_code == 204
    assert not client.world.enforcer.steering()
    assert client.call("GET", "/sessions").json() == {"sessions": []}
    assert client.call("GET", path).json()["commits"][-1]["endReason"] == "RELEASED"
    assert cause(client.call("DELETE", path)) == "SESSION_ENDED"


def test_status_says_what_is_enforced_and_how_far_the_evidence_goes(client: Client) -> None:
    granted = client.page(durationMs=9_000)
    answer = client.call("GET", "/status", at=OPERATOR).json()
    assert [entry["serviceAddress"] for entry in answer["enforced"]] == [
        *("198.18.0.1", "fd00:a151::1")
    ]
    assert answer["enforced"][0] == {
        "leaseId": granted["commit"]["leaseId"],
        "epoch": 1,
        "ue": UE1,
        "serviceAddress": "198.18.0.1",
        "anchor": "edge1",
        "remainingMs": 9_000,
        "uplinkPackets": 1,
        "uplinkBytes": 64,
        "downlinkPackets": 2,
        "downlinkBytes": 128,
    }
    assert answer["drops"] == {"no_lease_uplink": 3}
    assert answer["slotsUsed"] == {"edge1": 1}
    assert answer["evidence"] == {"entries": 2, "root": client.world.journal.root().hex()}


def test_leases_end_on_time_while_it_serves(tmp_path: Path) -> None:
    """The deadline keeper sleeps until the next deadline, or until a request changed something."""
    world = World(tmp_path)
    app = Api(world.controller, SIGNER).app()

    async def call() -> None:
        transport = httpx.ASGITransport(app, client=(UE1, 40_000))
        async with (
            asyncio.timeout(10),
            httpx.AsyncClient(transport=transport, base_url="http://core") as http,
            app.router.lifespan_context(app),
        ):
            while not ticked.called:
                await asyncio.sleep(0)
            # It has nothing to wait for. A request changes that.
            await http.post("/sessions", json={**INTENT, "durationMs": 50})
            world.clock.advance(50)
            while world.slots():
                await asyncio.sleep(0.005)

    with patch.object(world.controller, "tick", wraps=world.controller.tick) as ticked:
        asyncio.run(call())
    assert set(world.states().values()) == {"EXPIRED"}
    world.close()


# Who may


def test_a_ue_is_who_its_address_says(client: Client) -> None:
    assert client.session(client.page(UE1_6)["sessionId"])["ue"] == "ue1"
    claimed = client.page(UE2, "?ue=ue3")  # may claim what it likes
    assert client.session(claimed["sessionId"])["ue"] == "ue2"
    acted_for = client.page(OPERATOR, "?ue=ue3")
    assert client.session(acted_for["sessionId"])["ue"] == "ue3"


def test_sessions_of_others_are_not_for_a_ue(client: Client) -> None:
    path = f"/sessions/{client.page(UE1)['sessionId']}"
    for at, forbidden in ((UE2, "NOT_YOUR_SESSION"), (STRANGER, "UE_UNKNOWN")):
        for method, where, body in (
            ("GET", path, None),
            ("DELETE", path, None),
            ("DELETE", f"{path}?ue=ue1", None),
            ("POST", f"{path}/relocate", {"target": "edge2"}),
            ("POST", f"{path}/extend", {"durationMs": 90_000}),
        ):
            assert cause(client.call(method, where, body, at=at)) == forbidden
    assert client.call("GET", "/sessions", at=UE2).json() == {"sessions": []}
    assert cause(client.call("GET", "/sessions", at=STRANGER)) == "UE_UNKNOWN"
    assert cause(client.call("POST", "/sessions", INTENT, at=STRANGER)) == "UE_UNKNOWN"
    assert cause(client.call("GET", "/status", at=UE1)) == "NOT_ALLOWED"
    assert len(client.world.enforcer.applied) == 1  # nothing came of any of it
    client.page(UE2)
    assert len(client.call("GET", "/sessions", at=OPERATOR).json()["sessions"]) == 2
    assert client.call("DELETE", path, at=OPERATOR).status_code == 204


# Evidence


def test_the_evidence_proves_itself(client: Client) -> None:
    """As a third party would check it: from what the API says, and the public key."""
    client.page()
    early = verify(SIGNER.verifier, evidence(client, "checkpoint").text)
    client.page(UE2)
    late = verify(SIGNER.verifier, evidence(client, "checkpoint").text)
    assert (early.size, late.size) == (2, 4)

    answer = evidence(client, "entries?start=1&end=3")
    assert answer.headers["content-type"] == "application/jsonl"
    lines = answer.content.splitlines()
    assert [json.loads(line)["index"] for line in lines] == [1, 2]
    for index, line in zip((1, 2), lines, strict=True):
        proof = evidence(client, f"proof/inclusion?index={index}&size=4").json()
        path = [bytes.fromhex(node) for node in proof["path"]]
        verify_inclusion(leaf_hash(line), index, late.size, path, late.root)
        assert proof["leafHash"] == leaf_hash(line).hex()
        assert proof["root"] == late.root.hex()

    proof = evidence(client, "proof/consistency?from=2&to=4").json()
    path = [bytes.fromhex(node) for node in proof["path"]]
    verify_consistency(early.size, late.size, path, early.root, late.root)
    assert (proof["fromRoot"], proof["toRoot"]) == (early.root.hex(), late.root.hex())

    whole = client.world.path.read_bytes()
    assert evidence(client, "export").content == evidence(client, "entries").content == whole


def test_of_no_entries_there_is_a_checkpoint_too(client: Client) -> None:
    assert verify(SIGNER.verifier, evidence(client, "checkpoint").text).size == 0
    for empty in ("entries", "entries?start=0&end=0", "export"):
        answer = evidence(client, empty)
        assert (answer.status_code, answer.content) == (200, b"")


# Refusals


def no_answer(client: Client) -> httpx.Response:
    client.world.gateway.meanwhile = lambda: client.world.clock.advance(PREPARE_MS)
    return client.call("POST", "/sessions", INTENT)


def busy(client: Client) -> httpx.Response:
    path = f"/sessions/{client.page()['sessionId']}/relocate"
    second: list[httpx.Response] = []

    async def meanwhile() -> None:
        client.world.gateway.meanwhile = lambda: None
        second.append(await asyncio.to_thread(client.call, "POST", path))

    client.world.gateway.meanwhile = meanwhile
    assert client.call("POST", path).status_code == 200
    return second[0]


def unready(client: Client) -> httpx.Response:
    granted = client.page()
    client.world.gateway.unready = {"edge2"}
    return client.call("POST", f"/sessions/{granted['sessionId']}/relocate", {"target": "edge2"})


def full_disk(client: Client) -> httpx.Response:
    def fail(events: object) -> None:
        raise JournalError("/secret/journal: cannot be written: No space left on device")

    client.world.journal.append = fail
    answer = client.call("POST", "/sessions", INTENT)
    assert "secret" not in answer.text
    return answer


def evidence(client: Client, what: str) -> httpx.Response:
    return client.call("GET", f"/evidence/{what}", at=OPERATOR)


def journal_cut(client: Client) -> httpx.Response:
    client.page()
    client.world.path.write_bytes(b"")
    answer = evidence(client, "entries")
    assert str(client.world.path) not in answer.text
    return answer


def deaf_kernel(client: Client) -> httpx.Response:
    client.world.enforcer.refuse = lambda operations: True
    return client.call("POST", "/sessions", INTENT)


def kernel_unreadable(client: Client) -> httpx.Response:
    def fail() -> list[Any]:
        raise EnforcementError("the table is gone")

    client.world.enforcer.enforced = fail
    return client.call("GET", "/status", at=OPERATOR)


def on_a_session(
    action: str, body: Any, *, first: Callable[[Client, str], object] | None = None
) -> Callable[[Client], httpx.Response]:
    def call(client: Client) -> httpx.Response:
        path = f"/sessions/{client.page()['sessionId']}"
        if first:
            first(client, path)
        return client.call("POST", f"{path}/{action}", body)

    return call


def released(client: Client, path: str) -> None:
    client.call("DELETE", path)


REFUSALS: dict[str, tuple[int, list[Callable[[Client], httpx.Response]]]] = {
    "MALFORMED": (400, [lambda c: c.call("POST", "/sessions", content=b"{")]),
    "INVALID": (
        400,
        [
            lambda c: c.call("POST", "/sessions", {}),
            lambda c: c.call("POST", "/sessions", INTENT, at=OPERATOR),  # for which UE?
            on_a_session("extend", None),
            lambda c: evidence(c, "proof/inclusion"),
            lambda c: evidence(c, "proof/inclusion?index=x"),
            lambda c: evidence(c, "proof/inclusion?index=0&index=1"),
            lambda c: evidence(c, "proof/consistency?from=0&to=1"),
            lambda c: evidence(c, f"entries?end={MAX_ENTRIES + 1}"),
            lambda c: evidence(c, "entries?start=2&end=1"),
            lambda c: evidence(c, f"entries?start={'9' * 5_000}"),
            lambda c: evidence(c, "checkpoint?size=1"),
        ],
    ),
    "TOO_LARGE": (
        413,
        [lambda c: c.call("POST", "/sessions", content=b" " * (MAX_BODY_BYTES + 1))],
    ),
    "UE_UNKNOWN": (
        403,
        [
            lambda c: c.call("POST", "/sessions", INTENT, at=STRANGER),
            lambda c: c.call("POST", "/sessions?ue=nobody", INTENT, at=OPERATOR),
        ],
    ),
    "NOT_YOUR_SESSION": (
        403,
        [lambda c: c.call("GET", f"/sessions/{c.page(UE2)['sessionId']}")],
    ),
    "NOT_ALLOWED": (
        403,
        [
            lambda c: c.call("GET", "/status"),
            lambda c: c.call("GET", "/evidence/export"),
            on_a_session("relocate", {"breakBeforeMake": True}),
        ],
    ),
    "NO_SUCH_RESOURCE": (404, [lambda c: c.call("GET", "/nowhere")]),
    "NO_SUCH_ENTRY": (
        404,
        [
            lambda c: evidence(c, "entries?start=1&end=1"),
            lambda c: evidence(c, "proof/inclusion?index=0"),
            lambda c: evidence(c, "proof/consistency?from=1&to=9"),
        ],
    ),
    "METHOD_NOT_ALLOWED": (405, [lambda c: c.call("PUT", "/sessions", {})]),
    "SESSION_UNKNOWN": (404, [lambda c: c.call("GET", "/sessions/none")]),
    "TASK_UNKNOWN": (404, [lambda c: c.call("POST", "/sessions", {"task": "image-to-text"})]),
    "QOS_PROFILE_UNKNOWN": (
        404,
        [lambda c: c.call("POST", "/sessions", {**INTENT, "qosProfile": "GOLD"})],
    ),
    "SESSION_EXISTS": (
        409,
        [lambda c: c.page() and c.call("POST", "/sessions", INTENT)],
    ),
    "SESSION_ENDED": (
        409,
        [
            on_a_session("extend", {"durationMs": 90_000}, first=released),
            on_a_session("relocate", {}, first=released),
        ],
    ),
    "NOT_RENEWED": (409, [on_a_session("extend", {"durationMs": 1_000})]),
    "ALREADY_THERE": (409, [on_a_session("relocate", {"target": "edge1"})]),
    "BUSY": (409, [busy]),
    "NO_CANDIDATE": (
        503,
        [
            lambda c: c.call("POST", "/sessions", {**INTENT, "regions": ["atlantis"]}),
            on_a_session("relocate", {"target": "nowhere"}),
        ],
    ),
    "ANCHOR_NOT_READY": (503, [unready]),
    "PREPARE_TIMED_OUT": (503, [no_answer]),
    "ENFORCEMENT_FAILED": (503, [deaf_kernel, kernel_unreadable]),
    "JOURNAL_FAILED": (503, [full_disk, journal_cut]),
}


def test_every_cause_is_tried() -> None:
    assert REFUSALS.keys() == STATUS_OF_CAUSE.keys()


@pytest.mark.parametrize(
    ("named", "status", "provoke"),
    [
        pytest.param(named, status, provoke, id=f"{named}-{number}")
        for named, (status, provocations) in REFUSALS.items()
        for number, provoke in enumerate(provocations)
    ],
)
def test_refusal(
    client: Client, named: str, status: int, provoke: Callable[[Client], httpx.Response]
) -> None:
    answer = provoke(client)
    assert (answer.status_code, cause(answer)) == (status, named)


def test_a_refusal_names_what_excluded_each_candidate(client: Client) -> None:
    answer = client.call("POST", "/sessions", {**INTENT, "regions": ["south"], "minTrustTier": 2})
    assert cause(answer) == "NO_CANDIDATE"
    excluded = answer.json()["excluded"]
    assert {entry["anchor"]: entry["constraint"] for entry in excluded} == {
        "edge1": "region",
        "edge2": "region",
        "cloud": "trustTier",
    }
    assert all(entry["aisi"] == "chat" and entry["detail"] for entry in excluded)


# Bodies


@pytest.mark.parametrize(
    ("members", "what"),
    [
        ({"task": 5}, "task"),
        ({"task": "Text Generation"}, "task"),
        ({"task": "text-generation\n"}, "task"),
        ({"colour": "red"}, "colour"),
        ({"min_trust_tier": 1}, "min_trust_tier"),  # members are in camelCase
        ({"minTrustTier": "3"}, "minTrustTier"),
        ({"minTrustTier": True}, "minTrustTier"),
        ({"minTrustTier": 11}, "minTrustTier"),
        ({"minTrustTier": 2.5}, "minTrustTier"),
        ({"regions": "north"}, "regions"),
        ({"regions": [""]}, "regions.0"),
        ({"regions": ["n"] * 65}, "regions"),
        ({"maxLatencyMs": 0}, "maxLatencyMs"),
        ({"maxCost": -1}, "maxCost"),
        ({"durationMs": 49}, "durationMs"),
        ({"durationMs": 86_400_001}, "durationMs"),
        ({"durationMs": 10**30}, "durationMs"),
        ({"durationMs": None}, "durationMs"),
        ({"qosProfile": "a b"}, "qosProfile"),
    ],
)
def test_what_is_wrong_with_an_intent_is_named(
    client: Client, members: dict[str, Any], what: str
) -> None:
    answer = client.call("POST", "/sessions", {**INTENT, **members})
    assert cause(answer) == "INVALID"
    assert answer.json()["detail"].startswith(f"{what}: ")
    assert not client.world.entries()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b'{"task": "text-generation"', "MALFORMED"),
        (b"\xff\xfe\x00", "MALFORMED"),
        (b"[" * 60_000, "MALFORMED"),
        (b'{"a":' * 10_000, "MALFORMED"),
        (b"9" * 60_000, "MALFORMED"),
        (b"[]", "INVALID"),
        (b"null", "INVALID"),
        (b'"text-generation"', "INVALID"),
        (b'{"task": "text-generation", "maxCost": NaN}', "INVALID"),
        (b'{"task": "text-generation", "maxLatencyMs": 1e999}', "INVALID"),
        (b'{"task": "text-generation", "regions": ["\\ud800"]}', "INVALID"),
        (b'{"task": "text-generation", "\\ud800": 1}', "INVALID"),
        (b'{"task": "\\u0000"}', "INVALID"),
    ],
)
def test_what_is_no_intent_at_all(client: Client, content: bytes, named: str) -> None:
    assert cause(client.call("POST", "/sessions", content=content)) == named


def test_a_body_at_its_limit_is_read(client: Client) -> None:
    body = json.dumps(INTENT).encode().ljust(MAX_BODY_BYTES)
    assert client.call("POST", "/sessions", content=body).status_code == 201


def test_a_body_without_an_end_is_not_waited_for(client: Client) -> None:
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        for _ in range(1_000):
            taken += 1
            yield b" " * 10_000

    answer = client.call("POST", "/sessions", content=endless())
    assert cause(answer) == "TOO_LARGE"
    assert taken <= MAX_BODY_BYTES // 10_000 + 2


# JSON of any shape, with the members' own names and near misses in it.
names = st.sampled_from(
    [
        *("task", "regions", "minTrustTier", "maxLatencyMs", "maxCost", "qosProfile"),
        *("durationMs", "target", "breakBeforeMake", "sessionId", ""),
    ]
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(st.characters(), max_size=8),
    st.sampled_from(["text-generation", "edge2", "QOS_E", "north", 50, 1_000, 0.5, "\ud800"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names | st.text(), inner),
    max_leaves=6,
)
bodies = st.one_of(
    st.binary(max_size=60),
    values.map(lambda value: json.dumps(value).encode()),
    st.dictionaries(names, values, max_size=5).map(
        lambda members: json.dumps({**INTENT, **members}).encode()
    ),
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(content=bodies, action=st.sampled_from(["", "/relocate", "/extend"]))
def test_no_body_brings_it_down(content: bytes, action: str) -> None:
    folder = Path(tempfile.mkdtemp())
    world = World(folder)
    client = Client(world)
    try:
        path = f"/sessions/{client.page()['sessionId']}{action}" if action else "/sessions"
        # An exception in the application would come out here.
        answer = client.call("POST", path, content=content, at=UE1 if action else UE2)
        if not answer.is_success:
            assert cause(answer) not in ("ENFORCEMENT_FAILED", "JOURNAL_FAILED")
        assert world.enforcer.steering().keys() == {
            held.terms.lease_id for held in world.ledger.live() if held.state == "COMMITTED"
        }
    finally:
        world.close()
        shutil.rmtree(folder)
