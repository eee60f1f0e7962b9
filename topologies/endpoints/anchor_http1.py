"""HTTP/1.1 (RFC 9112) on one connection, by h11."""

from typing import Any

import h11
from starlette.types import ASGIApp, Message

from topologies.endpoints.anchor_link import MAX_UNREAD_BYTES, Headers, Link, head

MAX_HEAD_BYTES = 32_768


class Http1:
    """One connection: request after request.

    While it drains, the next answer that begins says `Connection: close`. An idle connection is
    left open for that answer: if it were closed, a request might be on its way to it, and be lost.
    """

    def __init__(self, app: ASGIApp, link: Link) -> None:
        self._app = app
        self._link = link
        self._h11 = h11.Connection(h11.SERVER, MAX_HEAD_BYTES)
        self._busy = False
        self._draining = False
        self._head_request = False
        self._head: tuple[int, Headers] | None = None  # not sent yet

    def drain(self, patience_s: float) -> None:
        """Announce the end with the next answer that begins."""
        self._draining = True

    def cut(self) -> None:
        """Close; with a RST where an answer would seem complete."""
        if self._busy:
            self._link.reset()
        else:
            self._link.close()

    async def run(self, received: bytes) -> None:
        """Serve until one side has closed. OSError, TimeoutError if the client did not."""
        try:
            self._h11.receive_data(received)
            while isinstance(request := await self._next(), h11.Request):
                self._busy = True
                await self._answer(request)
                if not await self._over():
                    break
                self._busy = False
        except h11.RemoteProtocolError as error:
            self._refuse(error)
        if self._h11.our_state in (h11.SEND_BODY, h11.ERROR):
            self._link.reset()

    async def _next(self) -> Any:
        while (event := self._h11.next_event()) is h11.NEED_DATA:
            if self._h11.they_are_waiting_for_100_continue:
                self._send_event(h11.InformationalResponse(status_code=100, headers=[]))
            self._h11.receive_data(await self._link.read())
        return event

    async def _answer(self, request: h11.Request) -> None:
        version, method = request.http_version.decode(), request.method.decode()
        self._head_request = method == "HEAD"
        self._head = None
        scope = self._link.scope(version, method, request.target, list(request.headers))
        await self._link.call(self._app, scope, self._receive, self._send)

    async def _receive(self) -> Message:
        if self._h11.their_state is not h11.SEND_BODY:
            return {"type": "http.disconnect"}
        event = await self._next()
        body = bytes(event.data) if isinstance(event, h11.Data) else b""
        return {"type": "http.request", "body": body, "more_body": isinstance(event, h11.Data)}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._head = head(message)
            return
        if self._head is not None:
            status, headers = self._head
            self._head = None
            if self._draining:
                headers.append((b"connection", b"close"))
            self._send_event(h11.Response(status_code=status, headers=headers))
        if (body := message.get("body", b"")) and not self._head_request:
            self._send_event(h11.Data(data=body))
        if not message.get("more_body", False):
            self._send_event(h11.EndOfMessage())
        await self._link.written()

    def _send_event(self, event: Any) -> None:
        self._link.write(self._h11.send(event) or b"")

    async def _over(self) -> bool:
        """Return whether another request may follow on this connection."""
        unread = 0
        while self._h11.their_state is h11.SEND_BODY and unread <= MAX_UNREAD_BYTES:
            event = await self._next()
            unread += len(event.data) if isinstance(event, h11.Data) else 0
        if self._h11.our_state is h11.DONE and self._h11.their_state is h11.DONE:
            self._h11.start_next_cycle()
            return True
        return False

    def _refuse(self, error: h11.RemoteProtocolError) -> None:
        if self._h11.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            headers = [("content-length", "0"), ("connection", "close")]
            status = error.error_status_hint
            self._send_event(h11.Response(status_code=status, headers=headers))
            self._send_event(h11.EndOfMessage())
