"""What happens, as it happens: server-sent events."""

from collections.abc import AsyncIterable
from typing import Annotated

from fastapi import APIRouter, Header, Query
from fastapi.sse import EventSourceResponse, ServerSentEvent

from controlplane.event_stream import Filter
from controlplane.northbound.identity import Identified, Plane
from controlplane.northbound.problem import responses

router = APIRouter(tags=["events"])


@router.get(
    "/events",
    summary="Follow what happens",
    response_class=EventSourceResponse,
    responses=responses(400, 401, 403),
)
async def events(
    caller: Identified,
    plane: Plane,
    last_event_id: Annotated[str | None, Header(max_length=20, pattern=r"^\d{1,15}$")] = None,
    kind: Annotated[list[str] | None, Query(max_length=32)] = None,
) -> AsyncIterable[ServerSentEvent]:
    """Stream every event that the caller may see; with `Last-Event-ID`, from there on."""
    caller.require("events:read")
    tenant = None if caller.is_operator or caller.ue is not None else caller.tenant
    wanted = Filter(tenant=tenant, ue=caller.ue, kinds=frozenset(kind) if kind else None)
    last = None if last_event_id is None else int(last_event_id)
    async for message in plane.stream.subscribe(wanted, last):
        yield message
