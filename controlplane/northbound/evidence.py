"""The evidence over HTTP: checkpoints, entries, proofs, and the whole log.

Entries come as the very lines that were hashed (JSON Lines). Hashes are in hexadecimal. Entries
tell of all tenants and are for the operator; checkpoints and proofs tell of nobody.
"""

from collections.abc import AsyncIterator, Iterator
from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from controlplane import checkpoint
from controlplane.answers import Refusal
from controlplane.evidence import EvidenceLog
from controlplane.northbound.identity import Identified, Plane
from controlplane.northbound.problem import responses

MAX_ENTRIES = 1_000  # of one answer
MAX_NUMBER = 10**15
JSON_LINES = "application/jsonl"


class JsonLines(Response):
    """Lines of JSON."""

    media_type = JSON_LINES


router = APIRouter(prefix="/evidence", tags=["evidence"])
Number = Annotated[int | None, Query(ge=0, le=MAX_NUMBER)]


@router.get(
    "/checkpoint",
    summary="Sign the log as it is now",
    response_class=PlainTextResponse,
    responses=responses(401, 403),
)
async def sign(caller: Identified, plane: Plane) -> Response:
    """Return a C2SP tlog-checkpoint in a signed note."""
    caller.require("evidence:read")
    return PlainTextResponse(checkpoint.sign(plane.signer, plane.log.size, plane.log.root()))


@router.get(
    "/key",
    summary="The key that checkpoints are signed with",
    response_class=PlainTextResponse,
    responses=responses(401),
)
async def key(caller: Identified, plane: Plane) -> Response:
    """Return a C2SP verifier key."""
    return PlainTextResponse(f"{plane.signer.verifier}\n")


@router.get(
    "/entries",
    summary="Read entries",
    response_class=JsonLines,
    responses=responses(400, 401, 403, 404),
)
async def entries(
    caller: Identified, plane: Plane, start: Number = None, end: Number = None
) -> Response:
    """Return entries `start` to before `end`; by default the first 1,000 from `start`."""
    caller.require_operator()
    first = start or 0
    last = min(first + MAX_ENTRIES, max(plane.log.size, first)) if end is None else end
    if not 0 <= last - first <= MAX_ENTRIES:
        raise Refusal("INVALID", f"from start to end are 0 to {MAX_ENTRIES} entries")
    lines = _read(plane.log, first, last)
    return JsonLines(b"".join(lines))


@router.get(
    "/proof/inclusion",
    summary="Prove that an entry is in the log",
    responses=responses(400, 401, 403, 404),
)
async def inclusion(
    caller: Identified,
    plane: Plane,
    index: Annotated[int, Query(ge=0, le=MAX_NUMBER)],
    size: Number = None,
) -> Response:
    """Prove it for the log of a size; by default of the present one (RFC 9162, 2.1.3)."""
    caller.require("evidence:read")
    tree, of = plane.log.tree, plane.log.size if size is None else size
    try:
        path, root = tree.inclusion(index, of), tree.root(of)
    except IndexError:
        raise _beyond(plane.log, f"there is no entry {index} among {of}") from None
    return JSONResponse(
        {
            "index": index,
            "size": of,
            "leafHash": tree.leaf(index).hex(),
            "path": [node.hex() for node in path],
            "root": root.hex(),
        }
    )


@router.get(
    "/proof/consistency",
    summary="Prove that the log only grew",
    responses=responses(400, 401, 403, 404),
)
async def consistency(
    caller: Identified,
    plane: Plane,
    first: Annotated[int, Query(alias="from", ge=1, le=MAX_NUMBER)],
    second: Annotated[int | None, Query(alias="to", ge=1, le=MAX_NUMBER)] = None,
) -> Response:
    """Prove that the log of size `to` begins with that of size `from` (RFC 9162, 2.1.4)."""
    caller.require("evidence:read")
    tree, to = plane.log.tree, plane.log.size if second is None else second
    if first > to:
        raise Refusal("INVALID", "to is not below from")
    try:
        path, roots = tree.consistency(first, to), (tree.root(first), tree.root(to))
    except IndexError:
        raise _beyond(plane.log, f"it never had {to}") from None
    return JSONResponse(
        {
            "from": first,
            "to": to,
            "path": [node.hex() for node in path],
            "fromRoot": roots[0].hex(),
            "toRoot": roots[1].hex(),
        }
    )


@router.get(
    "/export", summary="The whole log", response_class=JsonLines, responses=responses(401, 403)
)
async def export(caller: Identified, plane: Plane) -> Response:
    """Stream the log as it is now, to be verified offline."""
    caller.require_operator()
    chunks = _read(plane.log, 0, plane.log.size)
    return StreamingResponse(_stream(chunks), media_type=JSON_LINES)


def _read(log: EvidenceLog, start: int, end: int) -> Iterator[bytes]:
    try:
        return log.read(start, end)
    except IndexError:
        raise _beyond(log, f"entries {start} to {end} are not among them") from None


def _beyond(log: EvidenceLog, what: str) -> Refusal:
    return Refusal("NO_SUCH_ENTRY", f"the log has {log.size} entries: {what}")


async def _stream(chunks: Iterator[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk
