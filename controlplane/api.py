"""The northbound HTTP API: intents in, leases out.

A UE is who its source address says it is. The operator comes through a Unix socket and may act
for any UE (`?ue=`). Sessions answer to their UE and to the operator only.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from ipaddress import ip_address
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from controlplane.checkpoint import Signer
from controlplane.clock import NS_PER_S, rfc3339
from controlplane.controller import Controller, Grant, Refusal
from controlplane.enforcement import EnforcementError
from controlplane.evidence import JournalError
from controlplane.evidence_api import EvidenceApi, Handler
from controlplane.intent import MAX_DURATION_MS, MIN_DURATION_MS, Intent, Name
from controlplane.lease import Lease
from controlplane.ledger import Session
from controlplane.problem import problem

MAX_BODY_BYTES = 65_536
RETRY_S = 1.0
MAX_WAIT_S = 60.0

log = logging.getLogger(__name__)
Body = TypeVar("Body", bound=BaseModel)


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, alias_generator=to_camel)


class RelocationRequest(_Request):
    """Where to; without a target, to the best other anchor."""

    target: Name | None = None
    break_before_make: bool = False


class ExtensionRequest(_Request):
    """How long from now, ms."""

    duration_ms: Annotated[int, Field(ge=MIN_DURATION_MS, le=MAX_DURATION_MS)]


class Api:
    """Handlers over one controller, and the task that ends what is overdue."""

    def __init__(self, controller: Controller, signer: Signer) -> None:
        """`signer` vouches for the evidence log."""
        self._controller = controller
        self._evidence = EvidenceApi(controller.ledger.journal, signer)
        self._changed = asyncio.Event()
        self._ue_by_address = controller.ue_by_address()

    def app(self) -> Starlette:
        """Return the ASGI application."""
        return Starlette(
            routes=[
                Route("/sessions", self._guard(self.create), methods=["POST"]),
                Route("/sessions", self._guard(self.list), methods=["GET"]),
                Route("/sessions/{session_id}", self._guard(self.get), methods=["GET"]),
                Route("/sessions/{session_id}", self._guard(self.delete), methods=["DELETE"]),
                Route(
                    "/sessions/{session_id}/relocate", self._guard(self.relocate), methods=["POST"]
                ),
                Route("/sessions/{session_id}/extend", self._guard(self.extend), methods=["POST"]),
                Route("/status", self._for_operator(self.status), methods=["GET"]),
                *self._evidence.routes(self._for_operator),
            ],
            exception_handlers={404: _no_such_resource, 405: _method_not_allowed},
            lifespan=self._lifespan,
        )

    # Handlers

    async def create(self, request: Request) -> Response:
        """Page: resolve an intent, grant a lease."""
        ue = self._caller(request) or request.query_params.get("ue")
        if ue is None:
            raise Refusal("INVALID", "the operator says for which UE: ?ue=NAME")
        intent = await _body(request, Intent)
        grant = await self._controller.page(ue, intent)
        return JSONResponse(self._grant(grant), status_code=201)

    async def list(self, request: Request) -> Response:
        """List the caller's live sessions."""
        caller = self._caller(request)
        sessions = [
            self._session(session)
            for session in self._controller.ledger.sessions()
            if caller in (None, session.ue)
        ]
        return JSONResponse({"sessions": sessions})

    async def get(self, request: Request) -> Response:
        """Return one session and its leases."""
        return JSONResponse(self._session(self._owned(request)))

    async def delete(self, request: Request) -> Response:
        """Release a session."""
        self._controller.release(self._owned(request).session_id)
        return Response(status_code=204)

    async def relocate(self, request: Request) -> Response:
        """Move a session to another anchor."""
        session = self._owned(request)
        body = await _body(request, RelocationRequest)
        grant = await self._controller.relocate(
            session.session_id, body.target, break_before_make=body.break_before_make
        )
        return JSONResponse(self._grant(grant))

    async def extend(self, request: Request) -> Response:
        """Renew a session's lease."""
        session = self._owned(request)
        body = await _body(request, ExtensionRequest)
        self._controller.renew(session.session_id, body.duration_ms)
        return JSONResponse(self._session(session))

    async def status(self, request: Request) -> Response:
        """Return what the kernel enforces and drops, and how far the evidence goes."""
        size, root = self._controller.ledger.evidence()
        enforced = [
            {
                "leaseId": entry.lease_id,
                "epoch": entry.epoch,
                "ue": str(entry.flow.ue),
                "serviceAddress": str(entry.flow.service),
                "anchor": entry.anchor,
                "remainingMs": entry.remaining_ms,
                "uplinkPackets": entry.usage.uplink_packets,
                "uplinkBytes": entry.usage.uplink_bytes,
                "downlinkPackets": entry.usage.downlink_packets,
                "downlinkBytes": entry.usage.downlink_bytes,
            }
            for entry in self._controller.enforcer.enforced()
        ]
        return JSONResponse(
            {
                "enforced": enforced,
                "drops": self._controller.enforcer.drops(),
                "slotsUsed": self._controller.ledger.slots_used(),
                "evidence": {"entries": size, "root": root.hex()},
            }
        )

    # Around them

    def _for_operator(self, handler: Handler) -> Handler:
        async def checked(request: Request) -> Response:
            if self._caller(request) is not None:
                raise Refusal("NOT_ALLOWED", f"{request.url.path} is for the operator")
            return await handler(request)

        return self._guard(checked)

    def _guard(self, handler: Handler) -> Handler:
        async def guarded(request: Request) -> Response:
            try:
                return await handler(request)
            except Refusal as refusal:
                excluded = [asdict(exclusion) for exclusion in refusal.excluded]
                extra = {"excluded": excluded} if excluded else {}
                return problem(refusal.cause, str(refusal), **extra)
            except JournalError as error:
                log.error("%s", error)
                return problem("JOURNAL_FAILED", "the evidence log cannot be used")
            except EnforcementError as error:
                log.error("%s", error)
                return problem("ENFORCEMENT_FAILED", str(error))
            finally:
                self._changed.set()

        return guarded

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        keeper = asyncio.create_task(self._keep_deadlines(), name="deadlines")
        try:
            yield
        finally:
            keeper.cancel()

    async def _keep_deadlines(self) -> None:
        """End leases when they are due: the kernel has closed them by then, slots become free."""
        while True:
            self._changed.clear()
            try:
                deadline_ns = self._controller.tick()
                wait_s = MAX_WAIT_S
                if deadline_ns is not None:
                    wait_s = (deadline_ns - self._controller.now_ns()) / NS_PER_S
            except (JournalError, EnforcementError) as error:
                log.error("ending overdue leases: %s", error)
                wait_s = RETRY_S
            try:
                async with asyncio.timeout(max(wait_s, 0)):
                    await self._changed.wait()
            except TimeoutError:
                pass

    def _caller(self, request: Request) -> str | None:
        """Return the UE that is calling; None for the operator. Raises Refusal for strangers."""
        if request.client is None:
            return None
        ue = self._ue_by_address.get(ip_address(request.client.host))
        if ue is None:
            raise Refusal("UE_UNKNOWN", f"{request.client.host} is no UE of this network")
        return ue

    def _owned(self, request: Request) -> Session:
        caller = self._caller(request)
        session = self._controller.session(request.path_params["session_id"])
        if caller not in (None, session.ue):
            raise Refusal("NOT_YOUR_SESSION", "this session belongs to another UE")
        return session

    def _grant(self, grant: Grant) -> dict[str, Any]:
        terms = grant.lease.terms
        service = self._controller.catalogue.service(terms.aisi)
        return {
            "sessionId": terms.session_id,
            "aisi": terms.aisi,
            "model": service.model,
            "serviceAddress": {"ipv4": str(service.address4), "ipv6": str(service.address6)},
            "servicePort": service.port,
            "aist": grant.token,
            "commit": self._commit(grant.lease),
            "candidates": [
                {
                    "aisi": candidate.service.aisi,
                    "anchor": candidate.anchor.name,
                    "latencyMs": candidate.latency_ms,
                    "score": round(candidate.score, 6),
                }
                for candidate in grant.resolution.candidates
            ],
            "excluded": [asdict(exclusion) for exclusion in grant.resolution.excluded],
            "timeline": {
                "requestedUnixNs": grant.timeline.requested_unix_ns,
                "preparedUnixNs": grant.timeline.prepared_unix_ns,
                "committedUnixNs": grant.timeline.committed_unix_ns,
                "enforcedUnixNs": grant.timeline.enforced_unix_ns,
            },
        }

    def _commit(self, lease: Lease) -> dict[str, Any]:
        deadline_unix_ns = self._controller.to_unix_ns(lease.deadline_ns)
        return {
            "leaseId": lease.terms.lease_id,
            "epoch": lease.terms.epoch,
            "anchor": lease.terms.anchor,
            "qosProfile": lease.terms.intent.qos_profile,
            "state": lease.state.value,
            "expiresAt": rfc3339(deadline_unix_ns),
            **({"endReason": lease.end_reason.value} if lease.end_reason else {}),
        }

    def _session(self, session: Session) -> dict[str, Any]:
        leases = [self._controller.ledger.lease(lease_id) for lease_id in session.lease_ids]
        return {
            "sessionId": session.session_id,
            "ue": session.ue,
            "aisi": session.aisi,
            "commits": [self._commit(lease) for lease in leases],
        }


async def _no_such_resource(request: Request, _: Exception) -> Response:
    return problem("NO_SUCH_RESOURCE", f"there is nothing at {request.url.path}")


async def _method_not_allowed(request: Request, _: Exception) -> Response:
    return problem("METHOD_NOT_ALLOWED", f"{request.url.path} does not take {request.method}")


async def _body(request: Request, model: type[Body]) -> Body:
    """Read a bounded JSON body into a model. Raises Refusal naming what is wrong."""
    data = b""
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY_BYTES:
            raise Refusal("TOO_LARGE", f"a request body has at most {MAX_BODY_BYTES} bytes")
    try:
        members = json.loads(data or b"{}")
    except (ValueError, RecursionError) as error:
        raise Refusal("MALFORMED", "the request body is not JSON") from error
    try:
        return model.model_validate(members)
    except ValidationError as error:
        what = [
            f"{'.'.join(map(str, item['loc'])) or 'body'}: {item['msg']}"
            for item in error.errors(include_url=False, include_input=False)
        ]
        raise Refusal("INVALID", "; ".join(what)) from error
