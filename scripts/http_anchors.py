"""Asks anchors over HTTP whether they are ready, on connections that are kept."""

import asyncio
import logging
from collections import defaultdict

from controlplane.catalogue import Catalogue
from controlplane.parties import AnchorRefusedError
from scripts.http_connection import ConnectionEndedError, HttpConnection
from upf.config import AnchorPort

READY_TIMEOUT_S = 0.5
MAX_IDLE = 8  # connections kept to one place

log = logging.getLogger(__name__)


class HttpAnchors:
    """Implements `controlplane.parties.AnchorGateway`."""

    def __init__(self, catalogue: Catalogue, anchors: tuple[AnchorPort, ...]) -> None:
        self._catalogue = catalogue
        self._hosts = {anchor.name: str(anchor.address4) for anchor in anchors}
        self._idle: defaultdict[tuple[str, int], list[HttpConnection]] = defaultdict(list)

    async def ready(self, anchor: str, aisi: str) -> bool:
        """Return whether the anchor answers `GET /ready` with 200 in time."""
        host, port = self._hosts[anchor], self._catalogue.service(aisi).port
        request = f"GET /ready HTTP/1.1\r\nhost: {host}:{port}\r\n\r\n".encode()
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                return await self._status(host, port, request) == 200
        except ConnectionRefusedError as error:
            raise AnchorRefusedError(f"{anchor} refuses connections: {error}") from error
        except (OSError, TimeoutError) as error:
            log.warning("anchor %s: %r", anchor, error)
            return False

    async def _status(self, host: str, port: int, request: bytes) -> int:
        """Return the status of the answer to a request that may be sent twice."""
        idle = self._idle[host, port]
        while idle:
            kept = idle.pop()
            try:
                return await self._ask(kept, request, idle)
            except ConnectionEndedError:  # as one that was idle for long may
                continue
        opened = await HttpConnection.open(host, port)
        return await self._ask(opened, request, idle)

    @staticmethod
    async def _ask(connection: HttpConnection, request: bytes, idle: list[HttpConnection]) -> int:
        status, _ = await connection.request(request)
        if connection.is_open and len(idle) < MAX_IDLE:
            idle.append(connection)
        else:
            connection.close()
        return status
