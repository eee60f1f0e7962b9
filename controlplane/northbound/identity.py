"""Who is calling, and what they may see.

The operator comes through the operator's listener (a Unix socket); a third party brings an OAuth 2
access token; a UE or an anchor is who its source address says it is (the user plane drops spoofed
sources). A token outranks an address. Nobody else is anybody.
"""

from dataclasses import dataclass
from ipaddress import ip_address
from typing import Annotated

from fastapi import Depends, Request

from controlplane.access_tokens import OAuthError
from controlplane.answers import Refusal
from controlplane.ledger import Session
from controlplane.northbound.plane import ControlPlane
from controlplane.policy import OPERATOR


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever made a request."""

    tenant: str  # under whose policy it acts
    ue: str | None = None  # set: a UE for itself
    anchor: str | None = None  # set: an anchor for itself
    scopes: frozenset[str] | None = None  # of an access token; None: everything of its kind

    @property
    def is_operator(self) -> bool:
        """Whether everything is open to it."""
        return (
            self.tenant == OPERATOR.name
            and self.ue is None
            and self.anchor is None
            and self.scopes is None
        )

    def require(self, scope: str) -> None:
        """Raise Refusal if an access token lacks this scope."""
        if self.scopes is not None and scope not in self.scopes:
            raise Refusal("NOT_ALLOWED", f"the access token lacks the scope {scope}")

    def require_operator(self) -> None:
        """Raise Refusal for anybody else."""
        if not self.is_operator:
            raise Refusal("NOT_ALLOWED", "this is for the operator")

    def sees(self, session: Session) -> bool:
        """Whether a session is its own: the UE's, or the tenant's."""
        if self.is_operator:
            return True
        if self.anchor is not None:
            return False
        if self.ue is not None:
            return session.ue == self.ue
        return session.tenant == self.tenant


def plane_of(request: Request) -> ControlPlane:
    """Return the control plane that this request is for."""
    plane: ControlPlane = request.app.state.plane
    return plane


async def identify(request: Request) -> Caller:
    """Return the caller. Raises Refusal for nobody."""
    plane = plane_of(request)
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme:
        if scheme.lower() != "bearer":
            raise Refusal("UNAUTHENTICATED", "an access token is sent as Authorization: Bearer")
        try:
            principal = plane.tokens.authenticate(token.strip(), plane.unix_s())
        except OAuthError as error:
            plane.metrics.token_refused(error.code)
            raise Refusal("UNAUTHENTICATED", str(error)) from None
        return Caller(principal.tenant, scopes=principal.scopes)
    if plane.is_operator(request.scope):
        return Caller(OPERATOR.name)
    if request.client is not None:
        address = ip_address(request.client.host)
        address = getattr(address, "ipv4_mapped", None) or address
        if (ue := plane.ue_by_address.get(address)) is not None:
            return Caller(plane.controller.subscriber(ue).tenant, ue=ue)
        if (anchor := plane.anchor_by_address.get(address)) is not None:
            return Caller(plane.provider_of(anchor), anchor=anchor)
    raise Refusal("UNAUTHENTICATED", "neither a UE, nor an anchor, nor an access token")


def owned(request: Request, caller: Caller, session_id: str) -> Session:
    """Return a session that the caller may see. Raises Refusal: others' are not there for it."""
    session = plane_of(request).controller.session(session_id)
    if not caller.sees(session):
        raise Refusal("SESSION_UNKNOWN", f"there is no session {session_id}")
    return session


async def _plane(request: Request) -> ControlPlane:
    """Like `plane_of`; FastAPI would call a plain function in a thread."""
    return plane_of(request)


Identified = Annotated[Caller, Depends(identify)]
Plane = Annotated[ControlPlane, Depends(_plane)]
