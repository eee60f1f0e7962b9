"""A client's HTTP/1.1 connection that costs little: one request at a time, and kept.

For what is asked often and must be answered soon; a general client takes some 0.6 ms of CPU for
each request, this one a tenth of it. Parsing is httptools'.
"""

import asyncio
from typing import Self, cast

import httptools

MAX_BODY_BYTES = 1 << 20


class ConnectionEndedError(ConnectionError):
    """The other side closed the connection before it had answered whole."""


class HttpConnection(asyncio.Protocol):
    """One connection, of an event loop. To be closed by who opened it."""

    def __init__(self) -> None:
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._until_end: bool | None = (
            None  # whether a body ends with the connection; None: no head
        )
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def open(cls, host: str, port: int) -> Self:
        """Connect over TCP. OSError if that fails."""
        return (await asyncio.get_running_loop().create_connection(cls, host, port))[1]

    @classmethod
    async def open_unix(cls, path: str) -> Self:
        """Connect to a Unix socket. OSError if that fails."""
        return (await asyncio.get_running_loop().create_unix_connection(cls, path))[1]

    @property
    def is_open(self) -> bool:
        """Whether another request may be sent."""
        return self._transport is not None and not self._transport.is_closing()

    async def request(self, request: bytes) -> tuple[int, bytes]:
        """Send a request, encoded whole; return status and body of its answer.

        ConnectionError if the connection ends before the answer does, or if it is no HTTP. After an
        error, or if the caller was cancelled, the connection is closed.
        """
        if self._transport is None or self._transport.is_closing():
            raise ConnectionEndedError("the connection is closed")
        assert self._answer is None, "one request at a time"
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await self._answer
        except BaseException:
            self.close()
            raise
        finally:
            self._answer = None

    def close(self) -> None:
        """Close it."""
        if self._transport is not None:
            self._transport.close()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's derives from no class
        self._parser = httptools.HttpResponseParser(self)

    def data_received(self, data: bytes) -> None:
        """Take a piece of an answer."""
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(ConnectionError(f"the answer is no HTTP: {error!r}"))

    def connection_lost(self, error: Exception | None) -> None:
        """End."""
        self._transport = None
        if error is None and self._until_end:
            self.on_message_complete()
        del self._parser  # which refers to this
        self._fail(ConnectionEndedError(f"the connection ended: {error or 'closed'}"))

    # httptools

    def on_message_begin(self) -> None:
        """Begin an answer."""
        self._until_end = None
        self._length_known = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; RFC 9112, section 6.3: without one of these, a body ends at the end."""
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._length_known = True

    def on_headers_complete(self) -> None:
        """Begin a body."""
        self._until_end = not self._length_known

    def on_body(self, part: bytes) -> None:
        """Take a piece of a body."""
        self._body_bytes += len(part)
        if self._body_bytes > MAX_BODY_BYTES:
            self._fail(ConnectionError(f"the answer is over {MAX_BODY_BYTES:,} bytes"))
        else:
            self._body.append(part)

    def on_message_complete(self) -> None:
        """Return the answer to who waits for it."""
        body, self._body, self._body_bytes = b"".join(self._body), [], 0
        self._until_end = None
        status = self._parser.get_status_code()
        if self._answer is None or self._answer.done():
            self.close()  # nobody asked for this
            return
        if not self._parser.should_keep_alive():
            self.close()
        self._answer.set_result((status, body))

    def _fail(self, error: ConnectionError) -> None:
        self.close()
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)
