"""The evidence over HTTP, for the operator: checkpoints, entries, proofs, and the whole log.

Entries come as the very lines that were hashed (JSON Lines). Hashes are in hexadecimal.
"""

from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from controlplane import checkpoint
from controlplane.checkpoint import Signer
from controlplane.controller import Refusal
from controlplane.evidence import Journal

MAX_ENTRIES = 1_000  # of one answer
MAX_DIGITS = 15
JSON_LINES = "application/jsonl"

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class EvidenceApi:
    """Handlers over one journal; read-only."""

    def __init__(self, journal: Journal, signer: Signer) -> None:
        self._journal = journal
        self._signer = signer

    def routes(self, guard: Callable[[Handler], Handler]) -> list[Route]:
        """Return the routes; `guard` lets the operator in and turns refusals into problems."""
        handlers = {
            "checkpoint": self.checkpoint,
            "entries": self.entries,
            "proof/inclusion": self.inclusion,
            "proof/consistency": self.consistency,
            "export": self.export,
        }
        return [
            Route(f"/evidence/{name}", guard(handler), methods=["GET"])
            for name, handler in handlers.items()
        ]

    async def checkpoint(self, request: Request) -> Response:
        """Sign the log as it is now."""
        _parameters(request)
        journal = self._journal
        return PlainTextResponse(checkpoint.sign(self._signer, journal.size, journal.root()))

    async def entries(self, request: Request) -> Response:
        """Return entries `start` to before `end`; by default the first MAX_ENTRIES from `start`."""
        numbers = _parameters(request, "start", "end")
        start = numbers.get("start", 0)
        end = numbers.get("end", min(start + MAX_ENTRIES, max(self._journal.size, start)))
        if not 0 <= end - start <= MAX_ENTRIES:
            raise Refusal("INVALID", f"from start to end are 0 to {MAX_ENTRIES} entries")
        lines = self._read(start, end)
        return Response(b"".join(lines), media_type=JSON_LINES)

    async def inclusion(self, request: Request) -> Response:
        """Prove that an entry is in the log of a size; by default of the present one."""
        numbers = _parameters(request, "index", "size", required=("index",))
        index, size = numbers["index"], numbers.get("size", self._journal.size)
        tree = self._journal.tree
        try:
            path, root = tree.inclusion(index, size), tree.root(size)
        except IndexError:
            raise self._beyond(f"there is no entry {index} among {size}") from None
        return JSONResponse(
            {
                "index": index,
                "size": size,
                "leafHash": tree.leaf(index).hex(),
                "path": [node.hex() for node in path],
                "root": root.hex(),
            }
        )

    async def consistency(self, request: Request) -> Response:
        """Prove that the log of size `to` begins with that of size `from`."""
        numbers = _parameters(request, "from", "to", required=("from",))
        first, second = numbers["from"], numbers.get("to", self._journal.size)
        if not 0 < first <= second:
            raise Refusal("INVALID", "from is at least 1, and to is not below it")
        tree = self._journal.tree
        try:
            path, roots = tree.consistency(first, second), (tree.root(first), tree.root(second))
        except IndexError:
            raise self._beyond(f"it never had {second}") from None
        return JSONResponse(
            {
                "from": first,
                "to": second,
                "path": [node.hex() for node in path],
                "fromRoot": roots[0].hex(),
                "toRoot": roots[1].hex(),
            }
        )

    async def export(self, request: Request) -> Response:
        """Stream the log as it is now."""
        _parameters(request)
        chunks = self._read(0, self._journal.size)
        return StreamingResponse(_stream(chunks), media_type=JSON_LINES)

    def _read(self, start: int, end: int) -> Iterator[bytes]:
        try:
            return self._journal.read(start, end)
        except IndexError:
            raise self._beyond(f"entries {start} to {end} are not among them") from None

    def _beyond(self, what: str) -> Refusal:
        return Refusal("NO_SUCH_ENTRY", f"the log has {self._journal.size} entries: {what}")


async def _stream(chunks: Iterator[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


def _parameters(request: Request, *names: str, required: tuple[str, ...] = ()) -> dict[str, int]:
    """Return the query's numbers. Raises Refusal on anything else in it."""
    numbers: dict[str, int] = {}
    for name, value in request.query_params.multi_items():
        if name not in names or name in numbers:
            raise Refusal("INVALID", f"parameters are {', '.join(names) or 'none'}, each once")
        if not (value.isascii() and value.isdigit() and len(value) <= MAX_DIGITS):
            raise Refusal("INVALID", f"{name} is not a number of at most {MAX_DIGITS} digits")
        numbers[name] = int(value)
    for name in required:
        if name not in numbers:
            raise Refusal("INVALID", f"{name} is missing")
    return numbers
