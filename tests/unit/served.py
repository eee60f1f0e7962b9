"""The whole HTTP API over a real control plane: real store, real clock, a user plane that notes."""

import asyncio
import time
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any, Self

import httpx
from starlette.types import ASGIApp, Receive, Scope, Send

from controlplane.access_tokens import SCOPES, Client, generate_secret
from controlplane.admission import Rates
from controlplane.body_limit import BodyLimit
from controlplane.catalogue import Catalogue
from controlplane.clock import Clock
from controlplane.configfile import parse_yaml
from controlplane.enforcement import (
    Address,
    Binding,
    Enforced,
    Install,
    Move,
    Operation,
    Reconciliation,
    Revoke,
    Usage,
)
from controlplane.keys import KeyRing, generate_key
from controlplane.northbound.app import create_app
from controlplane.northbound.plane import OPERATOR_LISTENER
from controlplane.parties import AnchorRefusedError, Subscriber
from controlplane.policy import Policy, Tenant, Tenants
from controlplane.service import Network, Options, Service
from controlplane.sqlite_outbox import SqliteOutbox
from controlplane.sqlite_store import SqliteStore

CATALOGUE = """
qos_profiles:
  - {name: QOS_E, five_qi: 4, guaranteed_downlink_bps: 1000000, max_duration_s: 3600}
  - {name: QOS_P, five_qi: 4, guaranteed_downlink_bps: 1000000, priority_level: 2,
     preemption_capability: true, packet_delay_budget_ms: 20}
  - {name: QOS_OLD, status: DEPRECATED}
services:
  - {aisi: chat, task: text-generation, model: tokens-1, description: small talk,
     address4: 198.18.0.1, address6: "fd00:a151::1"}
  - {aisi: code, task: text-generation, model: tokens-2, description: writes computer programs,
     address4: 198.18.0.2, address6: "fd00:a151::2"}
anchors:
  - {name: edge1, region: north, trust_tier: 3, slots: 2, cost: 2,
     hosts: [{aisi: chat, service_time_ms: 20}, {aisi: code, service_time_ms: 20}]}
  - {name: edge2, region: south, trust_tier: 1, slots: 2, cost: 3,
     hosts: [{aisi: chat, service_time_ms: 20}]}
"""
UES = [
    Subscriber(f"ue{n}", IPv4Address(f"10.45.0.{n}"), IPv6Address(f"fd00:45::{n}"), "gnb1")
    for n in range(1, 9)
]
OPERATOR = "operator"  # who calls: this, a UE, an anchor, an address, or a client with its token
CLIENTS = ("clinic", "garage")


class UserPlane:
    """Holds what it is told, in memory."""

    def __init__(self) -> None:
        self.open: dict[str, Binding] = {}

    async def apply(self, operations: Sequence[Operation]) -> None:
        for operation in operations:
            match operation:
                case Install(new) | Move(new, _, _):
                    self.open[new.lease_id] = new
                case Revoke(binding):
                    self.open.pop(binding.lease_id, None)
                case _:
                    pass

    async def usage(self, bindings: Sequence[Binding]) -> dict[str, Usage]:
        counts = Usage(uplink_packets=7, uplink_bytes=448, downlink_packets=9, downlink_bytes=576)
        return {binding.lease_id: counts for binding in bindings}

    async def enforced(self) -> list[Enforced]:
        return []

    async def reconcile(self, live: Iterable[Binding]) -> Reconciliation:
        return Reconciliation(adopted=(), installed=(), removed=())

    async def drops(self) -> dict[str, int]:
        return {"no_lease_uplink": 3}


class Anchors:
    """Ready, unless named here."""

    def __init__(self) -> None:
        self.dead: set[str] = set()

    async def ready(self, anchor: str, aisi: str) -> bool:
        if anchor in self.dead:
            raise AnchorRefusedError(f"{anchor} refuses connections")
        return True


