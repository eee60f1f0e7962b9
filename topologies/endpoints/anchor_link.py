"""One TCP connection of an anchor's HTTP server, and what its two protocols have in common."""

import asyncio
import logging
import socket
import struct
from email.utils import formatdate
from ipaddress import IPv4Address, IPv6Address, ip_address
from urllib.parse import unquote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

IDLE_S = 75.0  # without a byte from the client, between requests or within one
READ_BYTES = 65_536
MAX_UNREAD_BYTES = 1 << 20  # of a request's body that the application did not want
_RESET = struct.pack("ii", 1, 0)  # struct linger: close with a RST

Headers = list[tuple[bytes, bytes]]

log = logging.getLogger(__name__)


class Link:
    """A connection: reads that do not wait for ever, writes that wait for the client."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._client: tuple[str, int] = writer.get_extra_info("peername")[:2]
        self._server: tuple[str, int] = writer.get_extra_info("sockname")[:2]
        self.ends = _address(self._client[0]), _address(self._server[0])

    @property
    def closing(self) -> bool:
        """Whether nothing can be written any more."""
        return self._writer.is_closing()

    async def read(self) -> bytes:
        """Return what has come; nothing: no more will. TimeoutError after IDLE_S."""
        async with asyncio.timeout(IDLE_S):
            return await self._reader.read(READ_BYTES)

    def write(self, data: bytes) -> None:
        """Send."""
        if data:
            self._writer.write(data)

    async def written(self) -> None:
        """Return when there is room for more. OSError if the client has left."""
        if self._writer.is_closing():
            raise ConnectionResetError("the client has left")
        await self._writer.drain()

    def close(self) -> None:
        """Close, after what was written."""
        self._writer.close()

    def reset(self) -> None:
        """Close at once with a RST: what was sent last may be half of an answer."""
        opened: socket.socket = self._writer.get_extra_info("socket")
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._writer.transport.abort()

    def scope(self, version: str, method: str, target: bytes, headers: Headers) -> Scope:
        """Return the ASGI scope of a request (HTTP, version 2.4 of its specification)."""
        path, _, query = target.partition(b"?")
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": version,
            "method": method,
            "scheme": "http",
            "path": _unquoted(path),
            "raw_path": path,
            "query_string": query,
            "root_path": "",
            "headers": headers,
            "client": self._client,
            "server": self._server,
        }

    async def call(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the application answer a request; whatever it raises is logged."""
        try:
            await app(scope, receive, send)
        except Exception:
            if not self.closing:
                log.exception("the application failed")


def head(message: Message) -> tuple[int, Headers]:
    """Return an ASGI `http.response.start`'s status and headers, and the date (RFC 9110, 6.6.1)."""
    headers = [(bytes(name).lower(), bytes(value)) for name, value in message.get("headers", ())]
    return message["status"], [*headers, (b"date", formatdate(usegmt=True).encode())]


def _unquoted(path: bytes) -> str:
    return unquote(path.decode("ascii", "replace"))


def _address(text: str) -> IPv4Address | IPv6Address:
    address = ip_address(text.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address
