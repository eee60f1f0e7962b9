"""Request bodies are bounded in size and time, whatever their framing (RFC 9110, 9112, 9113)."""

import asyncio
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 65_536
BODY_TIMEOUT_S = 10.0


class BodyLimit:
    """ASGI middleware: reads a body whole, then calls the application with it as one message.

    A body of more than `max_bytes` is answered with 413, announced or not; one that is not complete
    after `timeout_s`, with 408; one whose framing breaks or whose client leaves, with 400.
    """

    def __init__(
        self, app: ASGIApp, max_bytes: int = MAX_BODY_BYTES, timeout_s: float = BODY_TIMEOUT_S
    ) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or not _may_have_body(scope):
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read(scope, receive)
        except _Refused as refused:
            await refused.response(scope, receive, send)
            return
        replayed = False

        async def replay() -> Message:
            nonlocal replayed
            if replayed:
                return await receive()
            replayed = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        if (announced := _content_length(scope)) is not None and announced > self._max_bytes:
            raise self._too_large()
        chunks: list[bytes] = []
        size_bytes = 0
        try:
            async with asyncio.timeout(self._timeout_s):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        raise _Refused(400, "Bad Request", "MALFORMED", "the body is incomplete")
                    chunk = message.get("body", b"")
                    size_bytes += len(chunk)
                    if size_bytes > self._max_bytes:
                        raise self._too_large()
                    chunks.append(chunk)
                    if not message.get("more_body", False):
                        return b"".join(chunks)
        except TimeoutError:
            raise _Refused(
                408,
                "Request Timeout",
                "TOO_SLOW",
                f"the body was not complete after {self._timeout_s:g} s",
            ) from None

    def _too_large(self) -> "_Refused":
        return _Refused(
            413,
            "Request Entity Too Large",
            "TOO_LARGE",
            f"a body has at most {self._max_bytes} bytes",
        )


class _Refused(Exception):
    """Problem details (RFC 9457) in place of the application's answer.

    The connection ends with it: what is left of the body is of no use.
    """

    def __init__(self, status: int, title: str, cause: str, detail: str) -> None:
        super().__init__(detail)
        problem: dict[str, Any] = {
            "title": title,
            "status": status,
            "cause": cause,
            "detail": detail,
        }
        self.response = JSONResponse(problem, status, media_type="application/problem+json")


def _content_length(scope: Scope) -> int | None:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return None


def _may_have_body(scope: Scope) -> bool:
    """Whether to read at all: HTTP/1 says so in its headers, HTTP/2 in its frames."""
    if not scope["http_version"].startswith("1"):
        return True
    return any(name in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"])