class Api:
    """A served control plane; `call` makes a request as somebody."""

    def __init__(
        self, folder: Path, *, tenants: Sequence[Tenant] = (), options: Options | None = None
    ) -> None:
        self.user_plane = UserPlane()
        self.anchors = Anchors()
        self._secrets: dict[str, str] = {}
        own = []
        for name in CLIENTS:
            secret, hashed = generate_secret()
            self._secrets[name] = secret
            client = Client(client_id=name, secret_hash=hashed, scopes=tuple(SCOPES))
            given = next((t.policy for t in tenants if t.name == name), Policy())
            own.append(Tenant(name=name, policy=given, clients=(client,)))
        addresses: dict[Address, str] = {
            IPv4Address("10.47.1.2"): "edge1",
            IPv4Address("10.47.2.2"): "edge2",
        }
        self._store = SqliteStore(folder / "control.db")
        self.service = Service(
            catalogue=parse_yaml(CATALOGUE, Catalogue, "catalogue.yaml"),
            network=Network(
                subscribers=UES,
                cells={"gnb1": Rates(4_000_000, 4_000_000), "gnb2": Rates(1_000_000, 1_000_000)},
                attachment_points=["edge1", "edge2", "edge3"],
                anchor_addresses=addresses,
            ),
            tenants=Tenants(tenants=tuple(own)),
            store=self._store,
            outbox=SqliteOutbox(self._store),
            keys=KeyRing.open(folder / "keys", time.time_ns()),
            evidence_key=generate_key(folder / "evidence.key"),
            enforcer=self.user_plane,
            gateway=self.anchors,
            clock=Clock(),
            options=replace(options or Options(), allow_http_sinks=True),
        )
        self.plane = self.service.plane
        self.app = create_app(self.plane)
        self.app.add_middleware(BodyLimit)
        self._loop = asyncio.new_event_loop()
        self._stack = AsyncExitStack()
        self._tokens: dict[str, str] = {}

    def __enter__(self) -> Self:
        self.run(self._stack.enter_async_context(self.service.running()))
        return self

    def __exit__(self, *_: object) -> None:
        self.run(self._stack.aclose())
        self._store.close()
        self._loop.close()

    def run(self, work: Any) -> Any:
        return self._loop.run_until_complete(work)

    def call(
        self, method: str, path: str, json: Any = None, *, by: str = OPERATOR, **options: Any
    ) -> httpx.Response:
        headers = dict(options.pop("headers", {}))
        if by in CLIENTS:
            headers["authorization"] = f"Bearer {self._token(by)}"
        response: httpx.Response = self.run(
            self._request(_listener(self.app, by), by, method, path, json, headers, options)
        )
        return response

    def page(self, ue: str, by: str = OPERATOR, **intent: Any) -> dict[str, Any]:
        """Page and return the grant."""
        body = {"ue": ue, "intent": {"task": "text-generation", **intent}}
        answer = self.call("POST", "/sessions", body, by=by)
        assert answer.status_code == 201, answer.text
        granted: dict[str, Any] = answer.json()
        return granted

    async def _request(
        self,
        app: ASGIApp,
        by: str,
        method: str,
        path: str,
        json: Any,
        headers: dict[str, str],
        options: dict[str, Any],
    ) -> httpx.Response:
        transport = httpx.ASGITransport(app=app, client=(_address(by), 40_000))
        async with httpx.AsyncClient(transport=transport, base_url="http://core") as client:
            return await client.request(method, path, json=json, headers=headers, **options)

    def token(self, name: str, **asked: str) -> str:
        """Return a new access token of a client; `asked`: its `scope`, if not all."""
        answer = self.call(
            "POST",
            "/oauth2/token",
            by="192.0.2.1",
            data={"grant_type": "client_credentials", **asked},
            auth=(name, self._secrets[name]),
        )
        granted: str = answer.json()["access_token"]
        return granted

    def _token(self, name: str) -> str:
        if name not in self._tokens:
            self._tokens[name] = self.token(name)
        return self._tokens[name]


def _address(by: str) -> str:
    known = {ue.ue: str(ue.address4) for ue in UES}
    known |= {"edge1": "10.47.1.2", "edge2": "10.47.2.2", "ue2v6": "fd00:45::2"}
    return known.get(by, by if by[0].isdigit() else "192.0.2.1")


def _listener(app: ASGIApp, by: str) -> ASGIApp:
    """Say by which listener a request came, as the server does."""

    async def named(scope: Scope, receive: Receive, send: Send) -> None:
        name = OPERATOR_LISTENER if by == OPERATOR else "network"
        scope.setdefault("state", {})["listener"] = name
        await app(scope, receive, send)

    return named
