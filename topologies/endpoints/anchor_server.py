"""The HTTP server of an AI execution anchor: tokens for UEs that bring a good AIST.

It speaks the OpenAI chat-completions form at `POST /v1/chat/completions`, for UEs, and says whether
it has room at `GET /ready`. The tokens are `tok0 tok1 ...`, so that a reader can tell what was
lost, repeated or reordered.

Who may ask: the AIST (RFC 6750 bearer token) is checked on every completion request. It must be
well signed, in force and not revoked (else 401); its audience must be an AISI of this anchor and
its connection must have come to that one's service address, it must name the address that the
connection comes from, and its scope the task of that AISI (else 403). Before a token is refused as
revoked the control plane is asked: the session may have come back a moment ago. A stream that has
begun is bounded by the lease in the kernel, not by the token.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from controlplane.verifier import Claims, Reason, TokenError, Verifier
from topologies.endpoints.anchor_agent import Report
from topologies.endpoints.anchor_load import Load
from topologies.endpoints.chat import (
    ANCHOR_HEADER,
    DEFAULT_TOKENS,
    DONE,
    ChatRequest,
    Head,
    error_body,
    token_text,
)

MAX_BODY_BYTES = 1 << 20
FORBIDDEN = {  # a sound token, but not for this
    Reason.AUDIENCE: (403, "wrong_service"),
    Reason.SOURCE: (403, "wrong_ue"),
}


class Service(BaseModel):
    """What one AISI stands for here: an entry of the `--services` file."""

    task: str  # Hugging Face pipeline tag
    model: str
    addresses: frozenset[IPv4Address | IPv6Address]  # the service's own
    port: int = 8000
    service_time_ms: float = 0  # until the first token


@dataclass(frozen=True, slots=True, kw_only=True)
class AnchorConfig:
    """One anchor."""

    name: str
    services: dict[str, Service]  # by AISI
    verifier: Verifier  # of the control plane's AISTs
    load: Load
    token_interval_ms: float = 20

    def report(self) -> Report:
        """Return what to tell the control plane."""
        return Report(
            load=self.load.fraction,
            ready_aisis=tuple(self.services) if self.load.free else (),
            latency_ms=self.load.latency_ms(time.monotonic_ns()),
        )


class Refusal(Exception):
    """A request that is answered with an error in OpenAI's form."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param


class HeldStream(StreamingResponse):
    """A stream that calls `on_end` when it ends, however it ends."""

    def __init__(self, events: AsyncIterator[str], on_end: Callable[[], None]) -> None:
        super().__init__(
            events, media_type="text/event-stream", headers={"cache-control": "no-store"}
        )
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()


async def _ask_nobody() -> None: ...


def create_app(config: AnchorConfig, ask: Callable[[], Awaitable[None]] = _ask_nobody) -> ASGIApp:
    """Build the server's application. `ask` brings `config.verifier` up to date."""
    load = config.load

    async def ready(_: Request) -> Response:
        return JSONResponse(
            {"name": config.name, "ready": load.free, "load": load.used, "slots": load.slots}
        )

    async def complete(request: Request) -> Response:
        asked_ns = time.monotonic_ns()
        aisi, service = await authorise(config, request, ask)
        chat = await read_chat(request)
        if chat.model not in (service.model, aisi):
            raise Refusal(404, "model_not_found", f"no model {chat.model!r} here", "model")
        if not load.free:
            raise Refusal(503, "overloaded", "every slot of this anchor is in use")
        count = chat.max_tokens or DEFAULT_TOKENS
        head = Head(f"chatcmpl-{config.name}-{load.take()}", service.model)
        paced = paced_tokens(count, service.service_time_ms, config.token_interval_ms)
        tokens = timed(paced, lambda: load.answered(asked_ns, time.monotonic_ns()))
        if chat.stream:
            return HeldStream(streamed(head, tokens), load.give_back)
        try:
            text = "".join([token async for token in tokens])
        finally:
            load.give_back()
        return JSONResponse(head.whole(text, count))

    app = Starlette(
        routes=[
            Route("/ready", ready, methods=["GET"]),
            Route("/v1/chat/completions", complete, methods=["POST"]),
        ],
        exception_handlers={Refusal: _refuse, HTTPException: _refuse_http, Exception: _fail},
    )
    return _with_header(app, config.name)


async def authorise(
    config: AnchorConfig, request: Request, ask: Callable[[], Awaitable[None]]
) -> tuple[str, Service]:
    """Return the AISI that the bearer may use, and its service; or raise Refusal."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise Refusal(401, "missing_token", "an AIST is needed: Authorization: Bearer ...")
    source = request.client.host if request.client else ""

    def check() -> Claims:
        return config.verifier.check(token.strip(), frozenset(config.services), source)

    try:
        try:
            claims = check()
        except TokenError as error:
            if error.reason is not Reason.REVOKED:
                raise
            await ask()
            claims = check()
    except TokenError as error:
        status, code = FORBIDDEN.get(error.reason, (401, "invalid_token"))
        raise Refusal(status, code, str(error)) from None
    service = config.services[claims.aisi]
    if _address(request.scope["server"]) not in service.addresses:
        raise Refusal(403, "wrong_service", "the AIST is for another service")
    if claims.task != service.task:
        raise Refusal(403, "insufficient_scope", f"the AIST is not for {service.task}")
    return claims.aisi, service


def _address(peer: tuple[str, int] | None) -> IPv4Address | IPv6Address | None:
    try:
        address = ip_address(peer[0]) if peer else None
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


async def read_chat(request: Request) -> ChatRequest:
    """Read and check the body, or raise Refusal."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise Refusal(413, "body_too_large", f"the body is over {MAX_BODY_BYTES} bytes")
    try:
        return ChatRequest.model_validate_json(bytes(body))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or None
        raise Refusal(400, "invalid_request", first["msg"], where) from None


async def paced_tokens(count: int, first_ms: float, interval_ms: float) -> AsyncIterator[str]:
    """Yield `tok0` after `first_ms`, then ` tok1`, ... an interval apart, without drift."""
    start_s = time.monotonic() + first_ms / 1000
    for number in range(count):
        wait_s = start_s + number * interval_ms / 1000 - time.monotonic()
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        yield token_text(number)


async def timed(tokens: AsyncIterator[str], on_first: Callable[[], None]) -> AsyncIterator[str]:
    """Yield tokens; `on_first` is called when the first one is there."""
    first = True
    async for token in tokens:
        if first:
            on_first()
            first = False
        yield token


async def streamed(head: Head, tokens: AsyncIterator[str]) -> AsyncIterator[str]:
    """Yield the server-sent events of a completion, from role to `[DONE]`."""
    yield head.event({"role": "assistant", "content": ""})
    async for token in tokens:
        yield head.event({"content": token})
    yield head.event({}, finish_reason="length")
    yield f"{DONE}\n\n"


def _error(status: int, code: str, message: str, param: str | None = None) -> Response:
    headers = {"www-authenticate": f'Bearer error="{code}"'} if status == 401 else None
    return JSONResponse(error_body(status, code, message, param), status, headers)


async def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return _error(error.status, error.code, str(error), error.param)


async def _refuse_http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, "no_such_endpoint", error.detail)


async def _fail(_: Request, __: Exception) -> Response:
    return _error(500, "internal_error", "the anchor failed")


def _with_header(app: ASGIApp, name: str) -> ASGIApp:
    async def named(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                header = (ANCHOR_HEADER.encode(), name.encode())
                message["headers"] = [*message.get("headers", ()), header]
            await send(message)

        await app(scope, receive, send_named)

    return named
