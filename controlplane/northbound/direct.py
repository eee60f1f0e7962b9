"""The request that is made most, without what a framework does for every kind of request.

`DirectPages` answers ordinary pages (POST /sessions), in half the time. All that are unusual in any
way, or wrong, it leaves to the application: with a sink, an idempotency key or query parameters, of
another media type, or not what the schema says. A test holds what the two answer equal.
"""

import logging

from fastapi import Request
from fastapi.responses import Response
from pydantic import ValidationError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from controlplane.answers import Refusal
from controlplane.enforcement import EnforcementError
from controlplane.northbound import problem
from controlplane.northbound.identity import identify
from controlplane.northbound.plane import ControlPlane
from controlplane.northbound.sessions import SessionRequest, create
from controlplane.store import StoreError

log = logging.getLogger(__name__)


class DirectPages:
    """ASGI middleware over the application; to be run behind `BodyLimit`."""

    def __init__(self, app: ASGIApp, plane: ControlPlane) -> None:
        self._app = app
        self._plane = plane

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or not _may_be_ordinary(scope):
            await self._app(scope, receive, send)
            return
        first = await receive()
        body = _body(first)
        if body is None:
            await self._app(scope, _again(first, receive), send)
        else:
            response = await self._page(body, Request(scope))
            await response(scope, receive, send)

    async def _page(self, body: SessionRequest, request: Request) -> Response:
        try:
            return await create(body, await identify(request), self._plane)
        except (Refusal, StoreError, EnforcementError) as error:
            return problem.of_error(error)


def _may_be_ordinary(scope: Scope) -> bool:
    if scope["path"] != "/sessions" or scope["method"] != "POST" or scope["query_string"]:
        return False
    media_type = None
    for name, value in scope["headers"]:
        if name == b"content-type":
            media_type = value
        elif name == b"idempotency-key":
            return False
    return media_type == b"application/json"


def _body(message: Message) -> SessionRequest | None:
    """Return what an ordinary page asks for; None for every other body."""
    if message["type"] != "http.request" or message.get("more_body", False):
        return None
    try:
        asked = SessionRequest.model_validate_json(message["body"])
    except ValidationError:
        return None
    return asked if asked.sink is None and asked.sink_credential is None else None


def _again(first: Message, receive: Receive) -> Receive:
    """Return a `receive` that begins with a message that was taken already."""
    taken: list[Message] = [first]

    async def replay() -> Message:
        return taken.pop() if taken else await receive()

    return replay
